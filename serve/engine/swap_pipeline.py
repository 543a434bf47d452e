"""One pipeline of a backbone, into which subjects' weights are copied in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreambooth.backbones import Backbone
from dreambooth.methods.textual_inversion import LEARNED_EMBEDS
from serve.request import GenerationRequest

OnStep = Callable[[int, Callable[[], np.ndarray]], None]
"""Called after each step with its number and a function that gives previews; what it raises ends the drawing."""


def tensor_named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of a name, or a row of it as a view: `NAME[7]`; LookupError when there is none."""
    whole, _, row = name.partition("[")
    return tensors[whole][int(row.removesuffix("]"))] if row else tensors[whole]


class SwapPipeline:
    """A pipeline built once, that takes on one subject after another: modules stay, the values of tensors change."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype, device: torch.device) -> None:
        """Build the pipeline with the backbone's own weights, and keep these in host memory beside it."""
        self.device = device
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
                tensors[f"{LEARNED_EMBEDS}.{component}"] = tensors[name]
        self._loaded: str | None = None
        self._changed: set[str] = set()
        self._estimate: Tensor | None = None
        self._keep_estimates()

    def _keep_estimates(self) -> None:
        # Schedulers return their estimate of the finished image beside the next latents; the pipelines drop it.
        step = self.pipeline.scheduler.step

        @functools.wraps(step)
        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            self._estimate = output[-1]
            return output

        self.pipeline.scheduler.step = keeping

    def load_version(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Make the weights those of the subject version `name`: its tensors, and the backbone's for all others.

        False when they were its already.
        """
        if name == self._loaded:
            return False
        for key, tensor in tensors.items():
            assert tensor_named(self._live, key).shape == tensor.shape, f"{name} does not fit its backbone: {key}"
        self._loaded = None  # should a copy fail midway, the next subject is copied whatever it is
        back = self._changed - tensors.keys()
        self._changed |= tensors.keys()
        # A row may be of a tensor that the other subject changed as a whole: first all is the backbone's again.
        self._copy({key: tensor_named(self.base, key) for key in back})
        self._copy(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sources may be dropped once nobody draws with them
        self._loaded, self._changed = name, set(tensors)
        return True

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            live = [tensor_named(self._live, key) for key in tensors]
            torch._foreach_copy_(live, list(tensors.values()), non_blocking=True)

    def draw(
        self, order: GenerationRequest, texts: Sequence[tuple[str, str | None]], seeds: Sequence[int], on_step: OnStep
    ) -> Any:
        """Pixels (B, height, width, 3) in [0, 1] of a batch; texts and seeds are each image's own."""
        prompts, negatives = zip(*texts, strict=True)

        def callback(_pipeline: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step, self._preview)
            return {}

        return self.pipeline(
            prompt=list(prompts),
            negative_prompt=None if negatives[0] is None else list(negatives),
            width=order.width,
            height=order.height,
            num_inference_steps=order.steps,
            guidance_scale=order.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=callback,
        ).images

    @torch.no_grad()
    def _preview(self) -> np.ndarray:
        assert self._estimate is not None
        vae, processor = self.pipeline.vae, self.pipeline.image_processor
        latents = self._estimate.to(vae.dtype) / vae.config.scaling_factor
        return processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="np")
