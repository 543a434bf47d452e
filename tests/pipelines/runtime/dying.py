"""An actor that dies; its module imports little, since each of its processes does it again."""

import os
from collections import Counter
from pathlib import Path


class Dies:
    """An actor whose process ends at each row, the first times that it is given one."""

    def __init__(self, notes: str, times: int) -> None:
        self._notes, self._times = Path(notes), times

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        with self._notes.open("a") as notes:
            notes.write(f"{row['number']}\n")
        if Counter(self._notes.read_text().split())[str(row["number"])] <= self._times:
            os._exit(1)
        return {"number": row["number"], "process": os.getpid()}
