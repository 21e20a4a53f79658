"""Lane of a drill: a collection synced night after night, judged by the oracle of tests/acceptance/nights.py."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from uuid import UUID, uuid4

import psutil
import psycopg
from sentence_transformers import SentenceTransformer

from pipeline.catalog.models import workspace_id
from pipeline.core.collection_status import CollectionStatus
from pipeline.core.collections import VersionState
from pipeline.jobs.collections import collection_status, find_collection
from tests.acceptance.fleet import eventually
from tests.acceptance.nights import Tickets, differences, file_differences
from tests.chaos.faults import Done
from tests.chaos.on_servers import kill_dispatcher
from tests.chaos.site import START_SECONDS, Site
from tests.support.models import static_folder

_COLLECTION = "drilled"
_UNREACHABLE = 6
#: Models of the two versions, with the sizes of their vectors.
_MODELS = {"static": 256, "small": 64}
#: Holds each sync's end, each swap and each erasure within its transaction, so that a fault can strike there.
_SLOW = """
create function public.linger() returns trigger language plpgsql as $$
begin
  perform pg_sleep(0.5);
  return new;
end
$$;
create trigger linger before update of settled_at on vectormill.syncs for each row execute function public.linger();
create trigger linger before update of state on vectormill.collection_versions
  for each row when (new.state = 'current') execute function public.linger();
create trigger linger before update of collected on vectormill.forgets for each row execute function public.linger()
"""
_IN_BACKGROUND = """
select exists (select from pg_stat_activity
               where application_name like 'vectormill-background%' and wait_event = 'PgSleep' and query like :which)
"""


def kill_in_removal(site: Site, random: Random) -> Done:
    """Kill the dispatchers while the end of a sync removes keys."""
    return _kill_in_background(site, random, "syncs", "the end of a sync")


def kill_in_forget(site: Site, random: Random) -> Done:
    """Kill the dispatchers while they erase a key."""
    return _kill_in_background(site, random, "forgets", "an erasure")


def _kill_in_background(site: Site, random: Random, table: str, what: str) -> Done:
    which = f"%update vectormill.{table}%"
    eventually(lambda: site.scalar(_IN_BACKGROUND, which=which), what, START_SECONDS)
    kill_dispatcher(site, random)
    return kill_dispatcher(site, random)


#: Counts of a sync, and whether a chunk of it was lost twice: it is searched for a text that kills, and shares nothing.
_COUNTS = """
select receipt->'items' as items,
       exists (select from vectormill.claim_losses where job_id = :job
               group by chunk_id having count(*) > 1) as searched
from vectormill.jobs where id = :job
"""
#: Where a key is, of what syncs have written.
_TRACES = """
select 'items' as place from vectormill.items i join vectormill.syncs s using (job_id) where i.key = :key
union select 'vectors' from vectormill.embeddings e join vectormill.syncs s using (job_id) where e.key = :key
union select 'a version' from vectormill.collection_keys where key = :key
"""
_IN_SWAP = """
select exists (select from pg_stat_activity
               where application_name like 'vectormill-cli%' and wait_event = 'PgSleep')
"""


def kill_in_swap(site: Site, random: Random) -> Done:
    """Kill the command that swaps a collection's versions, within its transaction."""
    eventually(lambda: site.scalar(_IN_SWAP), "a swap", START_SECONDS)
    since = time.monotonic()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if {"collections", _COLLECTION} <= set(process.cmdline()):
                process.kill()
    return Done(since)


