"""Stand-ins for the emoji drawings: one shape a noun, so that scenes and the build need no download."""

from pathlib import Path

from PIL import Image, ImageDraw

from dreambooth.embedded.vocabulary import HELD_OUT, NOUNS, PROPS


def draw_sprites(folder: Path, size: int = 64) -> Path:
    for number, noun in enumerate(NOUNS):
        hue = (number * 47 % 256, 80 + number * 31 % 150, 255 - number * 13 % 200)
        kept_out = [drawing for word, drawing in HELD_OUT.values() if word == noun]
        for drawing in ("alpha.shape", "beta.shape", *kept_out):
            _save(folder / "nouns" / noun / f"{drawing}.png", size, hue, square=drawing.startswith("beta"))
    for prop in PROPS:
        _save(folder / "props" / prop / "alpha.shape.png", size, (60, 120, 60), square=False)
    return folder


def _save(path: Path, size: int, colour: tuple[int, int, int], square: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(picture)
    box = (size // 8, 0, size - size // 8, size - 1)
    (pen.rectangle if square else pen.ellipse)(box, fill=colour)
    pen.ellipse((size // 3, size // 4, size // 2, size // 2), fill=(20, 20, 20))
    picture.save(path)
