"""Demo state of a lively night, for screenshots: jobs in every state, workers, usage of a month. It is written straight
into the tables, so that it looks the same each time."""

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine, text
from uuid_utils.compat import uuid7

from pipeline.catalog import models as catalog
from pipeline.core.chunks import RejectCode
from pipeline.core.collections import VersionState
from pipeline.core.jobs import JobState
from pipeline.db import collections, engines, jobs, models, staging, tables, workers, workspaces
from pipeline.jobs import control, status

LOCAL, SMALL, FAR = "all-MiniLM-L6-v2", "static-256", "text-embedding-3-small"
_PRICES = {LOCAL: Decimal("0.004"), SMALL: Decimal("0.001"), FAR: Decimal("0.02")}
_PER_CHUNK = 250
_MESSAGES = {
    RejectCode.EMPTY_TEXT: "the text is empty",
    RejectCode.TOO_LONG: "{} tokens, the model reads 256",
    RejectCode.BAD_ROW: "line {}: not a JSON object",
    RejectCode.ENCODE_FAILED: "the model failed: RuntimeError",
    RejectCode.CRASHED_WORKER: "two workers died while they embedded it",
    RejectCode.GATEWAY_REFUSED: "400: input is too long",
}


#: Description of a model, with enough for pages that only show it.
_DESCRIPTION = {
    "weights_sha256": "0",
    "weights_bytes": 1,
    "dimensions": 256,
    "max_item_tokens": None,
    "normalised": True,
    "canary": "00000000",
    "tokens_per_second": 310_000.0,
}


