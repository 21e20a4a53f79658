"""Rates of models by kind of device: tokens per second of one slot, as measured or else as estimated."""

from collections.abc import Mapping

from sqlalchemy import Connection

from pipeline.core.models import Model
from pipeline.core.options import Precision
from pipeline.db import models, workers

#: Rate of a CUDA device, in a CPU's, for a model that was measured on CPUs only. It decides the first chunks on such a
#: device: if it is too high, they take longer than they should, and bounds in items and bytes hold all the same; if it
#: were the CPU's, they would be so small that the device waited for claims and commits.
CUDA_PER_CPU = 100


def slot_rates(connection: Connection, model: Model, precision: Precision) -> dict[str, float]:
    """Return the rate of a slot on each kind of device that would work on a job of this precision.

    These are the kinds of the live workers that offer the model; without one, the kind on which it was measured last.
    An upstream has one rate, whatever its workers run on.
    """
    kinds = workers.kinds_serving(connection, model.name)
    if model.upstream:
        return dict.fromkeys(kinds or ["upstream"], model.tokens_per_second)
    measured = models.rates(connection, model.name, precision)
    kinds = kinds or list(measured)[:1] or ["cpu"]
    return {kind: rate_on(kind, measured, model.tokens_per_second) for kind in kinds}


def least_rate(connection: Connection, model: Model, precision: Precision, kind: str) -> float:
    """Return a rate that a local model surely has on a kind of device: the measured one, or else the lower one of what
    is estimated and what was measured when the model was added, perhaps on another kind."""
    measured = models.rates(connection, model.name, precision)
    estimated = rate_on(kind, measured, model.tokens_per_second)
    return estimated if kind in measured else min(estimated, model.tokens_per_second)


def rate_on(kind: str, measured: Mapping[str, float], added: float) -> float:
    """Return a model's rate on a kind of device: the measured one, or one that is estimated from other kinds'.

    Args:
        kind: the kind of device.
        measured: rates by kind.
        added: the rate from when the model was added, for one that nothing else is known of; it counts as a CPU's.
    """
    if kind in measured:
        return measured[kind]
    on_cuda = min((rate for other, rate in measured.items() if _is_cuda(other)), default=None)
    on_cpu = measured.get("cpu") or (on_cuda / CUDA_PER_CPU if on_cuda else added)
    if _is_cuda(kind):
        return on_cuda or on_cpu * CUDA_PER_CPU
    return on_cpu


def _is_cuda(kind: str) -> bool:
    return kind not in ("cpu", "mps")
