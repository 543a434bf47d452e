from dataclasses import replace

import numpy as np
import pytest

from dreambooth.embedded.instances import Instance, hsv_to_rgb, recolour, rgb_to_hsv
from dreambooth.embedded.scenes import Scene, Sprites, caption, is_held_out_caption, render, sample_scene
from dreambooth.embedded.vocabulary import (
    ACCESSORIES,
    COLOURS,
    CONTEXTS,
    HELD_OUT,
    NOUNS,
    PROPERTIES,
    STYLES,
    VIEWS,
    is_held_out,
)
from dreambooth.subjects.prompts import LIVE_PROMPTS, OBJECT_PROMPTS, fill
from tests.dreambooth.embedded.drawings import draw_sprites

DOG = Instance("dog", "alpha.shape")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return Sprites.load(draw_sprites(tmp_path_factory.mktemp("sprites")))


def test_a_scene_is_fixed_by_seed_and_number(sprites):
    scene = sample_scene(sprites, seed=7, index=3)
    again = sample_scene(sprites, seed=7, index=3)
    assert scene == again
    assert np.array_equal(render(scene, sprites), render(again, sprites))
    assert sample_scene(sprites, seed=7, index=4) != scene
    assert sample_scene(sprites, seed=8, index=3) != scene


def test_a_picture_has_the_size_asked_for(sprites):
    for size in (32, 64, 100):
        picture = render(Scene(DOG, seed=1), sprites, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        (Scene(DOG, 0), "a dog"),
        (Scene(DOG, 0, context="beach"), "a dog on the beach"),
        (Scene(DOG, 0, context="beach", says_context=False), "a dog"),
        (Scene(Instance("owl", "alpha.shape"), 0, colour="red"), "a red owl"),
        (Scene(Instance("owl", "alpha.shape"), 0), "an owl"),
        (Scene(DOG, 0, look="cube shaped", context="snow"), "a cube shaped dog in the snow"),
        (
            Scene(DOG, 0, accessory="top hat", context="night"),
            "a dog wearing a black top hat and a monocle at night",
        ),
        (Scene(DOG, 0, style="a painting of", colour="blue"), "a painting of a blue dog"),
        (Scene(replace(DOG, marking="spotted"), 0, says_marking=True), "a spotted dog"),
        (Scene(replace(DOG, marking="spotted"), 0), "a dog"),
    ],
)
def test_the_caption_says_what_the_scene_holds(scene, words):
    assert caption(scene) == words


def test_every_word_of_a_sampled_caption_is_in_its_scene_and_the_other_way_round(sprites):
    for index in range(300):
        scene = sample_scene(sprites, seed=1, index=index)
        words = caption(scene)
        assert scene.instance.noun in words
        assert [c for c in CONTEXTS if words.endswith(CONTEXTS[c])] == (
            [scene.context] if scene.context and scene.says_context else []
        )
        assert [a for a in ACCESSORIES if ACCESSORIES[a] in words] == ([scene.accessory] if scene.accessory else [])
        assert [p for p in PROPERTIES if p in words] == ([scene.look] if scene.look else [])
        assert [s for s in (*STYLES, *VIEWS) if words.startswith(s)] == [s for s in (scene.style, scene.view) if s]
        said = [c for c in COLOURS if f" {c} {scene.instance.noun}" in words]
        assert said == ([scene.colour] if scene.colour else [])


def test_only_the_living_wear_things(sprites):
    dressed = [s for i in range(300) if (s := sample_scene(sprites, 2, i)).accessory]
    assert dressed
    assert all(NOUNS[scene.instance.noun].live for scene in dressed)


def test_held_out_captions_are_never_sampled_for_pretraining(sprites):
    for index in range(100):
        assert not is_held_out_caption(sample_scene(sprites, 3, index))
        assert is_held_out_caption(sample_scene(sprites, 3, index, held_out=True))


def test_a_judge_s_scenes_show_held_out_captions_beside_the_others(sprites):
    seen = {is_held_out_caption(sample_scene(sprites, 3, index, held_out=None)) for index in range(100)}
    assert seen == {True, False}


def test_held_out_drawings_and_their_twins_are_never_sampled(sprites):
    assert is_held_out("dog", "fluent3d.dog-face")
    assert is_held_out("dog", "fluent.dog-face")
    assert not is_held_out("dog", "noto.dog-face")
    kept_out = {drawing for _, drawing in HELD_OUT.values()}
    assert kept_out.isdisjoint(sample_scene(sprites, 4, index).instance.drawing for index in range(300))


@pytest.mark.parametrize("colour", COLOURS)
def test_a_recoloured_individual_has_that_hue(sprites, colour):
    pixels = np.asarray(sprites.nouns["dog"]["alpha.shape"], np.float32) / 255
    out = recolour(pixels, colour)
    hue, saturation, _ = rgb_to_hsv(out[out[..., 3] > 0.9][:, :3])
    apart = np.abs((hue - COLOURS[colour][0] + 0.5) % 1 - 0.5)
    assert np.median(apart) < 0.02
    assert np.median(saturation) > 0.3
    assert np.array_equal(out[..., 3], pixels[..., 3])


def test_hsv_goes_there_and_back():
    rgb = np.random.default_rng(0).random((50, 3), np.float32)
    assert np.allclose(hsv_to_rgb(*rgb_to_hsv(rgb)), rgb, atol=1e-5)


def test_contexts_and_looks_change_the_picture(sprites):
    plain = render(Scene(DOG, seed=5), sprites).astype(int)
    changed = [Scene(DOG, 5, context=c) for c in CONTEXTS] + [Scene(DOG, 5, look=p) for p in PROPERTIES]
    changed += [Scene(DOG, 5, accessory=a) for a in ACCESSORIES] + [Scene(DOG, 5, style=s) for s in STYLES]
    changed += [Scene(DOG, 5, view=v) for v in VIEWS] + [Scene(DOG, 5, colour=c) for c in COLOURS]
    for scene in changed:
        assert np.abs(render(scene, sprites).astype(int) - plain).mean() > 1, scene


def test_every_dreambench_prompt_is_the_caption_of_some_scene():
    scenes = [Scene(DOG, 0, context=context) for context in CONTEXTS]
    scenes += [Scene(DOG, 0, accessory=accessory) for accessory in ACCESSORIES]
    scenes += [Scene(DOG, 0, colour=colour) for colour in COLOURS] + [Scene(DOG, 0, look=look) for look in PROPERTIES]
    captions = {caption(scene) for scene in scenes}
    for template in (*LIVE_PROMPTS, *OBJECT_PROMPTS):
        assert fill(template, "dog") in captions
