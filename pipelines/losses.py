"""The losses on their way from the workers to the driver. A module of its own: its actor need not import torch."""


class LossLog:
    """An actor that holds the losses of finished steps until the driver takes them."""

    def __init__(self) -> None:
        """Start empty."""
        self._points: list[tuple[int, float, float]] = []

    def add(self, first: int, rows: list[list[float]]) -> None:
        """Add the (instance, prior) losses of consecutive steps from `first` on."""
        self._points += [(step, *row) for step, row in enumerate(rows, start=first)]  # type: ignore[misc]

    def take(self) -> list[tuple[int, float, float]]:
        """The (step, instance, prior) points that came since the last call."""
        points, self._points = self._points, []
        return points
