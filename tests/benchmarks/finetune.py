"""How fast fine-tuning is, as ratios within one run.

    python -m tests.benchmarks.finetune steps    # embedded backbone, one worker: our step against plain loops
    python -m tests.benchmarks.finetune steps --images PHOTOS --class-noun NOUN    # photos of the size that people have
    python -m tests.benchmarks.finetune lanes    # start-up of a lane's second subject against its first

Other work on the machine disturbs all sides of a ratio; each is the median of several rounds, taken in turn.
"""

from __future__ import annotations

from pipelines.runtime.console import quiet_libraries

quiet_libraries()

import argparse  # noqa: E402
import pickle  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import ray  # noqa: E402
import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from dreambooth.backbones import Backbone  # noqa: E402
from dreambooth.common.images import read_image  # noqa: E402
from dreambooth.runs import PlannedSubject  # noqa: E402
from dreambooth.sampling.sampler import to_pixels  # noqa: E402
from dreambooth.store import SubjectStore  # noqa: E402
from dreambooth.subjects.crops import centre_view  # noqa: E402
from pipelines.planning.options import parse  # noqa: E402
from pipelines.planning.plan import Plan, make_plan  # noqa: E402
from pipelines.runtime.console import Display  # noqa: E402
from pipelines.stages.encode import TrainingSetEncoder  # noqa: E402
from pipelines.stages.finetune import finetune  # noqa: E402
from pipelines.training.batches import Batches  # noqa: E402
from pipelines.training.setup import build_engine, read_base  # noqa: E402
from pipelines.training.train_step import train_step  # noqa: E402
from pipelines.training.training_set import location_of  # noqa: E402
from tests.pipelines.engines import process_group  # noqa: E402
from tests.prior_sets import undisturbed  # noqa: E402

PRIOR_IMAGES = 8


def prepare(store: str, *options: str) -> Plan:
    """A plan for the sample subject on the embedded backbone, with its training set in the store."""
    arguments = ["--store", store, "--prior-images", str(PRIOR_IMAGES), "--prior-batch", "4", "--prior-steps", "2"]
    plan = make_plan(parse([*arguments, *options], ""))
    [planned] = plan.subjects
    assert planned.run.prior is not None
    plan.store.add_backbone(plan.backbone)
    undisturbed(plan.store, [planned.run.prior], PRIOR_IMAGES)
    TrainingSetEncoder(plan.store.root.uri)({"planned": pickle.dumps(planned)})
    return plan


