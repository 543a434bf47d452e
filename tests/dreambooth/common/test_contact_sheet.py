from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dreambooth.common.contact_sheet import Row, contact_sheet

COLOURS = ["red", "lime", "blue", "cyan", "magenta", "yellow", "teal", "orange"]
SIDE, STEP, LEFT = 192, 204, 12  # a picture, from one to the next, and the first one's place


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), COLOURS[number]) for number in range(count)]


def places(sheet: Image.Image, colour: str) -> tuple[int, int, int, int] | None:
    """The box of all pixels of this colour: (left, top, right, bottom)."""
    found = (np.asarray(sheet) == np.asarray(Image.new("RGB", (1, 1), colour))).all(-1)
    return Image.fromarray(found).getbbox()


def test_every_picture_is_at_its_place() -> None:
    sheet = contact_sheet("rex@1", [Row("Photos", pictures(3)), Row("Samples", pictures(8)[3:], ["a prompt"] * 5)])
    assert (sheet.mode, sheet.width) == ("RGB", 6 * STEP + LEFT)
    boxes = [places(sheet, colour) for colour in COLOURS]
    for number, box in enumerate(boxes):
        assert box is not None
        left = LEFT + STEP * (number if number < 3 else number - 3)
        assert (box[0], box[2] - box[0], box[3] - box[1]) == (left, SIDE, SIDE)
    tops = [box[1] for box in boxes if box]
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1
    assert tops[3] >= tops[0] + SIDE
    assert max(box[3] for box in boxes if box) < sheet.height


def test_long_rows_go_on_below() -> None:
    sheet = contact_sheet("rex@1", [Row("Photos", pictures(8))], columns=3)
    assert sheet.width == 3 * STEP + LEFT
    boxes = [places(sheet, colour) for colour in COLOURS]
    assert [(box[0] - LEFT) // STEP for box in boxes if box] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len({box[1] for box in boxes if box}) == 3


@pytest.mark.parametrize(("size", "shown"), [((300, 100), (192, 64)), ((50, 100), (96, 192)), ((2000, 1), (192, 1))])
def test_pictures_keep_their_shape(size: tuple[int, int], shown: tuple[int, int]) -> None:
    box = places(contact_sheet("", [Row("", [Image.new("RGB", size, "red")])]), "red")
    assert box is not None
    assert (box[2] - box[0], box[3] - box[1]) == shown
    assert abs((box[0] + box[2]) / 2 - (LEFT + SIDE / 2)) <= 1


def test_pictures_of_other_kinds_are_shown() -> None:
    sheet = contact_sheet("", [Row("", [Image.new("L", (8, 8), 7), Image.new("RGBA", (8, 8), (255, 0, 0, 255))])])
    assert places(sheet, "#070707") is not None
    assert places(sheet, "red") is not None


CAPTIONS = {
    "words": "a sks dog on a cobblestone street in the very late evening " * 3,
    "wide letters": "WWWW MMMM " * 8,
    "one long word": "W" * 60,
    "mixed": "a " + "m" * 40 + " dog",
}


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_long_captions_wrap_under_their_own_picture(caption: str) -> None:
    short = contact_sheet("", [Row("", pictures(3), ["", "i", ""])])
    sheet = contact_sheet("", [Row("", pictures(3), ["", caption, ""]), Row("", pictures(4)[3:])])
    box, below = places(sheet, "lime"), places(sheet, "cyan")
    assert box is not None
    assert below is not None
    ink = np.asarray(sheet.convert("L"))[box[3] : below[1]] < 200
    columns, lines = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    assert box[0] <= columns[0]
    assert columns[-1] < box[0] + STEP, "the caption runs under the next picture"
    assert lines[-1] - lines[0] > 30
    assert lines[-1] < below[1] - box[3] - 1
    assert sheet.height > short.height


def test_all_of_a_caption_is_written() -> None:
    def ink(captions: list[str]) -> int:
        return int((np.asarray(contact_sheet("", [Row("", pictures(1), captions)]).convert("L")) < 60).sum())

    nothing, once = ink([""]), ink(["dog"])
    assert ink([" ".join(["dog"] * 12)]) - nothing == pytest.approx(12 * (once - nothing), rel=0.15)


def test_an_empty_row_is_its_title() -> None:
    assert contact_sheet("", [Row("none", [])]).height < SIDE
