"""The swap pipeline loads versions exactly, and draws batches as it draws single images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dreambooth.backbones import open_backbone
from dreambooth.methods.textual_inversion import LEARNED_EMBEDS, read_learned_embeds
from dreambooth.store import SubjectStore, Version
from serve.engine.swap_pipeline import SwapPipeline
from serve.engine.weight_cache import DiskCache, HostCache
from serve.request import GenerationRequest
from tests.serve.published import publish_learned_embeds

REQUEST = GenerationRequest("mug", "1", "a mug", None, 32, 32, steps=4, guidance=4.0, seeds=(1, 2))


def nothing(step: int, preview: Callable[[], np.ndarray]) -> None:
    pass


@pytest.fixture
def pipeline(small_sdxl: Path) -> SwapPipeline:
    return SwapPipeline(open_backbone(small_sdxl), torch.float32, torch.device("cpu"))


def with_learned_embeds(base: dict[str, Tensor], version: Version) -> dict[str, Tensor]:
    """The backbone's tensors with the rows that the version holds."""
    assert version.location.local is not None
    changed = dict(base)
    for encoder, token_ids, rows in read_learned_embeds(version.location.local / LEARNED_EMBEDS):
        [name] = [name for name in base if name.startswith(f"{encoder}.") and "token_embedding" in name]
        changed[name] = base[name].clone()
        changed[name][token_ids] = rows
    return changed


@pytest.mark.anyio
async def test_loading_a_version_replaces_the_last_one_in_place(
    pipeline: SwapPipeline, store: SubjectStore, versions: list[Version], small_sdxl: Path, tmp_path: Path
) -> None:
    host = HostCache(DiskCache(store, tmp_path, 0), pipeline.base, 2**30)
    live = {
        f"{component}.{name}": tensor
        for component in ("unet", "text_encoder", "text_encoder_2", "vae")
        for name, tensor in getattr(pipeline.pipeline, component).state_dict().items()
    }
    base = {name: tensor.clone() for name, tensor in live.items()}
    learned = publish_learned_embeds(store, open_backbone(small_sdxl), "cup", "4" * 12)
    for version in [*versions, learned, *reversed(versions), learned]:
        async with host.lease(version.subject, version.id) as tensors:
            pipeline.load_version(version.id, tensors)
            expected = base | dict(tensors) if version is not learned else with_learned_embeds(base, version)
        assert [name for name in live if not torch.equal(live[name], expected[name])] == []


def test_a_version_that_does_not_fit_changes_nothing(pipeline: SwapPipeline) -> None:
    bias = pipeline.pipeline.unet.conv_in.bias
    before = bias.clone()
    with pytest.raises(AssertionError, match="broken@1"):
        pipeline.load_version("broken@1", {"unet.conv_in.bias": torch.zeros(1)})
    with pytest.raises(LookupError, match=r"unet\.unknown"):
        pipeline.load_version("broken@1", {"unet.unknown": torch.zeros(1)})
    assert torch.equal(bias, before)


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_an_image_does_not_depend_on_its_batch_but_for_rounding(pipeline: SwapPipeline, negative: str | None) -> None:
    texts = [("a mug", negative), ("a dog on the beach", negative)]
    together = pipeline.draw(REQUEST, texts, (1, 2), nothing)
    alone = [pipeline.draw(REQUEST, [texts[i]], [i + 1], nothing)[0] for i in range(2)]
    assert np.abs(together - np.stack(alone)).max() < 1e-3
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_the_last_preview_is_the_image(pipeline: SwapPipeline) -> None:
    previews: list[np.ndarray] = []
    pixels = pipeline.draw(REQUEST, [("a mug", None)], [1], lambda _, preview: previews.append(preview()))
    distances = [float(np.abs(preview - pixels).mean()) for preview in previews]
    assert len(previews) == 4
    assert distances[-1] < 1e-4
    assert distances == sorted(distances, reverse=True)
