"""The small SDXL-architecture backbone that ships with the project, named `embedded`, and subjects new to it."""

from pathlib import Path

from dreambooth.subjects.manifest import SubjectSpec

_HERE = Path(__file__).parent


def backbone_path() -> Path:
    """The folder of the embedded backbone, loadable by `StableDiffusionXLPipeline.from_pretrained`.

    `README.md` beside it is the model card; `python -m dreambooth.embedded.build` made it.
    """
    return _HERE / "weights" / "backbone"


def subjects_path() -> Path:
    """The held-out subjects, in DreamBench's layout: `NAME/00.png ...` and `prompts_and_classes.txt`.

    None of their drawings appear in the backbone's or the judges' training.
    """
    return _HERE / "subjects"


def sample_subject() -> SubjectSpec:
    """The subject of the demo: a dog whose drawing the embedded backbone has never seen."""
    return SubjectSpec("sample-dog", (str(subjects_path() / "dog"),), "dog", None, ())
