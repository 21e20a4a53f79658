"""Command `vectormill sync`: a collection brought up to its source."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, BinaryIO
from uuid import UUID

import typer

from pipeline.catalog.models import DEFAULT_WORKSPACE, find_model
from pipeline.cli import options
from pipeline.cli.api_backend import ApiBackend
from pipeline.cli.backends import Backend, open_backend
from pipeline.cli.context import CommandContext, submitter
from pipeline.cli.jobs import watch_job
from pipeline.cli.output import stderr, tell
from pipeline.cli.submit import Counter, corpus_of, files_of, needs, refuse_at_api
from pipeline.core.collections import OnDuplicateKey
from pipeline.core.errors import UserError, WaitTimedOut
from pipeline.db import collections
from pipeline.infra.storage import is_remote
from pipeline.ingest.request import labels_of, read_fields
from pipeline.ingest.submission import Submitted, planning
from pipeline.ingest.sync import SyncRequest, SyncSource, columns_of, submission_of, sync_collection
from pipeline.jobs.collections import find_collection
from pipeline.sources.removed_keys import REMOVED, RemovedKeys
from pipeline.webhooks import allowlist


def sync(
    collection: Annotated[str, typer.Argument(metavar="COLLECTION", help="The collection's name.")],
    sources: options.Sources = None,
    *,
    from_url: options.FromUrl = None,
    query: Annotated[str | None, typer.Option(help="The query whose rows are the source.")] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="The source names only what changed; other keys stay.")
    ] = False,
    removed_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of a delta: the column that is true in rows whose key goes.")
    ] = None,
    remove_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Remove the keys in this file, one a line; instead of SOURCE.")
    ] = None,
    max_removed: Annotated[
        str,
        typer.Option(
            metavar="N|P%", help="Fail, and remove nothing, if more keys are missing. Default: 20% from 100 keys on."
        ),
    ] = "",
    keep_rejected: Annotated[
        bool, typer.Option("--keep-rejected", help="Keep old vectors of keys whose row is rejected now.")
    ] = False,
    atomic: Annotated[bool, typer.Option("--atomic", help="Show readers nothing before the sync's end.")] = False,
    on_duplicate_key: Annotated[
        OnDuplicateKey, typer.Option(help="The row that counts of several with one key.")
    ] = OnDuplicateKey.LAST,
    no_queue: Annotated[
        bool, typer.Option("--no-queue", help="Fail if another sync of the collection goes on, instead of waiting.")
    ] = False,
    max_rejects: Annotated[
        str | None,
        typer.Option(metavar="N|P%", help="Fail if more rows are rejected. Default: as of the collection."),
    ] = None,
    delimiter: options.Delimiter = None,
    quote: options.Quote = None,
    by_reference: Annotated[
        bool,
        typer.Option(
            "--by-reference", help="Workers read new texts from the files themselves: for a large first sync."
        ),
    ] = False,
    name: Annotated[str | None, typer.Option(help="The job's name. Default: the collection's.")] = None,
    label: options.Label = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Syncing again with this key attaches to the same job.")
    ] = None,
    priority: options.Priority = 0,
    webhook: options.Webhook = None,
    wait: options.Wait = False,
    timeout: options.Timeout = None,
    workspace: options.Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Bring a collection up to its source: embed what is new or changed, and remove what the source lacks.

    Prints the job's id on standard output, everything else on standard error.

    Examples:

        vectormill sync tickets tickets.parquet --wait

        vectormill sync tickets --from postgresql://reader@shop/db --query "select id, subject, body from tickets"

        vectormill sync tickets changes.jsonl --delta --removed-column deleted

        vectormill sync tickets --remove-keys gone.txt
    """
    needs("--timeout", timeout is not None, "--wait", wait)
    if remove_keys and (sources or query or from_url or removed_column):
        raise UserError("--remove-keys: it is a source of its own; leave the others and --removed-column out.")
    if remove_keys and by_reference:
        raise UserError("--by-reference has no effect with --remove-keys, which has no texts; leave it out.")
    wish = read_fields(
        SyncRequest,
        {
            "delta": delta or remove_keys is not None,
            "removed_column": REMOVED if remove_keys else removed_column,
            "max_removed": max_removed,
            "keep_rejected": keep_rejected,
            "atomic": atomic,
            "on_duplicate_key": on_duplicate_key,
            "max_rejects": max_rejects,
            "delimiter": delimiter,
            "quote": quote,
            "by_reference": by_reference,
            "name": name,
            "labels": labels_of(label or []),
            "priority": priority,
            "webhook": webhook,
        },
    )
    with open_backend(workspace) as backend:
        if isinstance(backend, ApiBackend):
            refuse_at_api({"--from": from_url, "--query": query, "--remove-keys": remove_keys})
            done = _at_api(backend, collection, wish, sources or [], idempotency_key, queue=not no_queue)
        else:
            if webhook:
                allowlist.check(webhook, backend.place.settings.webhooks)
            place = backend.place
            with place.engine.begin() as connection:
                found = find_collection(connection, place.workspace_id, collection)
                versions = collections.versions(connection, found.id)
            columns = columns_of(found, wish)
            with ExitStack() as opened:
                corpus: SyncSource
                if remove_keys:
                    corpus = RemovedKeys(remove_keys, columns)
                else:
                    # Each version is brought up to it, so it is read several times.
                    is_kept = "-" in (sources or []) and len(versions) > 1
                    stdin = opened.enter_context(_kept_stdin()) if is_kept else None
                    corpus = corpus_of(sources or [], from_url, query, columns, place, stdin)
                done = _sync(place, collection, wish, corpus, idempotency_key, query, queue=not no_queue)
        if done.attached:
            stderr.print(f"{done.attached}.")
        tell(done.notices)
        sys.stdout.write(f"{done.job_id}\n")
        sys.stdout.flush()
        if wait:
            deadline = time.monotonic() + (timeout or float("inf"))
            code = watch_job(backend, done.job_id, timeout)
            if not code:
                _await_files(backend, collection, deadline)
            raise typer.Exit(code)


