"""Whether a run fits its devices, from configurations alone; and where it does not, what would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from dreambooth.backbones import Backbone
from dreambooth.memory import GPU_RESERVE, Footprint, MemoryPlan, footprint
from dreambooth.runs import Training, WorkerGroup
from pipelines.planning.workers import check_engine

_OFFLOADING = ("none", "cpu", "nvme")
_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Proposal:
    """The cheapest way to train that fits, and the memory of each stage of the cascade by it."""

    zero_stage: int
    offload: str
    gradient_checkpointing: bool
    memory: tuple[MemoryPlan, ...]

    @property
    def arguments(self) -> str:
        """The options that ask for it."""
        checkpointing = " --gradient-checkpointing" if self.gradient_checkpointing else ""
        disk = " --nvme-path FOLDER" if self.offload == "nvme" else ""
        return f"--zero-stage {self.zero_stage} --offload {self.offload}{disk}{checkpointing}"


class Preflight:
    """The memory of the stages of a run: a backbone each, trained one after another by one lane."""

    def __init__(
        self, stages: Sequence[tuple[Backbone, Training]], lane: WorkerGroup, device_bytes: int | None
    ) -> None:
        """Measure the run as it was asked for; raises ValueError when its batch does not divide among the workers."""
        self._stages, self._lane = stages, lane
        self._asked = [_footprint(backbone, training, lane) for backbone, training in stages]
        self.device_bytes = device_bytes
        """Memory that one worker may use; None when nothing is known of it here."""
        self.reserve = GPU_RESERVE if lane.gpus_per_worker else 0
        """What must be left of it."""

    @property
    def memory(self) -> tuple[MemoryPlan, ...]:
        """Of each stage, as it was asked for."""
        return self._memory(self._asked, self._lane)

    def fits(self, memory: Sequence[MemoryPlan]) -> bool:
        """Whether a device has room for each of these."""
        assert self.device_bytes is not None
        return max(one.total for one in memory) + self.reserve <= self.device_bytes

    def propose(self) -> Proposal | None:
        """The cheapest way that fits, None if none does: as little offloading as can be, and the lowest ZeRO stage.

        Gradients are checkpointed before anything is offloaded, which costs more time.
        """
        asked = self._stages[0][1].gradient_checkpointing
        measured = {asked: self._asked}
        for offload, checkpointing, zero_stage in product(_OFFLOADING, sorted({asked, True}), _STAGES):
            lane = replace(self._lane, zero_stage=zero_stage, offload=offload)
            if not self._trainable(lane):
                continue
            if checkpointing not in measured:
                measured[checkpointing] = [
                    _footprint(backbone, replace(training, gradient_checkpointing=True), lane)
                    for backbone, training in self._stages
                ]
            memory = self._memory(measured[checkpointing], lane)
            if self.fits(memory):
                return Proposal(zero_stage, offload, checkpointing and not asked, memory)
        return None

    def _trainable(self, lane: WorkerGroup) -> bool:
        """Whether the engine can do it, and settings of the user's own leave it open."""
        fixed = lane.deepspeed.get("zero_optimization", {}).get("stage", lane.zero_stage)
        try:
            for backbone, training in self._stages:
                check_engine(backbone, training, lane)
        except ValueError:
            return False
        return fixed == lane.zero_stage

    @staticmethod
    def _memory(footprints: Sequence[Footprint], lane: WorkerGroup) -> tuple[MemoryPlan, ...]:
        return tuple(one.shared(lane.zero_stage, lane.workers, lane.offload) for one in footprints)

    def describe(self) -> Iterator[str]:
        """The verdict in words, and the proposal."""
        if self.device_bytes is None:
            yield "This machine sees no GPU: give --device-memory GIB to learn what fits"
            return
        room = f"{in_words(self.device_bytes)} a device"
        if self.reserve:
            room += f", of which {in_words(self.reserve)} are left for buffers and kernels"
        yield f"{'Fits' if self.fits(self.memory) else 'DOES NOT FIT'} in {room}"
        found = self.propose()
        lane = self._lane
        if found is None:
            yield (
                "  Nothing fits, not even with offloading and gradient checkpointing: lower --batch or --resolution, "
                "or raise --workers"
            )
        elif (found.zero_stage, found.offload, found.gradient_checkpointing) == (lane.zero_stage, lane.offload, False):
            yield "  It is the lowest ZeRO stage and the least offloading that fit"
        else:
            total, host = (max(getattr(one, part) for one in found.memory) for part in ("total", "offloaded"))
            beside = f" and {in_words(host)} off it" if host else ""
            yield f"  The least that fits: {found.arguments}, {in_words(total)} on the device{beside}"


def _footprint(backbone: Backbone, training: Training, lane: WorkerGroup) -> Footprint:
    micro_batch, remainder = divmod(training.batch, lane.workers * training.gradient_accumulation)
    if remainder or not micro_batch:
        raise ValueError(
            f"--batch {training.batch} does not divide among --workers {lane.workers} x --gradient-accumulation "
            f"{training.gradient_accumulation}: use a multiple of {lane.workers * training.gradient_accumulation}"
        )
    return footprint(
        backbone,
        method=training.method,
        trained=training.trained,
        rows=micro_batch * (2 if training.prior_weight else 1),
        resolution=training.resolution,
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_accumulation=training.gradient_accumulation,
        optimizer=training.optimizer,
        ema=training.ema_decay > 0,
        teacher=training.prior_kind == "teacher",
        compiled=training.compile,
    )


def in_words(count: int) -> str:
    """A number of bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
