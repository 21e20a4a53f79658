"""Real servers in a temporary home, and the benchmarks' operations on them."""

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

from sqlalchemy import text

from pipeline.catalog.models import find_model, workspace_id
from pipeline.cli.bootstrap import BUNDLED_MODEL, BundledModel, bundled_model_folder, prepare_database
from pipeline.cli.context import CommandContext
from pipeline.core.models import Model
from pipeline.core.options import Columns, JobOptions
from pipeline.db.database import make_engine
from pipeline.embedded.machine import Machine, Stages
from pipeline.embedded.runtime import Running
from pipeline.embedded.stages import app_stages
from pipeline.infra.settings import Settings
from pipeline.ingest.submission import Planning, Submission, planning
from pipeline.ingest.submit import submit
from pipeline.sources import Corpus
from tests.support.machines import remove_what_root_keeps

#: Options of jobs that are measured again and again on the same texts.
NO_REUSE = JobOptions(reuse=False)


def model_folder() -> Path:
    """Return the folder in which all-MiniLM-L6-v2 is installed."""
    folder = bundled_model_folder()
    assert folder, "the extra `embedded` is not installed"
    return folder


def servers() -> AbstractContextManager[Running]:
    """Run Postgres and Valkey alone, with the schema and the bundled model."""
    return _usual_machine(lambda _: ())


def whole_machine() -> AbstractContextManager[Running]:
    """Run everything as `vectormill up` does, with one worker."""
    return _usual_machine(partial(app_stages, workers=1))


@contextmanager
def _usual_machine(stages: Stages) -> Iterator[Running]:
    with TemporaryDirectory(prefix="vectormill-bench-") as folder:
        settings = Settings(home=Path(folder, "home"), database_url=None, redis_url=None)
        prepare = partial(prepare_database, home=settings.home)
        with machine(settings, prepare, stages, BundledModel().add) as running:
            yield running


@contextmanager
def machine(
    settings: Settings,
    prepare: Callable[[str], str | None],
    stages: Stages,
    complete: Callable[[str], None] = lambda _: None,
) -> Iterator[Running]:
    """Run servers and processes for the length of the block, as `Machine` describes them."""
    made = Machine(settings, prepare=prepare, stages=stages, complete=complete)
    ready: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="machine") as pool:
            ended = pool.submit(made.run, ready.put)
            ended.add_done_callback(lambda _: ready.put(None))
            try:
                running = ready.get()
                if running is not None:
                    yield running
            finally:
                made.request_stop()
        ended.result()
    finally:
        if os.geteuid() == 0:
            remove_what_root_keeps(settings.home)


@contextmanager
def connected(running: Running) -> Iterator[CommandContext]:
    """Connect to the default workspace of a machine, as a command would."""
    engine = make_engine(running.database_url, application="vectormill-cli")
    try:
        with engine.begin() as connection:
            workspace = workspace_id(connection)
        yield CommandContext(settings=Settings(home=running.home), engine=engine, workspace_id=workspace)
    finally:
        engine.dispose()


def model_named(where: CommandContext, name: str = BUNDLED_MODEL) -> Model:
    """Return the catalogue's entry of a model, with the rate measured so far."""
    with where.engine.begin() as connection:
        return find_model(connection, where.workspace_id, name)


def submit_file(
    where: CommandContext,
    path: Path,
    cut: Callable[[Planning], Planning] = lambda usual: usual,
    model: str = BUNDLED_MODEL,
    options: JobOptions = NO_REUSE,
) -> UUID:
    """Submit a file of JSON lines with usual settings; `cut` may change the planning. Return the job's id."""
    return submit(
        where.engine,
        Submission(
            workspace_id=where.workspace_id,
            model=model_named(where, model),
            corpus=Corpus([str(path)], Columns(), where.settings.item_bytes),
            planning=cut(planning(where.settings)),
            name=path.stem,
            options=options,
        ),
    ).job_id


def forget_jobs(where: CommandContext) -> None:
    """Empty every table that a job fills, and write all pending pages to disk."""
    with where.engine.begin() as connection:
        connection.execute(
            text("truncate vectormill.items, vectormill.embeddings, vectormill.rejects, vectormill.known_texts")
        )
        connection.execute(text("truncate vectormill.usage"))
        connection.execute(text("delete from vectormill.jobs"))
    with where.engine.begin() as connection:
        connection.execute(text("checkpoint"))