def _await_files(backend: Backend, name: str, deadline: float) -> None:
    """Wait until a collection's files have what its sync changed.

    Raises:
        WaitTimedOut: they can't be written now, or it takes longer.
    """
    while (files := backend.collection(name).output) and files.behind:
        if files.problem or time.monotonic() > deadline:
            why = files.problem or "it takes longer"
            raise WaitTimedOut(f"the sync is completed, but not its files in {files.uri}: {why}")
        time.sleep(_FILES_SECONDS)


#: Time between two looks at a collection's files.
_FILES_SECONDS = 0.5


@contextmanager
def _kept_stdin() -> Iterator[BinaryIO]:
    with TemporaryFile() as kept:
        shutil.copyfileobj(sys.stdin.buffer, kept)
        kept.seek(0)
        yield kept


def _tell_wait(job: UUID) -> None:
    stderr.print(f"waiting for job {job}, which syncs this collection: vectormill status {job}")


def _sync(
    place: CommandContext,
    name: str,
    wish: SyncRequest,
    corpus: SyncSource,
    idempotency_key: str | None,
    query: str | None,
    *,
    queue: bool,
) -> Submitted:
    with place.engine.begin() as connection:
        found = find_collection(connection, place.workspace_id, name)
        model = find_model(connection, place.workspace_id, found.model)
    with Counter(stderr) as counter:
        submission = submission_of(
            found,
            model,
            wish,
            corpus,
            planning(place.settings),
            idempotency_key,
            submitted_by=submitter(),
            query=query,
            on_items=counter.show,
        )
        return sync_collection(place.engine, submission, wish, queue=queue, on_wait=_tell_wait)


def _at_api(
    backend: ApiBackend,
    collection: str,
    wish: SyncRequest,
    sources: list[str],
    idempotency_key: str | None,
    *,
    queue: bool,
) -> Submitted:
    if not sources:
        raise UserError("no source: give files, a folder, or - for standard input.")
    remote = [source for source in sources if is_remote(source)]
    if remote and len(remote) < len(sources):
        raise UserError("an api takes files to upload or URIs, not both in one sync.")
    if wish.by_reference and not remote:
        raise UserError("--by-reference: an api can't read files of this machine; leave it out.")
    with TemporaryDirectory() as folder:
        files = [] if remote else files_of(sources, Path(folder))
        asked = wish.model_copy(update={"sources": remote})
        return backend.sync(collection, asked, files, idempotency_key, queue=queue, on_wait=_tell_wait)
