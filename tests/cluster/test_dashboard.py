"""The Grafana dashboard asks for what the application exports, under the names that Ray gives it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from serve import metrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana_serving.json"
RAYS_LABELS = {"deployment", "replica", "application", "le"}  # none of them grows with the number of subjects


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def names(query: str) -> set[str]:
    """The metrics that a query reads."""
    return set(re.findall(r"\bray_\w+", query))


def labels(query: str) -> set[str]:
    """The labels that a query selects or groups by."""
    selected = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query)
    grouped = [name.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for name in group.split(",")]
    return {*selected, *grouped}


def exported() -> dict[str, set[str]]:
    """The labels of each metric of serve/metrics.py, by the names under which Prometheus finds it."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, ray_metrics.Metric):
            own, name = set(metric.info["tag_keys"]), f"ray_{metric.info['name']}"
            endings = {ray_metrics.Counter: ["_total"], ray_metrics.Histogram: ["_bucket", "_sum", "_count"]}
            kinds = [kind for kind in endings if isinstance(metric, kind)]
            for ending in endings[kinds[0]] if kinds else [""]:
                found[name + ending] = own
    return found


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def test_every_metric_and_label_of_a_query_is_exported(dashboard: dict[str, Any]) -> None:
    known = exported()
    assert len(queries(dashboard)) >= 12
    for query in queries(dashboard):
        assert names(query), query
        for name in names(query):
            assert name in known, query
            assert labels(query) <= known[name] | RAYS_LABELS, query


def test_every_metric_is_shown(dashboard: dict[str, Any]) -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for query in queries(dashboard) for name in names(query)}
    assert shown == {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}


def test_no_label_grows_with_subjects_keys_or_requests() -> None:
    assert {label for own in exported().values() for label in own} == {
        *("deployment", "replica", "stage", "tier", "status")
    }


def test_queries_are_balanced_and_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        assert all(query.count(left) == query.count(right) for left, right in ["()", "{}", "[]"]), query
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${datasource}"}
