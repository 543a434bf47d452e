"""The small SDXL-architecture backbone that comes with the project, named `embedded`, and a sample subject for it."""

from pathlib import Path

from filelock import FileLock

from dreambooth.subject import SubjectSpec


def backbone_path() -> Path:
    """The folder of the embedded backbone.

    It is untrained for now: small networks are made from configurations at first use and kept in the user's cache.
    """
    from dreambooth.embedded import untrained

    folder = Path("~/.cache/dreambooth").expanduser() / f"embedded-untrained-{untrained.REVISION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            untrained.write_pipeline(folder)
    return folder


def sample_subject() -> SubjectSpec:
    """The subject of the demo: a dog whose drawing the embedded backbone has never seen."""
    folder = Path(__file__).parent / "subjects" / "dog"
    return SubjectSpec("sample-dog", (str(folder),), "dog", None, ())
