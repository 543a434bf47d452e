"""What is seen of the training, on its way to the driver. A module of its own: its actor need not import torch."""


class TrainingLog:
    """An actor that holds the measures of finished steps until the driver takes them."""

    def __init__(self) -> None:
        """Start empty."""
        self._points: list[tuple[int, dict[str, float]]] = []

    def add(self, first: int, rows: list[dict[str, float]]) -> None:
        """Add the measures of consecutive steps from `first` on, by their names in TensorBoard."""
        self._points += enumerate(rows, start=first)

    def take(self) -> list[tuple[int, dict[str, float]]]:
        """The steps and measures that came since the last call."""
        points, self._points = self._points, []
        return points
