"""What is checked before the server starts: the keys, the versions to serve, the port, and the machine's resources."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING

from dreambooth.common.location import Location
from serve.api.auth import folder_of, is_loopback
from serve.config import InvalidInput, ServeConfig

if TYPE_CHECKING:
    from serve.catalog.catalog import Entry


def find_versions(config: ServeConfig) -> list[Entry]:
    """The versions that can be served; InvalidInput when there are none, or no keys, or when `keep` names others."""
    try:
        _check_keys(config)
        return _find_versions(config)
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the store {config.store}: {error}") from error


def _check_keys(config: ServeConfig) -> None:
    root = Location.of(config.store)
    if root.local is not None and not root.exists():
        raise InvalidInput(f"there is no store {root}: give the folder that `dreambooth personalize` published to")
    if not config.without_keys and not (keys := folder_of(config.store, config.keys)).all():
        raise InvalidInput(
            f"there are no keys in {keys.folder}: make one with `dreambooth keys make`, or set without_keys to serve "
            "every client on this machine and no other"
        )


def _find_versions(config: ServeConfig) -> list[Entry]:
    from dreambooth.store import SubjectStore  # these load torch, which takes seconds
    from serve.catalog.catalog import Catalog

    store = SubjectStore(config.store)
    entries = [entry for published in asyncio.run(Catalog(store).versions()).values() for entry in published]
    if not entries:
        raise InvalidInput(f"store {store.root} holds no published version: make one with `dreambooth personalize`")
    served = [entry for entry in entries if entry.unserved is None]
    if not served:
        first = entries[0]
        raise InvalidInput(f"nothing in {store.root} can be served: {first.subject}@{first.version}: {first.unserved}")
    names = {name for one in served for name in (one.subject, f"{one.subject}@{one.version}")}
    if unknown := sorted(set(config.keep) - names):
        raise InvalidInput(f"keep names {', '.join(unknown)}, which {store.root} does not hold or cannot be served")
    return served


def check_reach(config: ServeConfig, host: str | None, remedy: str) -> None:
    """Refuse to listen beyond this machine without keys; `remedy` tells the user what to change."""
    if config.without_keys and host is not None and not is_loopback(host):
        raise InvalidInput(
            f"the server would listen on {host}, and without keys only this machine may be served: {remedy}"
        )


def check_port(host: str, port: int) -> None:
    """Make sure that a server can listen on this port of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InvalidInput(f"port {port} on {host} is taken by another process: give another with --port") from None
        raise InvalidInput(f"cannot listen on port {port} of {host}: {error.strerror}") from error


def check_resources(config: ServeConfig, backbones: int, have: dict[str, float]) -> None:
    """Make sure that a machine of its own has the CPUs and GPUs for all replicas; they would wait for them for ever."""
    replicas = config.replicas * backbones
    for name, each in (("CPU", config.cpus_per_replica), ("GPU", config.gpus_per_replica)):
        if each * replicas > have.get(name, 0):
            raise InvalidInput(
                f"the replicas need {each * replicas:g} {name}s in all, and this machine has "
                f"{have.get(name, 0):g}: lower --{name.lower()}s-per-replica or --replicas (with --max-replicas, "
                "0 starts replicas when requests come)"
            )
