"""Measurement of a model on a sample of a corpus: as many processes as this machine has slots read, embed and write it
at once, as workers would, since they share its cores with each other and perhaps with Postgres."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing import get_context
from threading import Barrier, BrokenBarrierError
from time import perf_counter
from typing import Any

from pipeline.chunk_io.rehearsal import Rehearsal, rehearsing
from pipeline.core.models import Model
from pipeline.core.options import KeptOptions
from pipeline.db import items
from pipeline.db.database import make_engine
from pipeline.infra.settings import MODELS_SHARE, ROOM_FACTOR
from workers.encoders.batching import Encoder, entitled, split_rule
from workers.encoders.devices import list_devices
from workers.encoders.model_cache import Loader
from workers.runner.slice_encoding import SliceEncoding
from workers.watchdog import Watch

#: Time for which a slice of the sample is embedded; each slot embeds several.
_SLICE_SECONDS = 2.0
#: Rows by which the size of a slice is found.
_FEW_ROWS = 8
#: A smaller sample is repeated, since a few texts are embedded less efficiently than many.
_LEAST_ROWS = 2_000

#: Fields of a plan that the caller gives.
_AS_ASKED = ("replicas", "seconds", "database_url", "dimensions", "max_item_tokens", "rows")

#: Key, text, carried columns as JSON, and title.
Row = tuple[str | None, str, str | None, str]

_barrier: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Measurement that is asked for, and the slots it is made on."""

    model: Model
    device: str
    #: Slots that work at once, and those of one worker, which have a share of the cores each.
    slots: int
    replicas: int
    seconds: float
    database_url: str
    options: KeptOptions
    dimensions: int
    max_item_tokens: int | None
    rows: Sequence[Row]


@dataclass(slots=True)
class _Done:
    """Work of one slot, in seconds of it."""

    load_seconds: float = 0.0
    vectors: int = 0
    tokens: int = 0
    embed_seconds: float = 0.0
    write_seconds: float = 0.0


def measure(asked: dict[str, Any], model: Model) -> dict[str, Any]:
    """Measure a model for about `seconds`. Return each text's tokens, and a slot's seconds for a token and an item.

    Raises:
        ModelError: the model isn't the one that was added to the catalogue.
    """
    device, memory_bytes, _ = list_devices()[0]
    fitting = int(memory_bytes * MODELS_SHARE) // max(1, model.weights_bytes * ROOM_FACTOR)
    plan = Plan(
        model=model,
        device=device,
        options=KeptOptions.from_json(asked["options"]),
        slots=max(1, min(asked["slots"], fitting)),
        **{name: asked[name] for name in _AS_ASKED},
    )
    # Forked from a process that has imported torch and opened no device, as a worker's children are.
    context = get_context("spawn" if sys.platform == "darwin" else "forkserver")
    if sys.platform != "darwin":
        context.set_forkserver_preload(["workers.encoders.local", "workers.measuring"])
    barrier = context.Barrier(plan.slots)
    with ProcessPoolExecutor(plan.slots, context, initializer=_keep, initargs=(barrier,)) as pool:
        running = [pool.submit(_run, plan, number) for number in range(plan.slots)]
        failures = [error for each in running if (error := each.exception())]
        if failures:  # those that waited for the one that failed tell nothing
            raise next((each for each in failures if not isinstance(each, BrokenBarrierError)), failures[0])
        done, counted = zip(*(each.result() for each in running), strict=True)
    tokens, vectors = sum(each.tokens for each in done), sum(each.vectors for each in done)
    return {
        "tokens": counted[0],
        "device": device,
        "token_seconds": sum(each.embed_seconds for each in done) / max(1, tokens),
        "vector_seconds": sum(each.write_seconds for each in done) / max(1, vectors),
        "load_seconds": max(each.load_seconds for each in done),
        "seconds": max(each.embed_seconds + each.write_seconds for each in done),
    }


