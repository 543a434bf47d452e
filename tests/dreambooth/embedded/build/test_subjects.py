from collections import Counter

import numpy as np
from PIL import Image

from dreambooth.embedded import subjects_path
from dreambooth.embedded.build.subjects import listing, write_subjects
from dreambooth.embedded.vocabulary import HELD_OUT, NOUNS
from tests.dreambooth.embedded.drawings import draw_sprites


def test_the_shipped_subjects_are_five_square_pictures_each():
    folders = sorted(path.name for path in subjects_path().iterdir() if path.is_dir())
    assert folders == sorted(HELD_OUT)
    assert len(folders) >= 12
    assert len({noun for noun, _ in HELD_OUT.values()}) >= 6
    for name in folders:
        pictures = [Image.open(path) for path in sorted((subjects_path() / name).glob("*.png"))]
        assert [picture.size for picture in pictures] == [(256, 256)] * 5
        assert len({picture.tobytes() for picture in pictures}) == 5


def test_a_subject_keeps_its_own_colours_in_all_its_pictures():
    for folder in (path for path in subjects_path().iterdir() if path.is_dir()):
        middles = [np.asarray(Image.open(path))[110:200, 90:166].reshape(-1, 3) for path in folder.glob("*.png")]
        # The subject fills the middle: its commonest coarse colours come again in every picture.
        common = [{tone for tone, _ in Counter(map(tuple, (m // 48).tolist())).most_common(12)} for m in middles]
        assert set.intersection(*common), folder.name


def test_the_listing_has_dreambench_s_shape():
    text = (subjects_path() / "prompts_and_classes.txt").read_text()
    assert text == listing()
    rows = text.split("subject_name,class\n")[1].split("\n\n")[0].splitlines()
    assert dict(row.split(",") for row in rows) == {name: noun for name, (noun, _) in HELD_OUT.items()}
    assert all(noun in NOUNS for noun, _ in HELD_OUT.values())
    blocks = [block.split("\n]")[0].splitlines()[1:] for block in text.split("prompt_list = [")[1:]]
    assert [len(block) for block in blocks] == [25, 25]
    assert blocks[0][0] == "'a {0} {1} in the jungle'.format(unique_token, class_token),"


def test_writing_the_subjects_again_gives_the_same_files(tmp_path):
    sprites = draw_sprites(tmp_path / "sprites")
    write_subjects(sprites, tmp_path / "one")
    write_subjects(sprites, tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
