from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
from diffusers import SchedulerMixin

from dreambooth.backbones import FAMILIES, open_backbone
from dreambooth.presets import PRESETS, Preset, preset_of
from dreambooth.sampling import scheduler_class


def test_every_family_and_the_embedded_backbone_has_a_preset() -> None:
    assert PRESETS.keys() == {"embedded", *(family.family for family in FAMILIES)}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_usable(preset: Preset) -> None:
    *numbers, prior_scheduler = astuple(preset)
    assert all(value > 0 for value in numbers)
    assert issubclass(scheduler_class(prior_scheduler), SchedulerMixin)
    assert preset.learning_rate_with_text_encoder < preset.learning_rate <= 1e-3
    assert preset.prior_images >= preset.batch


def test_a_backbone_has_the_preset_of_its_family(small_sdxl: Path, small_stable_diffusion: Path) -> None:
    assert preset_of(open_backbone(small_sdxl)) is PRESETS["sdxl"]
    assert preset_of(open_backbone(small_stable_diffusion)) is PRESETS["stable-diffusion"]


def test_the_embedded_backbone_has_its_own_though_it_is_an_sdxl(small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    backbone.source = "embedded"
    assert preset_of(backbone) is PRESETS["embedded"]
