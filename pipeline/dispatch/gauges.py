"""Gauges of the leader: current numbers of jobs, chunks, queued messages and workers."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from prometheus_client import Gauge
from sqlalchemy import Connection

from pipeline.core.jobs import JobState, Reason
from pipeline.db import collections, jobs, models, workers
from pipeline.infra import metrics

_OPEN = [state for state in JobState if not state.ended]
_SHOWN = (
    metrics.DISPATCHER_JOBS,
    metrics.DISPATCHER_JOBS_PAUSED,
    metrics.DISPATCHER_CHUNKS,
    metrics.DISPATCHER_QUEUE_MESSAGES,
    metrics.DISPATCHER_SLOTS,
    metrics.DISPATCHER_WORKERS,
    metrics.DISPATCHER_COLLECTION_KEYS,
    metrics.DISPATCHER_COLLECTION_OVERDUE,
)
#: Collections that have series of their own.
_MOST_COLLECTIONS = 1_000


def show(
    connection: Connection,
    waiting: Callable[[Sequence[str]], Mapping[str, int]],
    queue_of: Callable[[str], str],
) -> None:
    """Set the gauges from the database and the queues.

    Args:
        waiting: returns the number of waiting messages by slug, for the slugs of models.
    """
    catalogue = models.every(connection)
    _show_jobs(connection, [row["name"] for row in catalogue])
    _show_workers(connection, [row["name"] for row in catalogue])
    _show_collections(connection)
    for slug, messages in waiting([row["slug"] for row in catalogue]).items():
        metrics.DISPATCHER_QUEUE_MESSAGES.labels(queue_of(slug)).set(messages)
    _forget_others(metrics.DISPATCHER_CHUNKS, "model", {row["name"] for row in catalogue})
    _forget_others(metrics.DISPATCHER_SLOTS, "model", {row["name"] for row in catalogue})
    _forget_others(metrics.DISPATCHER_QUEUE_MESSAGES, "queue", {queue_of(row["slug"]) for row in catalogue})


def _forget_others(gauge: Gauge, label: str, kept: Collection[str]) -> None:
    """Remove a gauge's series of models that are no longer in the catalogue."""
    shown = {sample.labels[label] for found in gauge.collect() for sample in found.samples}
    for value in shown.difference(kept):
        gauge.remove_by_labels({label: value})


def clear() -> None:
    """Clear the gauges when another dispatcher leads, as their values are out of date."""
    for gauge in _SHOWN:
        gauge.clear()


def _show_jobs(connection: Connection, names: Sequence[str]) -> None:
    by_state: Counter[str] = Counter()
    by_reason: Counter[str] = Counter()
    pending: Counter[str] = Counter()
    running: Counter[str] = Counter()
    for row in jobs.open_by_state(connection):
        by_state[row["state"]] += row["jobs"]
        if row["state"] == JobState.PAUSED:
            by_reason[row["reason"]] += row["jobs"]
        elif row["state"] in (JobState.QUEUED, JobState.RUNNING):
            pending[row["model_name"]] += row["pending"]
            running[row["model_name"]] += row["running"]
    for state in _OPEN:
        metrics.DISPATCHER_JOBS.labels(state).set(by_state[state])
    for reason in Reason:
        metrics.DISPATCHER_JOBS_PAUSED.labels(reason).set(by_reason[reason])
    for name in names:
        metrics.DISPATCHER_CHUNKS.labels(name, "pending").set(pending[name])
        metrics.DISPATCHER_CHUNKS.labels(name, "running").set(running[name])


def _show_collections(connection: Connection) -> None:
    found = collections.expected(connection, _MOST_COLLECTIONS)
    for each in found:
        metrics.DISPATCHER_COLLECTION_KEYS.labels(each.view).set(each.keys)
        metrics.DISPATCHER_COLLECTION_OVERDUE.labels(each.view).set(each.overdue_seconds)
    for gauge in (metrics.DISPATCHER_COLLECTION_KEYS, metrics.DISPATCHER_COLLECTION_OVERDUE):
        _forget_others(gauge, "collection", {each.view for each in found})


def _show_workers(connection: Connection, names: Sequence[str]) -> None:
    slots: Counter[str] = Counter()
    by_state: Counter[str] = Counter()
    for worker in workers.live(connection):
        by_state["resting" if worker["resting"] else "serving"] += 1
        for name in () if worker["resting"] else set(worker["models"]) - worker["dropped"].keys():
            slots[name] += worker["slots"]
    for name in names:
        metrics.DISPATCHER_SLOTS.labels(name).set(slots[name])
    for state in ("serving", "resting"):
        metrics.DISPATCHER_WORKERS.labels(state).set(by_state[state])
