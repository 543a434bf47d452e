"""Processes of Ray that a test may look at or kill."""

from __future__ import annotations

import psutil


def processes(name: str) -> list[psutil.Process]:
    """This test's own Ray processes whose title holds `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
