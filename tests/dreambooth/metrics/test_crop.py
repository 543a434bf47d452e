"""The paper's crop against its words: shorter side to 256, centre 224."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dreambooth.metrics.crop import paper_crop


@pytest.mark.parametrize("size", [(300, 400), (1000, 257), (64, 64), (256, 256), (225, 1999)])
def test_the_centre_is_cut_after_the_shorter_side_is_256(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    cut = paper_crop(image, 224)
    scale = 256 / min(size)
    whole = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 224) // 2, (whole.height - 224) // 2
    assert cut.size == (224, 224)
    assert np.array_equal(np.asarray(cut), np.asarray(whole)[top : top + 224, left : left + 224])


def test_grey_and_transparent_pictures_become_rgb() -> None:
    assert paper_crop(Image.new("L", (50, 60), 200), 32).getpixel((5, 5)) == (200, 200, 200)
    assert paper_crop(Image.new("RGBA", (50, 60), (9, 8, 7, 255)), 32).mode == "RGB"
