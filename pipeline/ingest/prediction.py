"""Prediction of a job's time, size and cost, from counts of its items and tokens and from measured rates. Pure."""

import enum
from dataclasses import dataclass

from pipeline.db.usage import ChunkWork

#: Time that a job waits in all for the dispatcher, which publishes chunks and ends jobs every quarter of a second.
_DISPATCH_SECONDS = 0.3
#: Time of a slot between two chunks, for their messages. What is measured here has it already: on a CPU that the slots
#: share, the others are faster meanwhile.
_MESSAGE_SECONDS = 0.07
#: Least work of workers from which rates are told, and that of work half as large as the job.
_LEAST_SECONDS, _LEAST_OF_A_JOB_SECONDS = 30.0, 3.0
#: The planner's last chunks are an eighth of a full one.
_SHARE_OF_LAST_CHUNK = 1 / 8


class Measured(enum.StrEnum):
    """Origin of the rates of a prediction."""

    #: From the chunks that workers have done lately.
    WORKERS = "workers"
    #: By embedding and writing a sample here.
    HERE = "here"
    #: The catalogue's rate; writing was measured here.
    CATALOGUE = "catalogue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds of a slot for a token and for an item, and how they were measured."""

    #: Tokenising and forward passes.
    token_seconds: float
    #: Reading and writing.
    vector_seconds: float
    measured: Measured
    #: Time for which it was measured: of slots if by workers, else by the clock.
    seconds: float = 0.0
    #: Device on which it was measured here.
    device: str = ""
    #: Loading the model, if the workers haven't used it lately.
    load_seconds: float = 0.0


def is_enough(work: ChunkWork, items: int) -> bool:
    """Return True if workers' work tells the rates of a job of so many items."""
    least = _LEAST_OF_A_JOB_SECONDS if work.vectors >= items / 2 else _LEAST_SECONDS
    return work.tokens > 0 and work.slot_seconds >= least


def workers_rates(work: ChunkWork, tokenise_seconds: float, vector_seconds: float) -> Rates:
    """Return the rates at which workers did this work.

    Their device seconds don't include tokenising. The time beside them is divided as reading a token and writing a
    vector are related where nothing disturbs them, in `tokenise_seconds` and `vector_seconds`.
    """
    # Requests to an upstream overlap.
    device = min(work.device_seconds, work.slot_seconds)
    tokenising, writing = tokenise_seconds * work.tokens, vector_seconds * work.vectors
    embedding = device + (work.slot_seconds - device) * tokenising / (tokenising + writing)
    return Rates(
        token_seconds=embedding / work.tokens,
        vector_seconds=(work.slot_seconds - embedding + work.chunks * _MESSAGE_SECONDS) / work.vectors,
        measured=Measured.WORKERS,
        seconds=work.slot_seconds,
    )


def catalogue_rates(tokens_per_second: float, vector_seconds: float) -> Rates:
    """Return the catalogue's rate, and that at which vectors were written here."""
    return Rates(token_seconds=1 / tokens_per_second, vector_seconds=vector_seconds, measured=Measured.CATALOGUE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """Cost of one row."""

    seconds: float
    wal_bytes: float
    #: In Postgres, with its share of the index and of unfilled pages.
    disk_bytes: float
    parquet_bytes: float = 0.0


NO_ROW = RowCost(seconds=0.0, wal_bytes=0.0, disk_bytes=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Counts of a job, and where it would run."""

    items: int
    #: Vectors that would be written.
    vectors: int
    tokens: float
    #: Time to read the corpus once, or by reference to locate its rows.
    reading_seconds: float
    #: Slots that would work on it, at least one, and the devices that they share.
    slots: int
    devices: int
    #: Limits of a chunk.
    chunk_items: int
    chunk_tokens: int
    #: Price of a million tokens; `None`: the model has no price.
    price_per_million: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Parts of a job's time, size and cost. The seconds add up to the time from submission to end."""

    submit_seconds: float
    #: Wait for the dispatcher, and for the model to be loaded.
    start_seconds: float
    embed_seconds: float
    write_seconds: float
    wal_bytes: float
    disk_bytes: float
    #: `None`: the model has no price.
    cost: float | None
    #: Time of embedding and writing, on every device.
    device_hours: float

    @property
    def seconds(self) -> float:
        """Time from submission to the job's end."""
        return self.submit_seconds + self.start_seconds + self.embed_seconds + self.write_seconds


def predict(load: Load, rates: Rates, item: RowCost, vector: RowCost) -> Pieces:
    """Predict a job: `item` is the cost of staging one item, `vector` that of writing one vector."""
    embed = load.tokens * rates.token_seconds
    write = load.vectors * rates.vector_seconds
    working = _elapsed(load, embed + write)
    share = embed / (embed + write) if embed + write else 0.0
    return Pieces(
        submit_seconds=load.reading_seconds + load.items * item.seconds,
        start_seconds=_DISPATCH_SECONDS + rates.load_seconds,
        embed_seconds=working * share,
        write_seconds=working * (1 - share),
        wal_bytes=load.items * item.wal_bytes + load.vectors * vector.wal_bytes,
        disk_bytes=load.items * item.disk_bytes + load.vectors * (vector.disk_bytes + vector.parquet_bytes),
        cost=None if load.price_per_million is None else load.price_per_million * load.tokens / 1_000_000,
        device_hours=working * load.devices / 3_600,
    )


def _elapsed(load: Load, slot_seconds: float) -> float:
    """Return the time in which the slots do this work. They take a chunk each, so the last chunks decide when it ends;
    a job smaller than a chunk has one slot."""
    full = max(load.items / load.chunk_items, load.tokens / load.chunk_tokens)
    last = min(slot_seconds, slot_seconds / full * _SHARE_OF_LAST_CHUNK) if full else 0.0
    if slot_seconds <= last * load.slots:
        return last
    # Slots end at any moment within the last chunk, and all but one are idle for half of it.
    return (slot_seconds + last * (load.slots - 1) / 2) / load.slots
