"""Views: the same picture and the same conditioning as diffusers' own training makes of a photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dreambooth.backbones import open_backbone
from dreambooth.subjects.crops import CROPS, View, bucket_sizes, centre_view, nearest_bucket, view_count, views

SIDES = st.integers(20, 300)
FRAMES = st.sampled_from([(32, 32), (24, 40), (40, 24), (64, 32)])


def gradient(height: int, width: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8))


def drawn(size: tuple[int, int], bucket: tuple[int, int], *key: int | str, flip: bool = True) -> list[View]:
    return views(size, bucket, *key, count=view_count(flip, True), flip=flip, random_crop=True)


def as_diffusers_trains(photo: Image.Image, view: View) -> Image.Image:
    """The steps of diffusers' SDXL training script, one after another: resize, flip, crop at (top, left)."""
    scaled = photo.resize(view.scaled[::-1], Image.Resampling.LANCZOS)
    flipped = ImageOps.mirror(scaled) if view.mirrored else scaled
    (top, left), (height, width) = view.corner, view.bucket
    return flipped.crop((left, top, left + width, top + height))


@given(SIDES, SIDES, FRAMES, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_view_is_scaled_mirrored_and_cut_at_its_corner(
    height: int, width: int, bucket: tuple[int, int], seed: int
) -> None:
    photo = gradient(height, width)
    for view in [centre_view((height, width), bucket), *drawn((height, width), bucket, seed)[:2]]:
        assert view.original == (height, width)
        picture = view.show(photo)
        assert picture.size == bucket[::-1]
        expected = as_diffusers_trains(photo, view)
        np.testing.assert_allclose(np.asarray(picture, int), np.asarray(expected, int), atol=2)


@given(SIDES, SIDES, FRAMES)
def test_a_photo_is_scaled_to_just_cover_its_frame(height: int, width: int, bucket: tuple[int, int]) -> None:
    view = centre_view((height, width), bucket)
    scale = max(bucket[0] / height, bucket[1] / width)
    assert view.scaled == pytest.approx((height * scale, width * scale), abs=0.51)
    rest = [whole - cut for whole, cut in zip(view.scaled, bucket, strict=True)]
    assert min(rest) == 0
    assert view.corner == tuple(each // 2 for each in rest)


def test_a_square_is_the_short_side_of_a_photo_and_its_centre() -> None:
    assert centre_view((512, 1024), (256, 256)) == View((512, 1024), (256, 512), (0, 128), (256, 256))
    assert centre_view((2048, 2048), (512, 512)) == View((2048, 2048), (512, 512), (0, 0), (512, 512))


def test_a_long_panorama_takes_no_more_memory_than_its_frame() -> None:
    view = centre_view((64, 1_000_000), (1024, 1024))
    assert view.corner == (0, (16_000_000 - 1024) // 2)
    assert view.show(Image.new("RGB", (1_000_000, 64), "red")).getcolors() == [(1024 * 1024, (255, 0, 0))]


@given(SIDES, SIDES, FRAMES, st.integers(), st.text())
def test_views_are_a_function_of_their_key_and_stay_within_the_photo(
    height: int, width: int, bucket: tuple[int, int], seed: int, subject: str
) -> None:
    made = drawn((height, width), bucket, seed, subject)
    assert made == drawn((height, width), bucket, seed, subject)
    for view in made:
        for corner, whole, cut in zip(view.corner, view.scaled, bucket, strict=True):
            assert 0 <= corner <= whole - cut


def test_photos_seeds_and_views_have_corners_of_their_own() -> None:
    corners = [
        tuple(view.corner for view in drawn((32, 3200), (32, 32), seed, "mug", "view", photo))
        for seed in range(3)
        for photo in range(3)
    ]
    assert len(set(corners)) == 9
    assert all(len(set(row)) == CROPS for row in corners)
    reached = {view.corner[1] for seed in range(50) for view in drawn((32, 35), (32, 32), seed)}
    assert reached == {0, 1, 2, 3}


def test_half_of_the_views_are_mirrored_and_none_unasked() -> None:
    photo = gradient(40, 60)
    plain, mirrored = views((40, 60), (32, 32), count=2, flip=True, random_crop=False)
    assert (plain.mirrored, mirrored.mirrored) == (False, True)
    difference = np.asarray(mirrored.show(photo), int) - np.asarray(plain.show(photo), int)[:, ::-1]
    assert np.abs(difference).max() <= 3  # the centre of a photo of even width is its mirror's but for rounding
    assert sum(view.mirrored for view in drawn((40, 60), (32, 32), 1)) == CROPS / 2
    assert not any(view.mirrored for view in drawn((40, 60), (32, 32), 1, flip=False))
    assert [view_count(*options) for options in [(False, False), (True, False), (False, True)]] == [1, 2, CROPS]


# -- buckets -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.sampled_from([8, 32, 64]))
def test_frames_fit_the_denoiser_and_have_no_more_pixels_than_the_square(units: int, multiple: int) -> None:
    resolution = units * multiple
    frames = bucket_sizes(resolution, multiple)
    assert frames[0] == (resolution, resolution)
    assert len(set(frames)) == len(frames)
    assert {(width, height) for height, width in frames} == set(frames)
    for height, width in frames:
        assert height % multiple == width % multiple == 0
        assert height * width <= resolution**2
        assert 0.5 <= height / width <= 2
        # Half of the square at the worst, where sides are few multiples long; a longer side would not fit.
        assert (max(height, width) + max(multiple, resolution // 8)) * min(height, width) > resolution**2


def test_sdxl_has_frames_of_its_own_training() -> None:
    frames = bucket_sizes(1024, 32)
    assert frames == [
        *((1024, 1024), (960, 1088), (1088, 960), (896, 1152), (1152, 896)),
        *((832, 1216), (1216, 832), (768, 1344), (1344, 768)),
    ]
    assert bucket_sizes(64, 64) == [(64, 64)]


@given(SIDES, SIDES)
def test_the_nearest_frame_keeps_most_of_a_photo(height: int, width: int) -> None:
    frames = bucket_sizes(512, 64)

    def kept(bucket: tuple[int, int]) -> float:
        view = centre_view((height * 100, width * 100), bucket)
        return bucket[0] * bucket[1] / (view.scaled[0] * view.scaled[1])

    nearest = nearest_bucket((height, width), frames)
    assert kept(nearest) == pytest.approx(max(map(kept, frames)), abs=0.01)
    assume(height != width)
    assert (nearest[0] > nearest[1]) <= (height > width)


@pytest.mark.parametrize("name", ["small_sdxl", "small_stable_diffusion", "small_if"])
def test_denoisers_take_every_frame(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    backbone = open_backbone(folder)
    denoiser = backbone.load(backbone.denoiser)
    encoders = {encoder: backbone.load(encoder) for encoder in backbone.text_encoders}
    frames = bucket_sizes(backbone.default_resolution, backbone.latents.side_multiple)
    assert len(frames) > 1
    for bucket in frames:
        channels, *_ = backbone.latents.shape(backbone.default_resolution)
        z_t = torch.randn(1, channels, *(side // backbone.latents.pixels_per_latent for side in bucket))
        with torch.no_grad():
            conditioning = backbone.text.encode(encoders, backbone.text.tokenize(["a mug"]))
            sizes = backbone.size_conditioning(bucket, (0, 0), bucket)
            conditioning |= {key: value[None] for key, value in sizes.items()}
            assert backbone.predict(denoiser, z_t, torch.tensor([5]), conditioning).shape == z_t.shape
