"""Load of a drill: jobs of all kinds, one after the other in lanes. The oracle judges each at its end."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from uuid import UUID, uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import IllegalTransition, VectormillError
from pipeline.infra import storage
from pipeline.jobs import control
from pipeline.jobs.purge import purge_job
from tests.acceptance.oracle import objections, vectors
from tests.acceptance.poison import Poison
from tests.chaos.nights import Nights
from tests.chaos.secrets import CANARY, leaks_of_job
from tests.chaos.site import BUCKET, Site

#: Exit code of `submit` when the same submission may be tried again.
_UNREACHABLE = 6
#: Part of its message when the folder of `--output` isn't empty.
_TAKEN = "is there already; give an empty folder"
#: Part of its message when the disk of `--output` is full.
_NO_ROOM = "no space left on device"
_POLL_SECONDS = 0.2
#: Shortest time per job in a lane: one whose jobs are done at once would do nothing but submit.
_LEAST_SECONDS = 10.0
#: Shortest time per poisoned job: each restarts a dozen processes, and the other lanes need a core too.
_LEAST_POISONED_SECONDS = 240.0
#: Time after a fault in which it still explains a pause.
_EXPLAINS_SECONDS = 60.0


@dataclass(frozen=True)
class Way:
    """Kind of job: model, source and output."""

    model: str
    #: `jsonl`, whose rows are copied to Postgres, or `parquet`, which workers read themselves.
    corpus: str
    #: `disk` or `store`; `None` for Postgres.
    output: str | None = None
    #: True if some of the texts harm the model.
    poisoned: bool = False
    #: True if each text comes several times, and its vector is reused.
    repeats: bool = False

    def __str__(self) -> str:
        also = f"{', poisoned' if self.poisoned else ''}{', repeats' if self.repeats else ''}"
        return f"{self.model} {self.corpus} → {self.output or 'postgres'}{also}"


LANES = (
    (
        Way("minilm", "jsonl"),
        Way("minilm", "parquet"),
        Way("minilm", "jsonl", "disk"),
        Way("minilm", "parquet", "store"),
    ),
    (Way("static", "parquet", "disk"), Way("static", "jsonl", repeats=True), Way("static", "parquet", repeats=True)),
    # Lanes of their own, so that there is always something to strike on the way to the store, and to the upstream.
    (Way("static", "parquet", "store"),),
    (Way("far", "jsonl"),),
    (Way("far", "parquet", "disk"),),
)
#: Lane for a site with a brittle model.
POISONED = (Way("brittle", "jsonl", poisoned=True), Way("brittle", "parquet", "disk", poisoned=True))


#: Way of the nightly syncs of a collection.
_NIGHTLY = Way("static", "nightly")


@dataclass(frozen=True)
class _Corpus:
    """Source of a job."""

    #: JSON lines. The same rows are beside it as Parquet.
    file: Path
    #: Harmful texts, by index.
    poisons: dict[int, Poison] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """Texts by index."""
        return [json.loads(line)["text"] for line in self.file.read_text(encoding="utf-8").splitlines()]


@dataclass
class Load:
    """Jobs that run during the faults, and the objections to them."""

    site: Site
    #: Number per job.
    items: int
    lanes: tuple[tuple[Way, ...], ...] = LANES
    #: Decides the places of harmful texts.
    random: Random = field(default_factory=lambda: Random(0))
    #: Time after which a job is stuck. Poisoned jobs need most of it: each text that kills its process costs some
    #: restarts beside a fleet that keeps all cores busy.
    stuck_seconds: float = 1_800.0
    said: list[str] = field(default_factory=list)
    #: Number of items of each job that has ended, by way.
    ended: dict[Way, list[int]] = field(default_factory=dict)
    #: Time until which a pause is explained, by its reason; monotonic clock.
    explained: dict[str, float] = field(default_factory=dict)
    #: Numbers of harmful texts that were rejected for it, alone.
    poisons: Counter[Poison] = field(default_factory=Counter)
    nights: Nights = field(init=False)
    _calm: dict[str, UUID] = field(default_factory=dict)
    _purged: list[UUID] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def begin(self) -> None:
        """Run an undisturbed job of each model, then start the lanes."""
        healthy = self._write("corpus", {})
        for model in {lane[0].model for lane in self.lanes}:
            way = Way(model, "jsonl")
            job = self._submit(way, healthy, uuid4().hex)
            assert self._await_end(way, job) == "completed"
            with self.site.fleet.engine.begin() as connection:
                assert objections(connection, job, healthy.file) == []
            self._calm[model] = job
        self.nights = Nights(self.site, self.random, lambda job: self._await_end(_NIGHTLY, job))
        self.nights.begin()
        thread = threading.Thread(target=self._go_on_with_nights, name="nights", daemon=True)
        thread.start()
        self._threads.append(thread)
        for lane in self.lanes:
            thread = threading.Thread(target=self._go, args=(lane,), name=lane[0].model, daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        """Let the current jobs end, and start no others."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._bury()

    def explain(self, reasons: tuple[str, ...], seconds: float = _EXPLAINS_SECONDS) -> None:
        """Let jobs pause for these reasons for so long. They are resumed, as a person would do."""
        for reason in reasons:
            self.explained[reason] = time.monotonic() + seconds

    @property
    def items_ended(self) -> int:
        """Number of items of all jobs that have ended."""
        return sum(sum(counts) for counts in self.ended.values())

    def _write(self, name: str, poisons: dict[int, Poison]) -> _Corpus:
        rows = [
            {"id": f"doc-{n}", "text": f"{CANARY} {n} look at {n % 97} mills on {n % 89} rivers in the year {n}."}
            for n in range(self.items)
        ]
        for at, poison in poisons.items():
            rows[at]["text"] = f"{poison}: {rows[at]['text']}"
        return self._kept(name, rows, poisons)

    def _kept(self, name: str, rows: list[dict[str, str]], poisons: dict[int, Poison]) -> _Corpus:
        file = self.site.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(rows), file.with_suffix(".parquet"), row_group_size=500)
        return _Corpus(file, poisons)

    def _corpus(self, way: Way, name: str) -> _Corpus:
        if way.poisoned:
            return self._poisoned(name)
        return self._repeating(name) if way.repeats else _Corpus(self.site.folder / "corpus.jsonl")

    def _repeating(self, name: str) -> _Corpus:
        """Write a corpus of texts that no other job has, each about twice."""
        texts = [f"{CANARY} of {name}: {n} mills." for n in range(max(1, self.items // 2))]
        rows = [{"id": f"doc-{n}", "text": self.random.choice(texts)} for n in range(self.items)]
        return self._kept(name, rows, {})

    def _poisoned(self, name: str) -> _Corpus:
        """Write a corpus with all poisons close together, and a killer and milder ones anywhere."""
        first = self.random.randrange(self.items - len(Poison))
        kinds = self.random.sample(list(Poison), len(Poison))
        elsewhere = dict.fromkeys(self.random.sample(range(self.items), 3), Poison.MAKES_NAN)
        killer = {self.random.randrange(self.items): Poison.KILLS}
        return self._write(name, {**elsewhere, **killer, **dict(enumerate(kinds, first))})

    def _go(self, lane: tuple[Way, ...]) -> None:
        for way in cycle(lane):
            if self._stopping.is_set():
                return
            begun = time.monotonic()
            try:
                self._run(way)
            except Exception as error:  # noqa: BLE001 - a lane that dies silently would prove nothing
                self.said.append(f"{way}: {type(error).__name__}: {error}")
            least = _LEAST_POISONED_SECONDS if way.poisoned else _LEAST_SECONDS
            self._stopping.wait(max(0.0, least - (time.monotonic() - begun)))

    def _go_on_with_nights(self) -> None:
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                self.said += [f"{_NIGHTLY}: {each}" for each in self.nights.run()]
            except Exception as error:  # noqa: BLE001 - as above
                self.said.append(f"{_NIGHTLY}: {type(error).__name__}: {error}")
            self._stopping.wait(max(0.0, _LEAST_SECONDS - (time.monotonic() - begun)))

    def _run(self, way: Way) -> None:
        self._bury()
        key, lost = uuid4().hex, 0
        corpus = self._corpus(way, key)
        while True:
            rewinds = self.site.rewinds
            folder = self._folder(way, f"{key}-{lost}") if way.output else None
            try:
                job = self._submit(way, corpus, key, folder)
            except AssertionError as error:
                # Postgres forgot the submission that it was, which holds the folder.
                if rewinds == self.site.rewinds or _TAKEN not in str(error):
                    raise
                lost += 1
                continue
            said = self._judge(way, job, corpus)
            if not said or rewinds == self.site.rewinds:
                break
            # Postgres went back and forgot the job, or its end: submit it again, to an empty folder if the job is gone.
            lost += not self.site.rows("select from vectormill.jobs where id = :job", job=job)
        self.said += [f"{way}: job {job}: {each}" for each in said]
        if said:
            return
        self.poisons.update(corpus.poisons.values())
        self.ended.setdefault(way, []).append(self.items)
        if folder:  # otherwise a long drill fills its disk
            for name in list(storage.names_below(folder)):
                storage.delete(storage.join(folder, name))
        try:
            self.site.insist(lambda: purge_job(self.site.fleet.engine, job))
        except VectormillError:
            # Postgres may have gone back since the job was judged: it is running again, or gone.
            if rewinds == self.site.rewinds:
                raise
        self._purged.append(job)

    def _judge(self, way: Way, job: UUID, corpus: _Corpus) -> list[str]:
        """Wait for a job's end; return what is wrong with it."""
        rewinds = self.site.rewinds
        try:
            state = self._await_end(way, job)
            if state != "completed":
                rows = self.site.rows("select reason, message from vectormill.jobs where id = :job", job=job)
                return [f"is {state}: {[dict(row) for row in rows]}"]
            return self.site.insist(lambda: self._objections(way, job, corpus)) + leaks_of_job(self.site, job)
        except Exception as error:
            if rewinds == self.site.rewinds:
                raise
            return [f"{type(error).__name__}: {error}"]

    def _bury(self) -> None:
        """Cancel purged jobs that are there again since Postgres forgot the purge: nobody waits for them."""
        for job in self._purged:
            if self.site.rows("select from vectormill.jobs where id = :job", job=job):
                self.site.insist(lambda job=job: self._cancel(job))  # type: ignore[misc]

    def _cancel(self, job: UUID) -> None:
        with suppress(IllegalTransition), self.site.fleet.engine.begin() as connection:
            control.cancel(connection, job)

    def _objections(self, way: Way, job: UUID, corpus: _Corpus) -> list[str]:
        rows = self.site.rows("select index, code from vectormill.rejects where job_id = :job", job=job)
        with self.site.fleet.engine.begin() as connection:
            found = objections(connection, job, corpus.file, None if way.repeats else self._calm[way.model])
            if way.repeats:
                found += self._of_repeats(job, corpus, vectors(connection, job))
        rejected = {row["index"]: row["code"] for row in rows}
        wanted = {at: poison.code for at, poison in corpus.poisons.items()}
        if rejected != wanted:
            different = dict(sorted(rejected.items() ^ wanted.items())[:5])
            return [*found, f"{len(rejected)} rejects, {len(wanted)} poisons; different: {different}"]
        return found

    def _of_repeats(self, job: UUID, corpus: _Corpus, made: Mapping[int, npt.NDArray[np.float32]]) -> Iterator[str]:
        """Check that equal texts have equal vectors, and that each was embedded once; but a lost claim's texts are
        embedded one by one."""
        of_text: dict[str, list[npt.NDArray[np.float32]]] = {}
        texts = corpus.texts
        for index, vector in made.items():
            of_text.setdefault(texts[index], []).append(vector)
        if wrong := sum(not np.allclose(each, each[0], atol=1e-5) for each in of_text.values()):
            yield f"{wrong} texts have several vectors"
        sums = self.site.rows("select sum(embedded) as embedded from vectormill.chunks where job_id = :job", job=job)
        embedded = sums[0]["embedded"]
        losses = self.site.rows("select from vectormill.claim_losses where job_id = :job", job=job)
        # Between taking a text over and claiming its chunk again, two may embed it.
        most = len(of_text) + max(1, len(of_text) // 100)
        if embedded < len(of_text) or (embedded > most and not (losses or self.site.rewinds)):
            yield f"{embedded} texts embedded of {len(of_text)} different ones"

    def _submit(self, way: Way, corpus: _Corpus, key: str, folder: str | None = None) -> UUID:
        source = corpus.file.with_suffix(f".{way.corpus}")
        arguments = [str(source), "--model", way.model, "--idempotency-key", key]
        arguments += ["--by-reference" if way.corpus == "parquet" else "--by-value"]
        if folder:
            arguments += ["--output", folder]
        if not way.repeats:
            arguments += ["--no-reuse"]
        deadline = time.monotonic() + self.stuck_seconds
        while True:
            done = self.site.fleet.cli_process("submit", *arguments)
            if done.returncode == 0:
                return UUID(done.stdout.strip())
            passes = done.returncode == _UNREACHABLE or _NO_ROOM in done.stderr
            if not passes or time.monotonic() > deadline:
                raise AssertionError(f"submit ended with {done.returncode}: {done.stderr[-500:]}")

    def _folder(self, way: Way, key: str) -> str:
        if way.output == "store":
            return f"s3://{BUCKET}/{key}"
        return str((self.site.parquet.folder if self.site.parquet else self.site.folder / "parquet") / key)

    def _await_end(self, way: Way, job: UUID) -> str:
        deadline = time.monotonic() + self.stuck_seconds
        while time.monotonic() < deadline:
            query = "select state, reason, message from vectormill.jobs where id = :job"
            rows = self.site.rows(query, job=job)
            if not rows:
                return "gone"
            row = rows[0]
            # `submit` has returned, so a job in staging has lost the end of its submission with the end of a timeline.
            if row["state"] in ("completed", "failed", "cancelled", "staging"):
                return str(row["state"])
            if row["state"] == "paused":
                if self.explained.get(row["reason"], 0.0) < time.monotonic():
                    self.said.append(f"{way}: job {job} paused without a cause: {row['reason']}: {row['message']}")
                time.sleep(1.0)
                self.site.insist(lambda: self._resume(job))
            time.sleep(_POLL_SECONDS)
        query = """
            select id, state, fence, crashes, last_error from vectormill.chunks
            where job_id = :job and state <> 'done' limit 5
        """
        return f"stuck: {[dict(row) for row in self.site.rows(query, job=job)]}"

    def _resume(self, job: UUID) -> None:
        with self.site.fleet.engine.begin() as connection:
            try:
                control.resume(connection, job)
            except IllegalTransition:
                return
