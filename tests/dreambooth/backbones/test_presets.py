from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import pytest
from diffusers import SchedulerMixin

from dreambooth.backbones import FAMILIES, PRESETS, Backbone, DeepFloydIF, DeepFloydIFSuperResolution, open_backbone
from dreambooth.backbones.precision import DTYPES
from dreambooth.backbones.presets import MACHINES, MachinePreset, Preset
from dreambooth.memory import GPU_RESERVE, plan_memory
from dreambooth.sampling.sampler import scheduler_class
from tests.full_size import FULL_SIZE, write_full_size

PUBLISHED = {  # parameters
    "stable-diffusion": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "deepfloyd-if": {"unet": 4_304_695_110, "text_encoder": 4_762_310_656},
    "deepfloyd-if-ii": {"unet": 1_243_277_190, "text_encoder": 4_762_310_656},
}


@pytest.fixture(scope="module", params=FULL_SIZE)
def full_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return open_backbone(write_full_size(tmp_path_factory.mktemp(request.param), request.param))


def fits(backbone: Backbone, machine: str, row: MachinePreset) -> bool:
    halves = 1 if isinstance(backbone, DeepFloydIFSuperResolution) else 2
    memory = plan_memory(
        backbone,
        trained=(backbone.denoiser,),
        rows=halves * row.batch // MACHINES[machine].gpus,
        resolution=row.resolution,
        precision=row.precision,
        zero_stage=row.zero_stage,
        workers=MACHINES[machine].gpus,
        offload=row.offload,
        gradient_checkpointing=row.gradient_checkpointing,
    )
    return memory.total + GPU_RESERVE <= MACHINES[machine].bytes


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
    assert open_backbone(small_sdxl).preset is PRESETS["sdxl"]
    assert open_backbone(small_stable_diffusion).preset is PRESETS["stable-diffusion"]


def test_the_embedded_backbone_has_its_own_though_it_is_an_sdxl(small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    backbone.source = "embedded"
    assert backbone.preset is PRESETS["embedded"]


def test_full_size_configurations_have_the_published_numbers_of_parameters(full_size: Backbone) -> None:
    for name, count in PUBLISHED[full_size.family].items():
        assert sum(parameter.numel() for parameter in full_size.empty(name).parameters()) == count


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_preset_fits_and_gives_up_no_speed_for_nothing(full_size: Backbone, machine: str) -> None:
    row = full_size.machine_preset(machine)
    assert row.resolution == full_size.default_resolution
    assert fits(full_size, machine, row)
    if row.offload != "none":
        assert not fits(full_size, machine, replace(row, offload="none", gradient_checkpointing=True))
    if row.gradient_checkpointing:
        assert not fits(full_size, machine, replace(row, gradient_checkpointing=False))


def test_every_family_has_a_preset_for_every_machine_with_its_own_learning_rate() -> None:
    rows = {(one.family, machine): row for one in FAMILIES for machine, row in one.machine_presets.items()}
    assert rows.keys() == {(family.family, machine) for family in FAMILIES for machine in MACHINES}
    for (family, machine), row in rows.items():
        assert row.learning_rate == PRESETS[family].learning_rate
        assert row.batch % MACHINES[machine].gpus == 0
        assert row.steps * row.batch <= PRESETS[family].steps * PRESETS[family].batch
        assert row.precision in DTYPES


@pytest.mark.parametrize("machine", MACHINES)
def test_the_stages_of_a_cascade_share_one_worker_group(machine: str) -> None:
    first, second = (family.machine_presets[machine] for family in (DeepFloydIF, DeepFloydIFSuperResolution))
    assert (first.zero_stage, first.offload, first.precision) == (second.zero_stage, second.offload, second.precision)


def test_the_embedded_backbone_needs_no_machine(small_sdxl: Path) -> None:
    backbone = open_backbone(small_sdxl)
    backbone.source = "embedded"
    with pytest.raises(ValueError, match="--preset 1x24GB"):
        backbone.machine_preset("1x24GB")
