"""Lane of a drill: a collection synced night after night, judged by the oracle of tests/acceptance/nights.py."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from uuid import UUID, uuid4

import psycopg
from sentence_transformers import SentenceTransformer

from tests.acceptance.fleet import eventually
from tests.acceptance.nights import Tickets, differences
from tests.chaos.faults import Done
from tests.chaos.on_servers import kill_dispatcher
from tests.chaos.site import START_SECONDS, Site
from tests.support.models import static_folder

_COLLECTION = "drilled"
_UNREACHABLE = 6
#: Holds each sync's end within its transaction, so that a fault can strike there.
_SLOW_END = """
create function public.linger() returns trigger language plpgsql as $$
begin
  perform pg_sleep(0.5);
  return new;
end
$$;
create trigger linger before update of settled_at on vectormill.syncs for each row execute function public.linger()
"""
_IN_REMOVAL = """
select exists (select from pg_stat_activity
               where application_name like 'vectormill-background%' and wait_event = 'PgSleep')
"""


def kill_in_removal(site: Site, random: Random) -> Done:
    """Kill the dispatchers while the end of a sync removes keys."""
    eventually(lambda: site.scalar(_IN_REMOVAL), "the end of a sync", START_SECONDS)
    kill_dispatcher(site, random)
    return kill_dispatcher(site, random)


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
    _night: int = 0
    #: Rewinds of Postgres at the end of the last sync; after one, counts mean nothing.
    _rewinds: int = 0
    _tickets: Tickets = field(init=False)
    _library: SentenceTransformer = field(init=False)

    def begin(self) -> None:
        """Create the collection."""
        self._tickets = Tickets.new(self.random.randrange(1_000), self.count)
        self._library = SentenceTransformer(str(static_folder()), device="cpu")
        template = "{subject}\n\n{body}"
        self.site.fleet.cli(
            "collections", "create", _COLLECTION, "--model", "static", "--text", template, "--carry", "lang"
        )
        with psycopg.connect(self.site.owner_url, autocommit=True) as connection:
            connection.execute(_SLOW_END.encode())

    def run(self) -> list[str]:
        """Sync one night, and now and then a source that has shrunk. Return what is wrong."""
        if self._night and self.random.random() < 0.2:
            self._sync(self._tickets, share=0.1, wanted="failed")
            self.refused += 1
        if self._night:
            self._tickets.change(self._night)
        self._night += 1
        calm = self._rewinds == self.site.rewinds
        self._sync(self._tickets, wanted="completed", twice=self.random.random() < 0.3)
        return self._judge(calm=calm)

    def _judge(self, *, calm: bool) -> list[str]:
        expected = self._tickets.expected()
        said = list(
            self.site.insist(
                lambda: list(
                    differences(self._tickets, self.site.fleet.engine, self._library, f"vectormill.{_COLLECTION}")
                )
            )
        )
        if calm and self._rewinds == self.site.rewinds:
            # The first sync since the night before, whichever of two it was.
            rows = self.site.rows(
                "select receipt->'items' as items from vectormill.jobs where id = :job", job=self._first
            )
            if rows and rows[0]["items"] != expected:
                said.append(f"{self._first}: {rows[0]['items']}, not {expected}")
        self._rewinds = self.site.rewinds
        self.done += 1
        return said

    def _sync(self, tickets: Tickets, *, wanted: str, share: float = 1.0, twice: bool = False) -> None:
        """Sync a share of the table to its end, by one command or two at once; again if Postgres goes back."""
        rows = dict(list(tickets.rows.items())[: int(share * len(tickets.rows))])
        path = self.site.folder / "nights.jsonl"
        Tickets(rows, self.random).write(path)
        arguments = [_COLLECTION, str(path), "--max-rejects", "5%"]
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
