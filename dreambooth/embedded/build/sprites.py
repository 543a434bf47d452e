"""Sprites: emoji drawings out of npm packages, rendered to square RGBA pictures, one folder a noun.

The packages are unpacked by `npm install` into the work folder. Their licences (MIT, Apache-2.0, CC BY 4.0) allow
redistribution of derived works with attribution, which `ATTRIBUTION` below becomes beside the weights.
"""

import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth.embedded.vocabulary import NOUNS, PROPS

SPRITE_SIZE = 256


@dataclass(frozen=True)
class EmojiSet:
    """One npm package of drawings; `short` is the set's name in a drawing's name."""

    short: str
    package: str
    version: str
    title: str
    author: str
    licence: str
    url: str


SETS = (
    EmojiSet(
        "fluent3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Fluent Emoji (3D)",
        "Microsoft Corporation, packaged by LobeHub",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    EmojiSet(
        "fluent",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "Fluent Emoji Flat",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    EmojiSet(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "Noto Emoji",
        "Google Inc",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    EmojiSet(
        "noto1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "Noto Emoji (v1)",
        "Google Inc",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    EmojiSet(
        "fx",
        "@iconify-json/fxemoji",
        "1.2.2",
        "Firefox OS Emoji",
        "Mozilla",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
    ),
    EmojiSet(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "Twemoji",
        "Twitter, Inc and other contributors",
        "CC BY 4.0",
        "https://github.com/jdecked/twemoji",
    ),
)

ATTRIBUTION = (
    "# Attribution\n\nThe embedded backbone and its judges were trained on scenes composed from these drawings, "
    "recoloured, reshaped and placed\nover procedural backgrounds. The held-out subjects' pictures show some of them, "
    "altered in the same ways.\n\n"
    + "".join(f"- {s.title}, {s.author}, {s.licence}, {s.url} (npm `{s.package}` {s.version})\n" for s in SETS)
    + "\nLicences: MIT <https://opensource.org/license/mit>, Apache-2.0 <https://www.apache.org/licenses/LICENSE-2.0>,\n"
    "CC BY 4.0 <https://creativecommons.org/licenses/by/4.0/>.\n"
)


def install_packages(folder: Path) -> Path:
    """Unpack the emoji packages at their pinned versions under `folder`; return its `node_modules`."""
    modules = folder / "node_modules"
    if not all((modules / s.package / "package.json").exists() for s in SETS):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        wanted = [f"{s.package}@{s.version}" for s in SETS]
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", *wanted], cwd=folder, check=True)
    return modules


def make_sprites(modules: Path, out: Path) -> None:
    """Render every drawing of every noun and prop to `out/nouns/NOUN/SET.NAME.png` and `out/props/PROP/...`."""
    sets = {s.short: _Drawings(modules / s.package, s.short) for s in SETS}
    jobs = [("nouns", noun.word, name) for noun in NOUNS.values() for name in noun.emoji]
    jobs += [("props", prop, name) for prop, names in PROPS.items() for name in names]
    for group, word, name in jobs:
        only, _, emoji = name.rpartition("/")
        for drawings in [sets[only]] if only else sets.values():
            picture = drawings.render(emoji)
            if picture is None:
                continue
            target = out / group / word / f"{drawings.short}.{emoji}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _square(picture).save(target)


class _Drawings:
    """The drawings of one unpacked package, by emoji name."""

    def __init__(self, package: Path, short: str) -> None:
        self.short = short
        self.package = package
        icons = package / "icons.json"
        self.icons: dict = json.loads(icons.read_text()) if icons.exists() else {}
        # The 3D set names its files by code point; Noto's table leads from a name to its code points.
        table = json.loads((package.parents[1] / "@iconify-json" / "noto" / "chars.json").read_text())
        self.codes = {name: code for code, name in table.items()}

    def render(self, name: str) -> Image.Image | None:
        """The drawing as RGBA, or None where this set lacks it."""
        if not self.icons:
            for code in (self.codes.get(name, ""), self.codes.get(name, "") + "-fe0f"):
                path = self.package / "assets" / f"{code}.webp"
                if path.exists():
                    return Image.open(path).convert("RGBA")
            return None
        icon = self.icons["icons"].get(name)
        if icon is None:
            alias = self.icons.get("aliases", {}).get(name)
            if alias is None or set(alias) - {"parent"}:
                return None
            icon = self.icons["icons"][alias["parent"]]
        # Imported here: the renderer is needed at build time alone.
        import resvg_py

        width, height = (icon.get(side, self.icons.get(side, 16)) for side in ("width", "height"))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        data = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIZE, height=SPRITE_SIZE)
        return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def _square(picture: Image.Image) -> Image.Image:
    """Crop to what is drawn, so that all sets share one scale, and centre it on a square of `SPRITE_SIZE`."""
    box = picture.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    assert box is not None, "an empty drawing"
    picture = picture.crop(box)
    scale = SPRITE_SIZE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    canvas.paste(picture, ((SPRITE_SIZE - size[0]) // 2, (SPRITE_SIZE - size[1]) // 2))
    return canvas
