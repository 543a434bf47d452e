"""The embedded backbone: a small pretrained model of SDXL's architecture that ships with the package.

It draws 64 x 64 pictures of toy-like scenes, so that personalization, evaluation and serving really work without a
model hub or a GPU.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def backbone_path() -> Path:
    """The folder of the shipped backbone, loadable by `StableDiffusionXLPipeline.from_pretrained`."""
    return _HERE / "weights" / "backbone"


def subjects_path() -> Path:
    """The held-out subjects, in DreamBench's layout: `NAME/00.png ...` and `prompts_and_classes.txt`.

    None of their drawings appear in the backbone's or the judges' training.
    """
    return _HERE / "subjects"
