"""The count of a pool's starts; it runs in a process of its own, so this module imports nothing."""


class Starts:
    """An actor that counts how often the actors of a pool are started."""

    def __init__(self, allowed: int) -> None:
        """Allow so many."""
        self._left = allowed

    def one_more(self) -> bool:
        """Whether there may be one more."""
        self._left -= 1
        return self._left >= 0
