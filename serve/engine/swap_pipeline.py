"""One diffusers pipeline of a backbone; the weights of a version are copied into it in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.versions.base import TOKEN_EMBEDDINGS
from serve.request import GenerationRequest

OnStep = Callable[[int, Callable[[], np.ndarray]], None]
"""Called after each step with its number and a function that decodes previews; an exception ends the sampling."""


def tensor_named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor `NAME`, or row 7 of it as a view: `NAME[7]`; LookupError when there is none."""
    whole, _, row = name.partition("[")
    return tensors[whole][int(row.removesuffix("]"))] if row else tensors[whole]


class SwapPipeline:
    """A pipeline that is built once: loading another version changes the values of tensors, never the modules."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype, device: torch.device) -> None:
        """Build the pipeline with the backbone's own weights, and keep a copy of these in host memory (`base`)."""
        self.device, self._latents = device, backbone.latents
        if "vae" not in backbone.image_encoders:
            raise ValueError(f"backbone {backbone.source!r} ({backbone.family}) works on pixels, and is not served yet")
        self.pipeline = backbone.pipeline(dtype, backbone.trained_parts()).to(device)
        if device.type == "cuda":  # tensor cores read convolutions in this layout; CPUs gain nothing from it
            getattr(self.pipeline, backbone.denoiser).to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)
        networks: dict[str, Any] = {
            name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)
        }
        self._live = {
            f"{component}.{name}": tensor
            for component, network in networks.items()
            for name, tensor in network.state_dict().items()
        }
        self.base = {name: tensor.to("cpu", copy=True) for name, tensor in self._live.items()}
        for component in backbone.text_encoders:
            weight: Tensor = networks[component].get_input_embeddings().weight
            [name] = [name for name, tensor in self._live.items() if tensor.data_ptr() == weight.data_ptr()]
            for tensors in (self._live, self.base):
                tensors[f"{TOKEN_EMBEDDINGS}.{component}"] = tensors[name]
        self._loaded: str | None = None
        self._changed: set[str] = set()
        self._estimate: Tensor | None = None
        self._keep_estimates()

    def _keep_estimates(self) -> None:
        # Schedulers return an estimate of the finished latents beside the next ones; the pipelines drop it.
        step = self.pipeline.scheduler.step

        @functools.wraps(step)
        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            self._estimate = output[-1]
            return output

        self.pipeline.scheduler.step = keeping

    def load_version(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Load the version `name`: copy its tensors, and reset to the backbone's those that only the last one changed.

        False when the version is loaded already.
        """
        if name == self._loaded:
            return False
        for key, tensor in tensors.items():
            assert tensor_named(self._live, key).shape == tensor.shape, f"{name} does not fit its backbone: {key}"
        self._loaded = None  # if a copy fails midway, the next version is loaded in any case
        reset = self._changed - tensors.keys()
        self._changed |= tensors.keys()
        # Reset first: a row of this version may lie in a tensor that the last version changed as a whole.
        self._copy({key: tensor_named(self.base, key) for key in reset})
        self._copy(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the source tensors may be evicted after this call
        self._loaded, self._changed = name, set(tensors)
        return True

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            live = [tensor_named(self._live, key) for key in tensors]
            torch._foreach_copy_(live, list(tensors.values()), non_blocking=True)

    def draw(
        self, request: GenerationRequest, texts: Sequence[tuple[str, str | None]], seeds: Sequence[int], on_step: OnStep
    ) -> Any:
        """Sample a batch: pixels (B, height, width, 3) in [0, 1].

        Size, steps and guidance are the request's; each image has its own (prompt, negative prompt) and seed.
        """
        prompts, negatives = zip(*texts, strict=True)

        def callback(_pipeline: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step, self._preview)
            return {}

        return self.pipeline(
            prompt=list(prompts),
            negative_prompt=None if negatives[0] is None else list(negatives),
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=callback,
        ).images

    @torch.no_grad()
    def _preview(self) -> np.ndarray:
        assert self._estimate is not None
        vae, processor = self.pipeline.vae, self.pipeline.image_processor
        latents = self._latents.unscale(self._estimate.to(vae.dtype))
        return processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="np")
