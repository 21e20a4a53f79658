"""Metrics as a scraper sees them, and the metrics that a query selects."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeline.infra import metrics

_OPS = Path(__file__).resolve().parents[2] / "ops"
#: Labels that a scraper adds to every series.
ADDED = frozenset({"job", "instance"})
_PARTS = {"counter": ("",), "gauge": ("",), "summary": ("_sum", "_count"), "histogram": ("_bucket", "_sum", "_count")}


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a metrics page."""

    name: str
    labels: Mapping[str, str]
    value: float


def scrape(url: str) -> list[Sample]:
    """Return all samples of a metrics page."""
    reply = httpx.get(url, timeout=30)
    assert reply.status_code == 200, reply.text
    families = text_string_to_metric_families(reply.text)
    return [Sample(one.name, one.labels, one.value) for family in families for one in family.samples]


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """Return the sum of the series of this name with these labels."""
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def series() -> dict[str, metrics.Metric]:
    """Return the project's metrics by the names of the series that they produce."""
    return {each.name + part: each for each in metrics.EVERY for part in _PARTS[each.kind]}


def asked_for(query: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the project's series in a query, each with the labels that select it."""
    for name, _, selector in re.findall(r"\b(vectormill_\w+)(\{([^}]*)\})?", query):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))


def grouped_by(query: str) -> set[str]:
    """Return the labels that a query groups or matches by."""
    lists = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", query)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}


def rule_queries() -> Iterator[tuple[str, str]]:
    """Yield the name and the query of each rule."""
    for group in yaml.safe_load((_OPS / "prometheus" / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]


def panels() -> list[dict[str, Any]]:
    """Return the panels of the Grafana dashboard, rows included."""
    found: list[dict[str, Any]] = json.loads((_OPS / "grafana" / "dashboards" / "vectormill.json").read_text())[
        "panels"
    ]
    return found


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield each query of the dashboard's panels, after its panel's title."""
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$model", ".*")
