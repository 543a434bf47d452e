"""Make, list and revoke the keys of a server: `python -m serve.keys --help`, or `dreambooth keys --help`."""

from __future__ import annotations

import tyro

from serve.api.auth import folder_of


def make(
    store: str,
    tenant: str,
    subjects: tuple[str, ...] = (),
    keys: str | None = None,
    images_per_minute: int | None = None,
    largest_side: int | None = None,
    admin: bool = False,
) -> None:
    """Make a key and print it: it cannot be shown again.

    Args:
        store: The subject store.
        tenant: Whose key it is.
        subjects: The tenant's subjects: names, or patterns such as 'acme-*'.
        keys: The folder of keys, if it is not STORE/keys.
        images_per_minute: The key's rate; without it there is no limit.
        largest_side: The longest side of an image in pixels; without it the model's own limit holds.
        admin: Let it see every subject, and list and revoke keys over HTTP.
    """
    limits = {"images_per_minute": images_per_minute, "largest_side": largest_side}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not subjects and not admin:
        raise ValueError("a key without subjects can do nothing: name some with --subjects, or make it --admin")
    secret, _ = folder_of(store, keys).make(tenant, subjects, admin=admin, **limits)
    print(secret)


def show(store: str, keys: str | None = None) -> None:
    """List the keys by id, with what they may do.

    Args:
        store: The subject store.
        keys: The folder of keys, if it is not STORE/keys.
    """
    for key in folder_of(store, keys).all():
        rate = f"{key.images_per_minute} images a minute" if key.images_per_minute else "no rate limit"
        side = f", sides to {key.largest_side}" if key.largest_side else ""
        what = "admin" if key.admin else " ".join(key.subjects)
        print(f"{key.id}  {key.created}  {key.tenant}: {what} ({rate}{side})")


def revoke(store: str, key_id: tyro.conf.Positional[str], keys: str | None = None) -> None:
    """Revoke a key; servers notice within half a minute.

    Args:
        store: The subject store.
        key_id: The id that `list` shows.
        keys: The folder of keys, if it is not STORE/keys.
    """
    folder_of(store, keys).revoke(key_id)


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict({"make": make, "list": show, "revoke": revoke}, prog="serve.keys")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
