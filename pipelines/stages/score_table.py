"""The scores of versions as a table: a line each, the photos' own, and means over subjects that were made alike."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth.methods import METHODS
from dreambooth.metrics.scores import SCORES
from pipelines.stages.score import Scored

_LOWER_IS_BETTER = "PRES"


def kind_of(training: Mapping[str, Any]) -> str:
    """How a version was made, as far as the paper's tables tell versions apart."""
    method = METHODS.get(training["method"])
    return method.label(training) if method else f"{training['method']}, {training['steps']} steps"


def score_rows(scored: Sequence[Scored], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a version, one of real photos a subject, and where there are several subjects the means of each kind."""
    rows: list[dict[str, Any]] = []
    groups: dict[str, list[Mapping[str, float]]] = {}
    seen: set[str] = set()
    for one in scored:
        record = one.record
        if one.subject not in seen:
            seen.add(one.subject)
            rows.append({"of": one.subject, "kind": "real photos", **record["photos_with_each_other"]})
            groups.setdefault("real photos", []).append(record["photos_with_each_other"])
        kind = kind_of(record["run"]["training"])
        rows.append({"of": f"{one.subject}@{one.version}", "kind": kind, **record["scores"]})
        groups.setdefault(kind, []).append(record["scores"])
    if len(seen) > 1:
        rows += [
            {"of": f"mean of {len(group)}", "kind": kind, **_means(group, names)} for kind, group in groups.items()
        ]
    return rows


def _means(group: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> dict[str, float]:
    known = {name: [scores[name] for scores in group if name in scores] for name in names.values()}
    return {name: fmean(values) for name, values in known.items() if values}


def score_table(scored: Sequence[Scored], names: Mapping[str, str]) -> list[str]:
    """The lines of the table; none without scores."""
    rows = score_rows(scored, names)
    if not rows:
        return []
    titles = [names[name] + (" (lower is better)" if name == _LOWER_IS_BETTER else "") for name in SCORES]
    cells = [["", "", *titles]]
    for row in rows:
        values = [row.get(names[name]) for name in SCORES]
        cells.append([row["of"], row["kind"], *("-" if value is None else f"{value:.3f}" for value in values)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def write_csv(path: str | Path, scored: Sequence[Scored], names: Mapping[str, str]) -> None:
    """The table as a CSV file."""
    with Path(path).expanduser().open("w", newline="") as file:
        writer = csv.DictWriter(file, ["of", "kind", *names.values()], restval="")
        writer.writeheader()
        writer.writerows(score_rows(scored, names))
