"""What lanes share: who trains which run, and what is seen of it. Actors of a module that needs no torch."""

from __future__ import annotations

from collections import Counter, deque

TRIES = 3
"""How often a run is tried: one whose workers fail each time has failed, and its lane continues with the next."""


class LaneQueue:
    """An actor that hands out runs, by number, to lanes.

    Workers that are started again in another number, because nodes have come, continue the lane's run: no failure.
    """

    def __init__(self, count: int) -> None:
        """Begin with all of `count` runs waiting."""
        self._waiting = deque(range(count))
        self._held: dict[int, int] = {}
        self._preempted: set[int] = set()
        self._failures: Counter[int] = Counter()
        self._failures_before_a_run: Counter[int] = Counter()
        self._errors: dict[int, str] = {}
        self._outcomes: dict[int, str | None] = {}

    def take(self, lane: int) -> int | None:
        """The run that the lane is to train: when its workers are new, the one that it was at. None at the end."""
        self._failures_before_a_run[lane] = 0
        self._preempted.discard(lane)
        run = self._held.get(lane)
        if run is not None and self._failures[run] >= TRIES:
            why = self._errors.get(lane, "killed; the logs of the Ray workers may say why")
            self.finish(lane, f"its workers failed {TRIES} times, the last time so: {why}")
            run = None
        if run is None and self._waiting:
            run = self._held[lane] = self._waiting.popleft()
        return run

    def failing(self, lane: int, error: str) -> None:
        """Note what a worker of the lane fails by, which ends all of them."""
        self._errors[lane] = error

    def failed(self, lane: int) -> bool:
        """Note that workers of the lane have died or failed; tells whether it is worth while to begin new ones."""
        run = self._held.get(lane)
        if run is None:
            self._failures_before_a_run[lane] += 1
            return self._failures_before_a_run[lane] < TRIES
        self._failures[run] += lane not in self._preempted
        return True

    def mark_preempted(self, lane: int) -> None:
        """Note that the lane's workers are going to be taken away, which is no failure of the run that it is at.

        It holds until new ones take the run up: Ray tells of workers on a drained node until the last has ended.
        """
        self._preempted.add(lane)

    def finish(self, lane: int, failure: str | None = None) -> None:
        """Note that the lane's run is trained, or why it is not."""
        self._outcomes[self._held.pop(lane)] = failure

    def outcomes(self) -> dict[int, str | None]:
        """For each run that has ended, None, or why it is not trained."""
        return self._outcomes


class TrainingLog:
    """An actor that holds the measures of finished steps until the driver takes them."""

    def __init__(self) -> None:
        """Start empty."""
        self._points: list[tuple[int, int, dict[str, float]]] = []

    def add(self, run: int, first: int, rows: list[dict[str, float]]) -> None:
        """Add the measures of consecutive steps of a run from `first` on, by their names in TensorBoard."""
        self._points += [(run, step, row) for step, row in enumerate(rows, start=first)]

    def take(self) -> list[tuple[int, int, dict[str, float]]]:
        """Runs, steps and measures that came since the last call."""
        points, self._points = self._points, []
        return points