class Night:
    """Writer of the demo state, with a fixed random seed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._dice = random.Random(7)
        self._now = datetime.now(UTC)
        self._workspace = catalog.workspace_id(connection)
        for name in (LOCAL, SMALL, FAR):
            catalog.add_model(connection, name, {**_DESCRIPTION, "path": f"/models/{name}"})
            models.change(connection, name, price_per_million=_PRICES[name])
        models.change(connection, LOCAL, aliases=["text-embedding-ada-002"], dimensions=384, tokens_per_second=4_310.0)
        self._run("update vectormill.models set max_item_tokens = 256 where name = :name", name=LOCAL)
        self._run(
            "update vectormill.models set kind = 'gateway', gateway_url = 'https://api.openai.com/v1', "
            "upstream_model = name, request_inputs = 2048, request_tokens = 100000, path = null, dimensions = 1536, "
            "max_item_tokens = 8192, tokens_per_second = 41000 where name = :name",
            name=FAR,
        )
        other = workspaces.create(connection, "search-team", 2.0)
        assert other
        workspaces.enable_models(connection, other, [LOCAL, FAR])
        self._other = other
        self.jobs: dict[str, UUID] = {}

    def _run(self, statement: str, **values: Any) -> None:
        self._connection.execute(text(statement), values)

    def fleet(self) -> None:
        """Write two busy workers, one that rests, one that is silent, and two engines, one of which has no model."""
        self._workers = [uuid4() for _ in range(4)]
        shown = [
            ("gpu-01", "cuda:0", "NVIDIA H200", [LOCAL, SMALL, FAR], 2, 3),
            ("gpu-01", "cuda:1", "NVIDIA H200", [LOCAL, SMALL, FAR], 2, 4),
            ("batch-07", "cpu", "cpu", [SMALL], 1, 9),
            ("batch-09", "cpu", "cpu", [SMALL, FAR], 1, 412),
        ]
        for worker, (host, device, kind, served, slots, silence) in zip(self._workers, shown, strict=True):
            workers.show(
                self._connection,
                worker,
                name=f"{device.replace(':', '')}-3f9a1c@{host}",
                host=host,
                device=device,
                device_kinds=[kind],
                models=served,
                slots=slots,
            )
            self._run(
                "update vectormill.workers set started_at = now() - interval '9 hours', "
                "seen_at = now() - make_interval(secs => :silence) where id = :worker",
                worker=worker,
                silence=silence,
            )
        reason = "the canary's vector differs by 3.1e-03: other weights than the catalogue's, or a faulty device"
        workers.drop_model(self._connection, self._workers[2], LOCAL, reason)
        workers.rest(self._connection, self._workers[2], "lost 3 chunks in a row; paused, retries later")
        url = "http://10.0.4.11:8100"
        engines.show(self._connection, uuid4(), url=url, models=[], device="cuda:1")
        engines.show(self._connection, uuid4(), url="http://10.0.4.12:8100", models=[LOCAL], device="cuda:0")

    def job(
        self,
        name: str,
        state: JobState,
        *,
        items: int,
        model: str = LOCAL,
        done: float = 1.0,
        began_minutes: float = 0.0,
        took_minutes: float = 0.0,
        rejects: Mapping[RejectCode, int] = {},
        reused: float = 0.0,
        tokens_each: int = 84,
        workspace: int | None = None,
        **columns: Any,
    ) -> None:
        """Write a job that has done the share `done` of its chunks."""
        made = self._now - timedelta(minutes=began_minutes, seconds=4)
        job_id = uuid7()
        of_model = catalog.find_model(self._connection, self._workspace, model)
        new = staging.NewJob(
            id=job_id,
            workspace_id=workspace or self._workspace,
            name=name,
            model_name=model,
            vector_space_id=catalog.vector_space_of(self._connection, of_model, dimensions=None, max_item_tokens=None),
            priority=columns.pop("priority", 0),
            labels=columns.pop("labels", {}),
            lease_seconds=30,
            submitted_by="airflow@etl-1",
        )
        producer = staging.begin(self._connection, new)
        assert producer
        staging.insert_inputs(
            self._connection,
            job_id,
            [{"uri": f"/data/{name}.jsonl", "etag": "1", "bytes": items * 310, "rows": items}],
        )
        if state != JobState.STAGING:
            staging.queue(self._connection, producer, items_total=items, max_rejects=items // 10, payload="")
        started = made + timedelta(seconds=3) if done or state == JobState.RUNNING else None
        total_chunks = -(-items // _PER_CHUNK)
        over = round(total_chunks * done)
        per_code = self._rejects(job_id, over * _PER_CHUNK, rejects)
        written = []
        for ordinal in range(total_chunks):
            first = ordinal * _PER_CHUNK
            size = min(_PER_CHUNK, items - first)
            written.append(self._chunk(job_id, ordinal, first, size, over, state, per_code, reused, tokens_each))
        if written:
            self._connection.execute(tables.chunks.insert(), written)
        if started and over:
            end = started + timedelta(minutes=took_minutes) if took_minutes else self._now
            self._usage(new, written[:over], started, end)
        finished = started + timedelta(minutes=took_minutes) if started and state.ended else None
        self._connection.execute(
            tables.jobs.update()
            .where(tables.jobs.c.id == job_id)
            .values(state=state.value, created_at=made, started_at=started, finished_at=finished, **columns)
        )
        self._run(
            "update vectormill.job_history set changed_at = case when state in ('staging', 'queued') then :made "
            "when state = 'running' then :started else coalesce(:finished, :now) end where job_id = :job",
            made=made,
            started=started,
            finished=finished,
            now=self._now,
            job=job_id,
        )
        if state.ended:
            receipt = status.current_account(self._connection, job_id).model_dump(by_alias=True)
            self._connection.execute(tables.jobs.update().where(tables.jobs.c.id == job_id).values(receipt=receipt))
        self.jobs[name] = job_id

    def _rejects(self, job_id: UUID, items: int, rejects: Mapping[RejectCode, int]) -> dict[int, int]:
        """Write rejects at random places. Return their number per chunk."""
        per_chunk: dict[int, int] = {}
        places = self._dice.sample(range(items), sum(rejects.values()))
        codes = [code for code, count in rejects.items() for _ in range(count)]
        for index, code in zip(places, codes, strict=True):
            message = _MESSAGES[code].format(f"{self._dice.randrange(260, 900):,}")
            row = {"job_id": job_id, "index": index, "key": f"doc-{index:05}", "code": code, "message": message}
            self._connection.execute(tables.rejects.insert(), row)
            unread = code in (RejectCode.EMPTY_TEXT, RejectCode.BAD_ROW)
            kept = None if unread else "The mill stands by the river. " * 30
            self._connection.execute(
                tables.items.insert(), {"job_id": job_id, "index": index, "key": f"doc-{index:05}", "text": kept}
            )
            per_chunk[index // _PER_CHUNK] = per_chunk.get(index // _PER_CHUNK, 0) + 1
        return per_chunk

    def _chunk(
        self,
        job_id: UUID,
        ordinal: int,
        first: int,
        size: int,
        over: int,
        state: JobState,
        per_code: Mapping[int, int],
        reused: float,
        tokens_each: int,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "job_id": job_id,
            "ordinal": ordinal,
            "first_index": first,
            "items": size,
            "estimated_tokens": size * tokens_each,
            "state": "pending",
            "fence": 0,
            **dict.fromkeys(("embedded", "reused", "rejected", "cancelled", "prompt_tokens", "reused_tokens"), 0),
            **dict.fromkeys(("crashes",), 0),
            "last_error": None,
            "worker_id": None,
            "lease_until": None,
        }
        if ordinal < over:
            rejected = per_code.get(ordinal, 0)
            again = round((size - rejected) * reused)
            row |= {
                "state": "done",
                "fence": 1 + (self._dice.random() < 0.04),
                "rejected": rejected,
                "reused": again,
                "embedded": size - rejected - again,
                "prompt_tokens": round((size - rejected - again) * tokens_each * self._dice.uniform(0.9, 1.1)),
                "reused_tokens": again * tokens_each,
            }
        elif state == JobState.RUNNING and ordinal < over + 2:
            row |= {
                "state": "running",
                "fence": 1,
                "worker_id": self._workers[ordinal % 2],
                "lease_until": self._now + timedelta(days=1),
            }
        elif state == JobState.RUNNING and ordinal == over + 3:
            row |= {"fence": 2, "crashes": 1, "last_error": "lease expired"}
        elif state in (JobState.CANCELLED, JobState.FAILED):
            row |= {"state": "cancelled", "cancelled": size}
        return row

    def _usage(self, job: staging.NewJob, written: list[dict[str, Any]], begin: datetime, end: datetime) -> None:
        step = (end - begin) / len(written)
        rows = [
            {
                "workspace_id": job.workspace_id,
                "job_id": job.id,
                "fence": 1,
                "part": 0,
                "model": job.model_name,
                "items": row["embedded"],
                "prompt_tokens": row["prompt_tokens"],
                "total_tokens": row["prompt_tokens"],
                "device_seconds": 1.9 * step.total_seconds(),
                "cost": _PRICES[job.model_name] * row["prompt_tokens"] / 1_000_000,
                "created_at": begin + step * (at + self._dice.uniform(0.1, 1.0)),
            }
            for at, row in enumerate(written)
        ]
        self._connection.execute(tables.usage.insert(), rows)

    def month(self, key_ids: Mapping[str, str]) -> None:
        """Write requests of the last month."""
        rows = []
        for day in range(30):
            moment = self._now - timedelta(days=day, hours=1)
            quiet = 0.35 if moment.weekday() >= 5 else 1.0
            for name, key_id in key_ids.items():
                tokens = round(self._dice.uniform(0.6, 1.4) * 1_100_000 * quiet / (1 + len(name) % 3))
                model = self._dice.choice([LOCAL, FAR])
                rows.append(
                    {
                        "workspace_id": self._workspace,
                        "key_id": key_id,
                        "request_id": f"req_{uuid4().hex}",
                        "model": model,
                        "items": tokens // 70,
                        "prompt_tokens": tokens,
                        "total_tokens": tokens,
                        "cost": _PRICES[model] * tokens / 1_000_000,
                        "created_at": moment,
                    }
                )
        self._connection.execute(tables.usage.insert(), rows)

    def all_jobs(self) -> None:
        """Write jobs in every state."""
        done, other = JobState.COMPLETED, self._other
        ago = 60 * 24
        self.job("wiki-passages", done, items=48_000, began_minutes=3 * ago, took_minutes=63, reused=0.1)
        self.job(
            "support-tickets-2025",
            done,
            items=12_400,
            model=FAR,
            began_minutes=2 * ago,
            took_minutes=9,
            rejects={RejectCode.GATEWAY_REFUSED: 3},
        )
        self.job(
            "product-catalogue",
            JobState.CANCELLED,
            items=20_000,
            done=0.4,
            began_minutes=ago + 90,
            took_minutes=11,
            reason="by_user",
            message="cancelled by a person",
        )
        self.job(
            "docs-nightly",
            done,
            items=9_800,
            began_minutes=ago,
            took_minutes=12.4,
            reused=0.7,
            rejects={RejectCode.EMPTY_TEXT: 11},
        )
        self.job(
            "crawl-0731",
            JobState.FAILED,
            items=15_000,
            done=0.55,
            began_minutes=190,
            took_minutes=17,
            rejects={RejectCode.BAD_ROW: 1_212, RejectCode.TOO_LONG: 301, RejectCode.ENCODE_FAILED: 14},
            reason="too_many_rejects",
            message=control.too_many(1_527, 1_500),
        )
        self.job("faq-answers", done, items=640, model=SMALL, began_minutes=75, took_minutes=0.2)
        self.job(
            "mail-archive",
            JobState.PAUSED,
            items=80_000,
            model=FAR,
            done=0.31,
            began_minutes=52,
            took_minutes=20,
            reason="key_refused",
            workspace=other,
            message="the upstream refuses the key in OPENAI_API_KEY (401)",
        )
        self.job(
            "docs-nightly",
            JobState.RUNNING,
            items=50_000,
            done=0.71,
            began_minutes=11,
            reused=0.033,
            rejects={RejectCode.EMPTY_TEXT: 28, RejectCode.TOO_LONG: 12, RejectCode.CRASHED_WORKER: 2},
            labels={"team": "search", "trigger": "nightly"},
        )
        self.job(
            "release-notes",
            JobState.RUNNING,
            items=6_500,
            model=SMALL,
            done=0.2,
            began_minutes=1.5,
            workspace=other,
            priority=5,
        )
        self.job("reviews-de", JobState.QUEUED, items=31_000, done=0, began_minutes=8)
        self.job("reviews-fr", JobState.QUEUED, items=27_300, done=0, began_minutes=6, workspace=other)
        self.job("reviews-it", JobState.QUEUED, items=18_900, done=0, began_minutes=5)
        self.job("forum-2026", JobState.STAGING, items=0, done=0, began_minutes=0.4)

    def collections(self) -> None:
        """Write a collection with a week of syncs and an upgrade, and one that is stale."""
        tickets = self._collection("tickets", 12_480, {"text": "{subject}\n\n{body}", "carry": ["lang"]}, days=1)
        self._upgrade(tickets, 9_310)
        self._collection("handbook", 940, {"split": 256}, days=2, workspace=self._other)
        for ago in range(7):
            few = self._dice.randrange(40, 160)
            begun = self._now - timedelta(days=ago, hours=3)
            self._run(
                "insert into vectormill.syncs (job_id, collection_id, version_id, is_whole, last_slot, unchanged, "
                "removed, added, changed, tokens_saved, created_at, settled_at) "
                "select coalesce(:job, gen_random_uuid()), c.id, v.id, :whole, 0, :unchanged, :removed, :added, "
                ":changed, :saved, :begun, :begun + interval '14 seconds' "
                "from vectormill.collections c join vectormill.collection_versions v on v.collection_id = c.id "
                "where c.id = :collection and v.state = 'current'",
                job=self.jobs["faq-answers"] if ago == 0 else None,
                collection=tickets,
                whole=ago != 2,
                unchanged=12_400 - few if ago != 2 else 0,
                removed=few // 4,
                added=few // 3,
                changed=few,
                saved=(12_400 - few) * 84 if ago != 2 else 0,
                begun=begun,
            )

    def _collection(
        self, name: str, keys: int, options: dict[str, Any], days: int, workspace: int | None = None
    ) -> int:
        model = catalog.find_model(self._connection, self._workspace, LOCAL)
        space = catalog.vector_space_of(self._connection, model, dimensions=None, max_item_tokens=None)
        owner = workspace or self._workspace
        assert collections.create(
            self._connection,
            owner,
            name=name,
            view=name,
            expect_every=timedelta(days=days),
            model=LOCAL,
            vector_space_id=space,
            options=options,
        )
        made = collections.by_name(self._connection, owner, name)
        assert made
        self._fill(made.version_id, keys)
        self._run("update vectormill.collections set created_at = now() - interval '9 days' where id = :id", id=made.id)
        return made.id

    def _upgrade(self, collection: int, keys: int) -> None:
        model = catalog.find_model(self._connection, self._workspace, FAR)
        collections.add_version(
            self._connection,
            collection,
            model=FAR,
            vector_space_id=catalog.vector_space_of(self._connection, model, dimensions=None, max_item_tokens=None),
            options={},
            state=VersionState.NEXT,
        )
        self._fill(collections.versions(self._connection, collection)[VersionState.NEXT].version_id, keys)

    def _fill(self, version: int, keys: int) -> None:
        self._run(
            "insert into vectormill.collection_keys (version_id, key, identity, tokens, job_id) "
            "select :version, n::text, '', 84, gen_random_uuid() from generate_series(1, :keys) n",
            version=version,
            keys=keys,
        )


def fill(engine: Engine, key_ids: Mapping[str, str]) -> dict[str, UUID]:
    """Write the whole state, with usage of the keys in `key_ids`, by name. Return the jobs by name."""
    with engine.begin() as connection:
        night = Night(connection)
        night.fleet()
        night.all_jobs()
        night.collections()
        night.month(key_ids)
    return night.jobs


def stay_awake(engine: Engine) -> None:
    """Set the heartbeats of engines, and of workers seen lately, to now, and do what a dispatcher does each second."""
    with engine.begin() as connection:
        connection.execute(
            text("""
                update vectormill.usage u set created_at = u.created_at + (now() - newest.at)
                from (select job_id, max(created_at) as at from vectormill.usage group by 1) newest
                join vectormill.jobs j on j.id = newest.job_id and j.state = 'running'
                where u.job_id = newest.job_id
            """)
        )
        workers.hold_lease(connection, workers.DISPATCHER_ROLE, "a dispatcher", 600)
        for job in jobs.active(connection):
            progress = status.sum_up(connection, job.id)
            jobs.save_progress(connection, job.id, progress.model_dump(mode="json"))
        connection.execute(
            text("update vectormill.workers set seen_at = now() where seen_at > now() - interval '5 minutes'")
        )
        connection.execute(text("update vectormill.engines set seen_at = now()"))
