"""Sync of a million rows of which none has changed, against reading and hashing them alone.

    python -m tests.benchmarks.sync --rows 10e6

measures more rows once, with the bytes that each key takes in Postgres and the command's peak memory.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from uuid import UUID

from sqlalchemy import text

from pipeline.catalog.models import find_model
from pipeline.cli.bootstrap import BUNDLED_MODEL
from pipeline.cli.context import CommandContext
from pipeline.core.collections import carried_hash
from pipeline.core.jobs import JobState
from pipeline.core.options import JobOptions, KeptOptions
from pipeline.core.text_identity import TextIdentity
from pipeline.db import jobs
from pipeline.dispatch import finalize
from pipeline.ingest.collections import create_collection
from pipeline.ingest.submission import planning
from pipeline.ingest.sync import SyncRequest, columns_of, submission_of, sync_collection
from pipeline.jobs.collections import find_collection
from pipeline.sources import Corpus
from tests.benchmarks.corpus import short_rows, write_rows
from tests.benchmarks.harness import Benchmark, Rounds, Values
from tests.benchmarks.machine import connected, servers

_MILLION = 1_000_000
_NAME = "benchmarked"
#: Keys as a first sync leaves them, without its vectors, which an unchanged row never touches.
_FILL = """
    insert into vectormill.collection_keys (version_id, key, identity, tokens, job_id)
    select :version, key, identity, 8, job_id from vectormill.items where job_id = :job
"""


def measure(rounds: Rounds) -> Values:
    """Return rows per second of each."""
    with TemporaryDirectory() as folder, servers() as running, connected(running) as place:
        corpus = write_rows(Path(folder, "rows.jsonl"), short_rows(_MILLION))
        _fill(place, corpus)
        return rounds.interleave(
            {
                "sync": lambda _: _MILLION / _sync_seconds(place, corpus, _MILLION),
                "reading and hashing": lambda _: _MILLION / _reading_seconds(place, corpus),
            }
        )


def _submit(place: CommandContext, source: Path) -> UUID:
    with place.engine.begin() as connection:
        collection = find_collection(connection, place.workspace_id, _NAME)
        model = find_model(connection, place.workspace_id, collection.model)
    wish = SyncRequest()
    corpus = Corpus([str(source)], columns_of(collection, wish), place.settings.item_bytes)
    submission = submission_of(collection, model, wish, corpus, planning(place.settings))
    return sync_collection(place.engine, submission, wish).job_id


def _fill(place: CommandContext, source: Path) -> None:
    """Create the collection, and give it the keys of all rows."""
    with place.engine.begin() as connection:
        made = create_collection(connection, place.workspace_id, _NAME, model=BUNDLED_MODEL, options=JobOptions())
    job = _submit(place, source)
    with place.engine.begin() as connection:
        connection.execute(text(_FILL), {"version": made.version_id, "job": job})
        connection.execute(text("delete from vectormill.items where job_id = :job"), {"job": job})
        connection.execute(text("update vectormill.jobs set state = 'cancelled' where id = :job"), {"job": job})
    with place.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze vectormill.collection_keys"))


def _sync_seconds(place: CommandContext, source: Path, rows: int) -> float:
    start = perf_counter()
    job = _submit(place, source)
    finalize.finalize(place.engine, job)
    seconds = perf_counter() - start
    with place.engine.begin() as connection:
        ended = jobs.by_id(connection, job)
    assert ended is not None
    assert ended.state is JobState.COMPLETED
    assert ended.receipt is not None
    assert ended.receipt["items"]["unchanged"] == rows
    return seconds


def _reading_seconds(place: CommandContext, source: Path) -> float:
    """Read and hash all rows as a sync does, and do nothing with them."""
    with place.engine.begin() as connection:
        columns = columns_of(find_collection(connection, place.workspace_id, _NAME), SyncRequest())
    identity = TextIdentity(KeptOptions())
    start = perf_counter()
    for block in Corpus([str(source)], columns, place.settings.item_bytes).blocks():
        none = carried_hash(b"")
        for each in block.texts:
            assert each is not None
            identity.of(b"", each) + none
    return perf_counter() - start


BENCHMARK = Benchmark(name="unchanged_sync_vs_reading", target=1 / 3, unit="rows/s", measure=measure)


def main() -> None:
    """Measure one sync of as many rows as asked for, and the size of their keys."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sync", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=float, default=1e7)
    rows = int(parser.parse_args().rows)
    with TemporaryDirectory() as folder, servers() as running, connected(running) as place:
        corpus = write_rows(Path(folder, "rows.jsonl"), short_rows(rows))
        _fill(place, corpus)
        with place.engine.begin() as connection:
            size = text("""
                select pg_total_relation_size(relid) from pg_partition_tree('vectormill.collection_keys') where isleaf
            """)
            key_bytes = connection.execute(size).scalar_one() / rows
        alone, seconds = _reading_seconds(place, corpus), _sync_seconds(place, corpus, rows)
        peak = _peak_bytes(running.database_url, corpus)
    print(
        f"{rows:,} rows: {key_bytes:.0f} bytes a key, {seconds:.1f} s a sync, {alone:.1f} s to read and hash alone, "
        f"{peak / 1e6:.0f} MB of memory at most"
    )


def _peak_bytes(database_url: str, source: Path) -> int:
    """Return the peak memory of the command that submits a sync."""
    command = [sys.executable, "-m", "pipeline.cli", "sync", _NAME, str(source)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.peak", *command],
        env={**os.environ, "VECTORMILL_DATABASE_URL": database_url},
        capture_output=True,
        check=True,
    )
    return int(done.stdout)


if __name__ == "__main__":
    main()