class PlainLoop:
    """The loop that people write: torch's AdamW, clipping, noise from torch's generator."""

    def __init__(self, backbone: Backbone, planned: PlannedSubject) -> None:
        """Load the U-Net, train all of it."""
        self.backbone, self.run = backbone, planned.run
        self.unet = backbone.load(backbone.denoiser)
        training = planned.run.training
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )

    def step(self, x: Tensor, conditioning: dict[str, Tensor]) -> None:
        """One update on latents and conditioning, photos before class-prior images."""
        schedule, half = self.backbone.objective, len(x) // 2
        epsilon, t = torch.randn_like(x), torch.randint(schedule.steps, (len(x),))
        target = schedule.target(x, epsilon, t)
        said = self.backbone.predict(self.unet, schedule.add_noise(x, epsilon, t), t, conditioning)
        loss = F.mse_loss(said[:half], target[:half])
        loss = loss + self.run.training.prior_weight * F.mse_loss(said[half:], target[half:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.run.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def cached_step(backbone: Backbone, planned: PlannedSubject, batches: Batches) -> Callable[[int], None]:
    """A plain loop over tensors that are in memory already."""
    loop, half = PlainLoop(backbone, planned), batches.rows(0, range(planned.run.training.batch))
    x = torch.cat([rows.x for rows in half])
    conditioning = {name: torch.cat([rows.conditioning[name] for rows in half]) for name in half[0].conditioning}
    return lambda _: loop.step(x, conditioning)


def uncached_step(store: SubjectStore, backbone: Backbone, planned: PlannedSubject) -> Callable[[int], None]:
    """A plain loop that decodes and encodes photos, class-prior images and prompts in every step."""
    loop, run = PlainLoop(backbone, planned), planned.run
    assert run.prior is not None
    names = (*backbone.image_encoders, *backbone.text_encoders)
    encoders: dict[str, Any] = {name: backbone.load(name) for name in names}
    photos = [photo.data for photo in planned.subject.images]
    priors = [row["png"] for row in run.prior.rows(store.root, PRIOR_IMAGES, ["png"])]
    side, size = run.training.resolution, run.training.batch

    @torch.no_grad()
    def encoded(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        files = [kind[(step * size + row) % len(kind)] for kind in (photos, priors) for row in range(size)]
        images = [read_image(file, "image") for file in files]
        squares = [centre_view((image.height, image.width), (side, side)).show(image) for image in images]
        mean, log_variance = backbone.latents.encode(encoders, to_pixels(squares))
        x = backbone.latents.scale(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        prompts = [run.instance_prompt] * size + [run.class_prompt] * size
        sizes = backbone.size_conditioning((side, side), (0, 0), (side, side))
        conditioning = {name: value.expand(len(x), *value.shape) for name, value in sizes.items()}
        return x, conditioning | backbone.text.encode(encoders, backbone.text.tokenize(prompts))

    return lambda step: loop.step(*encoded(step))


def steps(rounds: int, count: int, *options: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, process_group(Path(folder)):
        plan = prepare(f"{folder}/store", "--workers", "1", *options)
        [planned] = plan.subjects
        run, backbone = planned.run, plan.store.open_backbone(planned.run.backbone)
        path = location_of(plan.store, run).local
        assert path is not None
        batches = Batches(run, backbone, path)
        engine, _, _ = build_engine(run, backbone, read_base(run, backbone), {}, 0, "")
        kinds: dict[str, Callable[[int], Any]] = {
            "ours": lambda step: train_step(engine, run, backbone, batches, step),
            "plain, cached": cached_step(backbone, planned, batches),
            "plain, not cached": uncached_step(plan.store, backbone, planned),
        }
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds + 1):
            for kind, step in kinds.items():
                began = time.perf_counter()
                for offset in range(count):
                    step(number * count + offset)
                taken[kind].append((time.perf_counter() - began) / count)
    taken = {kind: times[1:] for kind, times in taken.items()}  # the first round warms up
    for kind, times in taken.items():
        print(f"{kind:18} {' '.join(f'{1000 * seconds:7.1f}' for seconds in times)}  ms a step")

    def ratio(to: str) -> float:
        return statistics.median(a / b for a, b in zip(taken["ours"], taken[to], strict=True))

    print(f"{'ours / plain loop over cached tensors':44} {ratio('plain, cached'):6.3f}  wanted <= 1.05")
    print(f"{'ours / plain loop that encodes in every step':44} {ratio('plain, not cached'):6.3f}  wanted <= 0.6")


def lanes(rounds: int) -> None:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    ratios = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            plan = prepare(folder, "--workers", "2", "--steps", "20")
            [planned] = plan.subjects
            runs = [replace(planned.run, sample_prompts=(str(number),)) for number in range(2)]
            for run in runs:
                location_of(plan.store, run).write_bytes(location_of(plan.store, planned.run).read_bytes())
            began = time.time()
            assert finetune(plan.store, runs, 20, Display(), lanes=1) == {}
            first, second = (_times(Path(folder) / "runs" / run.key / "tensorboard") for run in runs)
            # Steps are seen in fives: what a further five take is not start-up.
            five = (first[-1] - first[0]) / 3
            cold, warm = first[0] - began - five, second[0] - first[-1] - five
            print(f"from nothing {cold:6.1f} s, in a warm lane {warm:6.1f} s")
            ratios.append(warm / cold)
    ray.shutdown()
    print(f"{'start-up of the second subject / the first':44} {statistics.median(ratios):6.3f}  wanted <= 0.2")


def _times(events: Path) -> list[float]:
    """When the driver saw steps, in seconds, to half a second."""
    points = EventAccumulator(str(events)).Reload().Scalars("loss/instance")
    return [point.wall_time for point in points][4::5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "lanes"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10, help="steps a round")
    parser.add_argument("--images", help="photos to train on instead of the sample subject's, 64 px wide")
    parser.add_argument("--class-noun", help="what they show")
    arguments = parser.parse_args()
    if arguments.what == "steps":
        subject = ("--images", arguments.images, "--class-noun", arguments.class_noun) if arguments.images else ()
        steps(arguments.rounds, arguments.count, *subject)
    else:
        lanes(arguments.rounds)


if __name__ == "__main__":
    main()
