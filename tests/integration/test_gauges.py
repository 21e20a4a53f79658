"""Dispatcher's gauges of models that are added and removed."""

from collections.abc import Mapping, Sequence

from sqlalchemy import Engine

from pipeline.broker import queue_of
from pipeline.dispatch import gauges
from pipeline.infra import metrics
from tests.support.jobs_made import make_model, run_sql

_OF_MODELS = (metrics.DISPATCHER_CHUNKS, metrics.DISPATCHER_SLOTS, metrics.DISPATCHER_QUEUE_MESSAGES)


def _waiting(slugs: Sequence[str]) -> Mapping[str, int]:
    return dict.fromkeys(slugs, 1)


def _shown(engine: Engine) -> set[str]:
    """Return the values of the model and queue labels that the gauges show."""
    with engine.begin() as connection:
        gauges.show(connection, _waiting, queue_of)
    samples = [sample for gauge in _OF_MODELS for found in gauge.collect() for sample in found.samples]
    return {value for sample in samples for name, value in sample.labels.items() if name in ("model", "queue")}


def test_a_model_that_is_removed_is_shown_no_longer(engine: Engine) -> None:
    gauges.clear()
    for name in ("stays", "goes"):
        make_model(engine, name)
    assert _shown(engine) == {"stays", "goes", "embed.stays", "embed.goes"}
    run_sql(engine, "delete from vectormill.models where name = 'goes'")
    assert _shown(engine) == {"stays", "embed.stays"}
    gauges.clear()
