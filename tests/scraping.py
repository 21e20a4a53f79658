"""Metrics as one that scrapes sees them, and the metrics that a query asks for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

from pipeline import metrics

#: What a scraper adds to every series.
ADDED = frozenset({"job", "instance"})
_PARTS = {"counter": ("",), "gauge": ("",), "summary": ("_sum", "_count"), "histogram": ("_bucket", "_sum", "_count")}


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a page."""

    name: str
    labels: Mapping[str, str]
    value: float


def scrape(url: str) -> list[Sample]:
    """All samples of a page."""
    reply = httpx.get(url, timeout=30)
    assert reply.status_code == 200, reply.text
    families = text_string_to_metric_families(reply.text)
    return [Sample(one.name, one.labels, one.value) for family in families for one in family.samples]


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """The sum of the series of this name with these labels."""
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def series() -> dict[str, metrics.Metric]:
    """The list, by the names of the series that come of it."""
    return {each.name + part: each for each in metrics.EVERY for part in _PARTS[each.kind]}


def asked_for(query: str) -> Iterator[tuple[str, set[str]]]:
    """The series of ours in a query, each with the labels that it is selected by."""
    for name, _, selector in re.findall(r"\b(vectormill_\w+)(\{([^}]*)\})?", query):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))


def grouped_by(query: str) -> set[str]:
    """The labels that a query groups or matches by."""
    lists = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", query)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}