def count(
    encoder: Encoder, texts: Sequence[str], titles: Sequence[str], options: KeptOptions, max_item_tokens: int | None
) -> dict[str, Any]:
    """Return the tokens of each text, or passage, as the model reads it, whether it was truncated, the tokens that this
    lost, and where texts are split the spans of each one's passages."""
    spans = None
    if options.splits:
        spans = encoder.split(texts, titles, split_rule(options, max_item_tokens))
        of_each = zip(texts, titles, spans, strict=True)
        texts = [entitled(title, text[start:stop]) for text, title, parts in of_each for start, stop in parts]
    read = encoder.tokenise(texts, max_item_tokens)
    lost = [0] * len(texts) if read.lost is None else read.lost.tolist()
    return {"lengths": read.lengths.tolist(), "truncated": read.truncated.tolist(), "lost": lost, "spans": spans}


def _keep(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run(plan: Plan, number: int) -> tuple[_Done, dict[str, Any]]:
    """Measure in slot `number`; return its work, and of the first one what `count` returns of the sample."""
    try:
        return _measured(plan, number)
    except BaseException:
        _barrier.abort()  # nobody waits for this one
        raise


def _measured(plan: Plan, number: int) -> tuple[_Done, dict[str, Any]]:
    done, began = _Done(), perf_counter()
    threads = max(1, (os.cpu_count() or 1) // plan.replicas) if plan.device == "cpu" else None
    encoder = Loader(plan.device, threads, "auto").load(plan.model, plan.options.precision)
    encoder.prove(plan.model.canary)
    done.load_seconds = perf_counter() - began
    counted = {}
    if number == 0:
        texts, titles = [text for _, text, _, _ in plan.rows], [title for *_, title in plan.rows]
        counted = count(encoder, texts, titles, plan.options, plan.max_item_tokens)
    rows = list(islice(cycle(plan.rows), max(_LEAST_ROWS, len(plan.rows))))
    engine = make_engine(plan.database_url, application="vectormill-cli", pool_size=1)
    with rehearsing(
        engine,
        plan.options,
        model=plan.model.name,
        dimensions=plan.dimensions,
        max_item_tokens=plan.max_item_tokens,
    ) as rehearsal:
        _stage(rehearsal, rows)
        first = number * len(rows) // plan.slots
        _embed(encoder, rehearsal, _Done(), first, _FEW_ROWS, 0)  # the first pass allocates
        few = _Done()
        _embed(encoder, rehearsal, few, first, _FEW_ROWS, _FEW_ROWS)
        size = max(1, min(_LEAST_ROWS, int(_SLICE_SECONDS * _FEW_ROWS / (few.embed_seconds + few.write_seconds))))
        _barrier.wait()
        until, index = perf_counter() + plan.seconds, len(rows)
        while perf_counter() < until:
            first %= len(rows)
            some = min(size, len(rows) - first)
            _embed(encoder, rehearsal, done, first, some, index)
            first, index = first + some, index + some
    engine.dispose()
    return done, counted


def _stage(rehearsal: Rehearsal, rows: Sequence[Row]) -> None:
    carries = rehearsal.claim.options.columns.carry
    keys, bodies, more, titles = zip(*rows, strict=True)
    carried = [(each or "{}").encode() for each in more] if carries else None
    titled = [title.encode() for title in titles] if rehearsal.claim.options.columns.title else None
    rehearsal.stage(0, [items.Block(keys, [body.encode() for body in bodies], carried, titled)])


def _embed(encoder: Encoder, rehearsal: Rehearsal, done: _Done, first: int, count: int, index: int) -> None:
    """Read, embed and write a slice of the sample, and add its counts and times to `done`. Its vectors get indexes from
    `index` on."""
    watch = Watch(float("inf"), float("inf"))
    began = perf_counter()
    texts = rehearsal.read(first, count)
    was_read = perf_counter()
    encoding = SliceEncoding(encoder, rehearsal.claim, texts, watch)
    for _ in encoding.commits():
        pass  # the watch sets no interval
    rows = encoding.last_commit().rows
    embedded = perf_counter()
    rehearsal.write(replace(rows, indexes=rows.indexes + (index - first)))
    done.embed_seconds += embedded - was_read
    done.write_seconds += (was_read - began) + (perf_counter() - embedded)
    done.vectors += len(rows.indexes)
    done.tokens += int(rows.tokens.sum())