@dataclass
class Nights:
    """The collection, and the objections to its syncs."""

    site: Site
    random: Random
    #: Waits for a job's end, resumes it while that is explained, and returns its state.
    await_end: Callable[[UUID], str]
    count: int = 1_000
    done: int = 0
    refused: int = 0
    swapped: int = 0
    forgotten: int = 0
    _night: int = 0
    _files: int = 0
    #: Rewinds of Postgres at the end of the last sync; after one, counts mean nothing.
    _rewinds: int = 0
    _tickets: Tickets = field(init=False)
    #: Libraries by model.
    _libraries: dict[str, SentenceTransformer] = field(init=False)

    def begin(self) -> None:
        """Create the collection, with a second version beside the first."""
        self._tickets = Tickets.new(self.random.randrange(1_000), self.count)
        self._libraries = {
            name: SentenceTransformer(str(static_folder(size)), device="cpu") for name, size in _MODELS.items()
        }
        template = "{subject}\n\n{body}"
        made = ("collections", "create", _COLLECTION, "--model", "static", "--text", template, "--carry", "lang")
        self.site.fleet.cli(*made, "--output", str(self._folder("static")))
        with psycopg.connect(self.site.owner_url, autocommit=True) as connection:
            connection.execute(_SLOW.encode())
        upgrade = ("collections", "upgrade", _COLLECTION, "--model", "small")
        self.site.fleet.cli(*upgrade, "--output", str(self._folder("small")))

    def _folder(self, model: str) -> Path:
        return self.site.folder / f"{_COLLECTION}-{model}"

    def run(self) -> list[str]:
        """Sync one night, and now and then a source that has shrunk. Return what is wrong."""
        if self._night and self.random.random() < 0.2:
            self._sync(self._tickets, share=0.1, wanted="failed")
            self.refused += 1
        if self._night:
            self._tickets.change(self._night)
        self._night += 1
        calm, expected = self._rewinds == self.site.rewinds, self._tickets.expected()
        while True:
            rewinds = self.site.rewinds
            self._sync(self._tickets, wanted="completed", twice=self.random.random() < 0.3)
            said = self._judge(expected if calm else None)
            if not said and self._versions_are_equal():
                self._swap()
                said = self._differences() or self._forget()
            # Postgres may go back behind this sync at any time: then the night comes again.
            if not said or rewinds == self.site.rewinds:
                self._rewinds = rewinds
                return said
            calm = False

    def _status(self) -> CollectionStatus:
        def read() -> CollectionStatus:
            with self.site.fleet.engine.begin() as connection:
                found = find_collection(connection, workspace_id(connection), _COLLECTION)
                return collection_status(connection, found)

        return self.site.insist(read)

    def _versions_are_equal(self) -> bool:
        for row in self.site.rows("select job_id from vectormill.syncs where beside = :job", job=self._first):
            self.await_end(row["job_id"])
        (other,) = self._status().versions
        return other.differs is None and other.running is None

    def _swap(self) -> None:
        """Swap the versions, or swap them back; again if the command was killed, or Postgres goes back."""
        before = self._status()
        verb = "swap" if before.versions[0].state is VersionState.NEXT else "swap-back"
        deadline = time.monotonic() + 600
        while self._status().model == before.model:
            done = self.site.fleet.cli_process("collections", verb, _COLLECTION, "--yes")
            if time.monotonic() > deadline:
                raise AssertionError(f"{verb} ended with {done.returncode}: {done.stderr[-500:]}")
        self.swapped += 1

    def _forget(self) -> list[str]:
        """Forget a key. Return what is left of it."""
        key, rewinds, deadline = self._tickets.forget(), self.site.rewinds, time.monotonic() + 600
        while True:
            done = self.site.fleet.cli_process("forget", "--key", key, "--collection", _COLLECTION, "--yes")
            if done.returncode == 0 or rewinds != self.site.rewinds:
                break
            if done.returncode != _UNREACHABLE or time.monotonic() > deadline:
                raise AssertionError(f"forget ended with {done.returncode}: {done.stderr[-500:]}")
        self.forgotten += 1
        left = self.site.rows(_TRACES, key=key)
        return [f"{key} is still in {row['place']}" for row in left] if rewinds == self.site.rewinds else []

    def _differences(self) -> list[str]:
        def read() -> list[str]:
            library = self._libraries[self._status().model]
            return list(differences(self._tickets, self.site.fleet.engine, library, f"vectormill.{_COLLECTION}"))

        return list(self.site.insist(read)) or self._file_differences()

    def _file_differences(self) -> list[str]:
        def written() -> bool:
            output = self._status().output
            return output is not None and not output.behind

        eventually(written, "the collection's files")
        model = self._status().model
        found = file_differences(self._tickets, self._folder(model), self._libraries[model])
        return [f"files: {each}" for each in found]

    def _judge(self, expected: dict[str, int] | None) -> list[str]:
        """Return what is wrong with the collection, and with the counts of its sync unless they mean nothing."""
        rewinds = self.site.rewinds
        said = self._differences()
        if expected:
            # The first sync since the night before, whichever of two it was.
            rows = self.site.rows(_COUNTS, job=self._first)
            found = {name: rows[0]["items"][name] for name in expected} if rows else expected
            if rows and rows[0]["searched"]:
                again = found["embedded"] - expected["embedded"]
                expected = {**expected, "embedded": found["embedded"], "reused": expected["reused"] - max(0, again)}
            if rewinds == self.site.rewinds and found != expected:
                said.append(f"{self._first}: {found}, not {expected}")
        self.done += 1
        return said

    def _sync(self, tickets: Tickets, *, wanted: str, share: float = 1.0, twice: bool = False) -> None:
        """Sync a share of the table to its end, by one command or two at once; again if Postgres goes back."""
        rows = dict(list(tickets.rows.items())[: int(share * len(tickets.rows))])
        # A file of its own, since workers may still read the last one.
        self._files += 1
        path = self.site.folder / f"nights-{self._files}.{self.random.choice(('jsonl', 'parquet'))}"
        Tickets(rows, self.random).write(path)
        arguments = [_COLLECTION, str(path), "--max-rejects", "5%"]
        if self.random.random() < 0.5:
            arguments += ["--by-reference"]
        if self.random.random() < 0.3:
            arguments += ["--atomic"]
        while True:
            rewinds = self.site.rewinds
            with ThreadPoolExecutor(2) as threads:
                jobs = list(threads.map(self._submit, [arguments] * (2 if twice else 1)))
            self._first = min(jobs)
            states = [self.await_end(job) for job in jobs]
            if states == [wanted] * len(jobs):
                return
            if rewinds == self.site.rewinds:
                rows_of = "select id, state, reason, message from vectormill.jobs where id = any(:jobs)"
                told = [dict(row) for row in self.site.rows(rows_of, jobs=jobs)]
                raise AssertionError(f"syncs are {states}, not {wanted}: {told}")

    def _submit(self, arguments: list[str]) -> UUID:
        key, deadline = uuid4().hex, time.monotonic() + 600
        while True:
            done = self.site.fleet.cli_process("sync", *arguments, "--idempotency-key", key)
            if done.returncode == 0:
                return UUID(done.stdout.strip())
            if done.returncode != _UNREACHABLE or time.monotonic() > deadline:
                raise AssertionError(f"sync ended with {done.returncode}: {done.stderr[-500:]}")
