"""The ways to train a small model, each a case, in process groups without Ray, by the functions that workers call."""

from __future__ import annotations

import json
import pickle
import traceback
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from dreambooth.runs import PlannedSubject, RunSpec
from dreambooth.store import SubjectStore
from pipelines.engine.engine import full_state
from pipelines.planning.options import parse
from pipelines.planning.plan import make_plan
from pipelines.runtime.console import quiet_libraries
from pipelines.stages.encode import TrainingSetEncoder
from pipelines.training.batches import Batches, joined
from pipelines.training.host_tensors import Host, HostTensors
from pipelines.training.setup import build_engine, read_base
from pipelines.training.train_step import train_step
from pipelines.training.training_set import location_of
from tests.pipelines.engines import process_group
from tests.prior_sets import undisturbed
from tests.ranks import fork_server

STEPS = 6
"""Updates of a case. One more is done after its weights are kept, so that they have a loss too."""
PRIOR_IMAGES = 2


@dataclass(frozen=True)
class Case:
    """A way to train: which backbone, what of it, and how sharded. The batch is also the number of workers."""

    family: str
    prior: bool
    with_text: bool
    batch: int
    zero_stage: int

    def __str__(self) -> str:
        """As pytest names it."""
        what = [self.family, "prior" if self.prior else "no prior", "text encoder" if self.with_text else "U-Net"]
        return ", ".join([*what, f"batch {self.batch}", f"ZeRO {self.zero_stage}"])


def prepare(case: Case, backbone: Path, photos: Path, store: Path) -> RunSpec:
    """The case's run, with its training set in the store; made in this process as Ray's actors make it."""
    arguments = ["--images", str(photos), "--class-noun", "mug", "--backbone", str(backbone), "--store", str(store)]
    arguments += ["--steps", str(STEPS + 1), "--learning-rate", "2e-3", "--workers", str(case.batch)]
    arguments += ["--batch", str(case.batch), "--zero-stage", str(case.zero_stage), "--sample-steps", "2"]
    arguments += ["--prior-images", str(PRIOR_IMAGES), "--prior-batch", "2", "--prior-steps", "2"]
    arguments += ["--prior-weight", "0.5" if case.prior else "0"]
    plan = make_plan(parse([*arguments, *(["--train-text-encoder"] if case.with_text else [])], ""))
    [planned] = plan.subjects
    run = planned.run
    plan.store.add_backbone(plan.backbone)
    if run.prior is not None and not run.prior.present(plan.store.root):
        undisturbed(plan.store, [run.prior], PRIOR_IMAGES)
    encode = TrainingSetEncoder(plan.store.root.uri)
    encode({"planned": pickle.dumps(PlannedSubject(planned.subject, run))})
    return run


def train(run: RunSpec, store: Path, folder: Path) -> None:
    """Train on this rank, and write to `folder` the terms of each step, averaged over the ranks, and the parameters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    subjects = SubjectStore(store)
    backbone = subjects.open_backbone(run.backbone)
    engine, _, _ = build_engine(run, backbone, HostTensors(Host(), lambda: read_base(run, backbone)), {}, 0, "")
    path = location_of(subjects, run).local
    assert path is not None
    batches = Batches(run, backbone, path)
    terms = []
    for step in range(STEPS + 1):
        if step == STEPS:
            state = {name: value.cpu().clone() for name, value in full_state(engine, with_moments=False)}
            if rank == 0:
                save_file(state, folder / "state.safetensors")
        measures = train_step(engine, run, backbone, batches, step)
        assert measures is not None
        dist.all_reduce(measures)
        terms.append((measures[:2] / world).tolist())
    if rank == 0:
        (folder / "terms.json").write_text(json.dumps(terms))
    dist.barrier()
    engine.destroy()


class TwoRanks:
    """A process group of two processes, which train what they are given."""

    def __init__(self, folder: Path) -> None:
        """Start them."""
        context = fork_server()
        self._work = [context.Queue() for _ in range(2)]
        self._done: Queue[str] = context.Queue()
        self._ranks = [context.Process(target=_rank, args=(r, folder, self._work[r], self._done)) for r in range(2)]
        for process in self._ranks:
            process.start()

    def train(self, run: RunSpec, store: Path, folder: Path) -> None:
        """Train in both; AssertionError, with the traceback, when one fails."""
        for work in self._work:
            work.put((run, store, folder))
        for _ in self._ranks:
            failure = self._done.get(timeout=300)
            assert not failure, failure

    def stop(self) -> None:
        """Let them end."""
        for work in self._work:
            work.put(None)
        for process in self._ranks:
            process.join(60)
            process.kill()


def _rank(rank: int, folder: Path, work: Queue[Any], done: Queue[str]) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    with process_group(folder, rank, world=2):
        while (item := work.get()) is not None:
            try:
                train(*item)
            except Exception:
                done.put(traceback.format_exc())
            else:
                done.put("")


def in_float64(run: RunSpec, store: Path, parts: dict[str, Any], steps: range) -> list[tuple[float, float]]:
    """Eq. 2's two terms at each step with the networks `parts` (float64), written out: no code of the objective's own.

    ||x̂ - x||² with weight w_t is the squared error of epsilon, or of v, as the network says it.
    """
    subjects, batch = SubjectStore(store), run.training.batch
    path = location_of(subjects, run).local
    assert path is not None
    backbone = subjects.open_backbone(run.backbone)
    scheduler = DDPMScheduler.from_pretrained(backbone.folder, subfolder="scheduler")
    batches, terms = Batches(run, backbone, path), []
    for halves in (batches.rows(step, range(batch)) for step in steps):
        rows = joined(halves)
        signal = (1 - scheduler.betas.double()).cumprod(0)[rows.t].view(-1, 1, 1, 1)
        x, epsilon = rows.x.double(), rows.epsilon.double()
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * epsilon
        v = signal.sqrt() * epsilon - (1 - signal).sqrt() * x
        target = {"epsilon": epsilon, "v_prediction": v}[scheduler.config.prediction_type]
        conditioning = {name: value.double() for name, value in rows.conditioning.items()}
        with torch.no_grad():
            if rows.ids:
                conditioning |= backbone.text.encode(parts, rows.ids)
            added = {name: conditioning[name] for name in ("text_embeds", "time_ids") if name in conditioning}
            text = conditioning["encoder_hidden_states"]
            said = parts["unet"](noisy, rows.t, encoder_hidden_states=text, added_cond_kwargs=added or None).sample
        error = (said[:, : x.shape[1]] - target).square().flatten(1).mean(1)
        terms.append((error[:batch].mean().item(), error[batch:].mean().item() if run.prior else 0.0))
    return terms
