"""The small SDXL-architecture backbone that ships with the project, named `embedded`, and subjects new to it."""

from pathlib import Path

from filelock import FileLock

from dreambooth.subject import SubjectSpec

_HERE = Path(__file__).parent


def backbone_path() -> Path:
    """The folder of the embedded backbone, loadable by `StableDiffusionXLPipeline.from_pretrained`.

    Without weights beside the package (`python -m dreambooth.embedded.build` makes them) it is an untrained stand-in:
    small networks made from configurations at first use and kept in the user's cache.
    """
    shipped = _HERE / "weights" / "backbone"
    if (shipped / "model_index.json").exists():
        return shipped
    from dreambooth.embedded import untrained

    folder = Path("~/.cache/dreambooth").expanduser() / f"embedded-untrained-{untrained.REVISION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            untrained.write_pipeline(folder)
    return folder


def subjects_path() -> Path:
    """The held-out subjects, in DreamBench's layout: `NAME/00.png ...` and `prompts_and_classes.txt`.

    None of their drawings appear in the backbone's or the judges' training.
    """
    return _HERE / "subjects"


def sample_subject() -> SubjectSpec:
    """The subject of the demo: a dog whose drawing the embedded backbone has never seen."""
    return SubjectSpec("sample-dog", (str(subjects_path() / "dog"),), "dog", None, ())
