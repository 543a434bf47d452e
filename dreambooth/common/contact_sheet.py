"""A contact sheet: rows of pictures, each row under its title, each picture over its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_TILE = 192
_GAP = 12
_INK = (32, 33, 36)
_PALE = (95, 99, 104)


@dataclass(frozen=True)
class Row:
    """A titled row of pictures; `captions` is empty or has one text a picture."""

    title: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()


def contact_sheet(heading: str, rows: Sequence[Row], columns: int = 6) -> Image.Image:
    """All rows as one RGB image, `columns` pictures wide; longer rows go on below."""
    title_font = ImageFont.load_default(size=20)
    row_font = ImageFont.load_default(size=15)
    caption_font = ImageFont.load_default(size=12)
    line_height = 15
    width = columns * (_TILE + _GAP) + _GAP

    def caption_lines(row: Row) -> list[list[str]]:
        return [_wrap(caption, caption_font) for caption in row.captions] or [[] for _ in row.pictures]

    height = 48
    for row in rows:
        lines = caption_lines(row)
        height += 30
        for start in range(0, len(row.pictures), columns):
            height += _TILE + _GAP + line_height * max(map(len, lines[start : start + columns]))

    sheet = Image.new("RGB", (width, height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 14), heading, fill=_INK, font=title_font)
    y = 48
    for row in rows:
        lines = caption_lines(row)
        draw.text((_GAP, y + 6), row.title, fill=_PALE, font=row_font)
        y += 30
        for start in range(0, len(row.pictures), columns):
            shown = range(start, min(start + columns, len(row.pictures)))
            for column, index in enumerate(shown):
                x = _GAP + column * (_TILE + _GAP)
                sheet.paste(_fit(row.pictures[index]), (x, y))
                for number, line in enumerate(lines[index]):
                    draw.text((x, y + _TILE + 3 + number * line_height), line, fill=_INK, font=caption_font)
            y += _TILE + _GAP + line_height * max(len(lines[index]) for index in shown)
    return sheet


def _wrap(caption: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than a tile, broken between words, or within a word that is wider than that."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= _TILE:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > _TILE:
                lines.append("")
            lines[-1] += letter
    return lines


def _fit(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    small = picture.resize(size, Image.Resampling.LANCZOS)
    tile.paste(small, ((_TILE - size[0]) // 2, (_TILE - size[1]) // 2))
    return tile
