"""The oracle: joins what went in with what came out, and trusts no counter. An empty list means it has no objection."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, text

from pipeline import status
from pipeline.store import embeddings

_LEAST_COSINE = 0.99999


def objections(connection: Connection, job: UUID, corpus: Path, calm: UUID | None = None) -> list[str]:
    """What is wrong with a job that has ended, given the JSON lines it was made of and a calm run of the same."""
    return [
        *_inputs(connection, job, corpus),
        *_counts(connection, job),
        *_fences(connection, job),
        *(_vectors(connection, job, calm) if calm else ()),
    ]


def _inputs(connection: Connection, job: UUID, corpus: Path) -> Iterator[str]:
    """Every line of the corpus has exactly one outcome, under its own key."""
    keys = [str(json.loads(line)["id"]) for line in corpus.read_text(encoding="utf-8").splitlines()]
    state = connection.execute(text("select state from vectormill.jobs where id = :job"), {"job": job}).scalar_one()
    outcomes: dict[int, list[str]] = {}
    for table in ("embeddings", "rejects"):
        rows = connection.execute(text(f"select index, key from vectormill.{table} where job_id = :job"), {"job": job})
        for index, key in rows:
            outcomes.setdefault(index, []).append(key)
    missing = len(keys) - len(outcomes)
    if missing and state == "completed":
        yield f"{missing} items have no outcome"
    if double := sum(len(found) > 1 for found in outcomes.values()):
        yield f"{double} items have two outcomes"
    if strange := sum(index >= len(keys) or found[0] != keys[index] for index, found in outcomes.items()):
        yield f"{strange} outcomes under another key or index than the input's"


def _counts(connection: Connection, job: UUID) -> Iterator[str]:
    """The receipt, the usage and the rows say the same."""
    receipt = status.receipt(connection, job, verify=True)
    if not receipt["verified"]:
        yield f"the receipt doesn't verify: {receipt}"
    tokens = _sum(connection, "select sum(tokens) from vectormill.embeddings where job_id = :job", job)
    metered = _sum(connection, "select sum(prompt_tokens) from vectormill.usage where job_id = :job", job)
    if not tokens == metered == receipt["tokens"]["prompt"]:
        yield f"tokens: {tokens} embedded, {metered} metered, {receipt['tokens']['prompt']} on the receipt"
    open_chunks = "select count(*) from vectormill.chunks where job_id = :job and state in ('pending', 'running')"
    if stuck := _sum(connection, open_chunks, job):
        yield f"{stuck} chunks are stuck"


def _fences(connection: Connection, job: UUID) -> Iterator[str]:
    """Commits of a chunk came under growing fences, the last one under the chunk's own."""
    stale = """
        select count(*) from (
          select u.fence, max(u.fence) over (partition by u.chunk_id order by u.id) as newest
          from vectormill.usage u where u.job_id = :job
        ) commits where fence < newest
    """
    if count := _sum(connection, stale, job):
        yield f"{count} commits under a stale fence"
    ended_by_another = """
        select count(*) from vectormill.chunks c
        where c.job_id = :job and c.state = 'done' and c.fence > 0
          and c.fence is distinct from (select max(fence) from vectormill.usage where chunk_id = c.id)
    """
    if count := _sum(connection, ended_by_another, job):
        yield f"{count} chunks ended by a claim that had lost them"


def _sum(connection: Connection, query: str, job: UUID) -> int:
    return int(connection.execute(text(query), {"job": job}).scalar() or 0)


def _vectors(connection: Connection, job: UUID, calm: UUID) -> Iterator[str]:
    ours, theirs = vectors(connection, job), vectors(connection, calm)
    if far := sum(cosine(ours[index], theirs[index]) < _LEAST_COSINE for index in ours.keys() & theirs.keys()):
        yield f"{far} vectors differ from the calm run's"


def vectors(connection: Connection, job: UUID) -> dict[int, npt.NDArray[np.float32]]:
    """A job's vectors by index."""
    return {row[0]: row[2] for block in embeddings.stream(connection, job) for row in block}


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
