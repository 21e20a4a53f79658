"""Oracle of a finished job: joins input with output, and trusts no counter. An empty list means no objection."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, text

from pipeline.chunk_io import parquet_data_set
from pipeline.db import embeddings
from pipeline.infra import storage
from pipeline.jobs.verification import verified_receipt
from tests.acceptance import witness
from tests.support.object_store import content_of

_LEAST_COSINE = 0.99999
#: Bound on the relative change of a vector's length, which float16 keeps.
_MOST_STRETCH = 1e-3


def objections(
    connection: Connection, job: UUID, corpus: Path, calm: UUID | None = None, losses: int | None = None
) -> list[str]:
    """Return all that is wrong with a job that should have ended, given the JSON lines it was made of, an undisturbed
    job on the same lines (`calm`), and the number of lost claims that a fault explains (`losses`)."""
    return [
        *_inputs(connection, job, corpus),
        *_counts(connection, job),
        *_fences(connection, job),
        *_files(connection, job),
        *(_losses(connection, job, losses) if losses is not None else ()),
        *(_vectors(connection, job, calm) if calm else ()),
    ]


def _inputs(connection: Connection, job: UUID, corpus: Path) -> Iterator[str]:
    """Check that every line of the corpus has exactly one outcome, under its own key."""
    keys = [str(json.loads(line)["id"]) for line in corpus.read_text(encoding="utf-8").splitlines()]
    state = connection.execute(text("select state from vectormill.jobs where id = :job"), {"job": job}).scalar_one()
    outcomes: dict[int, list[str]] = {}
    for index, key in (*_embedded(connection, job), *_rejected(connection, job)):
        outcomes.setdefault(index, []).append(key)
    missing = len(keys) - len(outcomes)
    if missing and state == "completed":
        yield f"{missing} items have no outcome"
    if double := sum(len(found) > 1 for found in outcomes.values()):
        yield f"{double} items have two outcomes"
    if strange := sum(index >= len(keys) or found[0] != keys[index] for index, found in outcomes.items()):
        yield f"{strange} outcomes under another key or index than the input's"


def _embedded(connection: Connection, job: UUID) -> Iterator[tuple[int, str]]:
    """Yield (index, key) of every vector that a reader of the job's output sees."""
    if folder := _output(connection, job):
        for table in _parts(folder):
            yield from zip(table["index"].to_pylist(), table["key"].to_pylist(), strict=True)
    else:
        yield from _pairs(connection, "select index, key from vectormill.embeddings where job_id = :job", job)


def _rejected(connection: Connection, job: UUID) -> Iterator[tuple[int, str]]:
    yield from _pairs(connection, "select index, key from vectormill.rejects where job_id = :job", job)


def _pairs(connection: Connection, query: str, job: UUID) -> Iterator[tuple[int, str]]:
    yield from connection.execute(text(query), {"job": job})


def _output(connection: Connection, job: UUID) -> str | None:
    query = text("select options->>'output' from vectormill.jobs where id = :job")
    folder: str | None = connection.execute(query, {"job": job}).scalar_one()
    return folder


def _parts(folder: str) -> Iterator[pa.Table]:
    """Yield the tables of the files that a data set's manifest lists; none without a manifest."""
    manifest = content_of(f"{folder}/_manifest.json")
    for file in json.loads(manifest)["files"] if manifest else ():
        yield pq.read_table(io.BytesIO(content_of(f"{folder}/{file['name']}") or b""))


def _counts(connection: Connection, job: UUID) -> Iterator[str]:
    """Check that the receipt, the usage and the rows agree, and that no chunk is left open."""
    receipt = verified_receipt(connection, job)
    if not receipt.verified:
        yield f"the receipt doesn't verify: {receipt}"
    usage = text("""
        select coalesce(sum(items + reused_items), 0)::bigint, coalesce(sum(prompt_tokens + reused_tokens), 0)::bigint
        from vectormill.usage where job_id = :job
    """)
    metered = connection.execute(usage, {"job": job}).one()
    told = (receipt.items.embedded + receipt.items.reused, receipt.tokens.prompt + receipt.tokens.reused)
    written = _written(connection, job)
    if written and not written == tuple(metered) == told:
        yield f"items and tokens: {written} written, {metered} metered, {told} on the receipt"
    open_chunks = "select count(*) from vectormill.chunks where job_id = :job and state in ('pending', 'running')"
    if stuck := _sum(connection, open_chunks, job):
        yield f"{stuck} chunks are stuck"


def _fences(connection: Connection, job: UUID) -> Iterator[str]:
    """Check that a chunk's commits came under growing fences, and the last one under the chunk's own."""
    stale = """
        select count(*) from (
          select u.fence, max(u.fence) over (partition by u.chunk_id order by u.id) as newest
          from vectormill.usage u where u.job_id = :job
        ) commits where fence < newest
    """
    if count := _sum(connection, stale, job):
        yield f"{count} commits under a stale fence"
    if count := witness.stale_commits(connection, job):
        yield f"{count} commits that the witness saw under another fence than the chunk's"
    ended_by_another = """
        select count(*) from vectormill.chunks c
        where c.job_id = :job and c.state = 'done' and c.fence > 0
          and c.fence is distinct from (select max(fence) from vectormill.usage where chunk_id = c.id)
    """
    if count := _sum(connection, ended_by_another, job):
        yield f"{count} chunks ended by a claim that had lost them"


def _files(connection: Connection, job: UUID) -> Iterator[str]:
    """Check that a data set's folder holds the files of its manifest, and beside them at most late files of lost
    claims: see docs/explanation/decisions/0005."""
    folder = _output(connection, job)
    manifest = folder and content_of(f"{folder}/{parquet_data_set.MANIFEST}")
    if not folder or not manifest:
        return
    wanted = {
        parquet_data_set.MANIFEST,
        parquet_data_set.SUCCESS,
        *(file["name"] for file in json.loads(manifest)["files"]),
    }
    found = set(storage.names_below(folder))
    query = text("select chunk_id, fence from vectormill.claim_losses where job_id = :job")
    lost = "|".join(f"{chunk}-{fence}" for chunk, fence in connection.execute(query, {"job": job}))
    late = (
        re.compile(rf"_staging/{job}/(part-({lost})-[0-9a-f]{{32}}(-\d+)?\.parquet|\.\w+\.partial)") if lost else None
    )
    strays = {name for name in found - wanted if not (late and late.fullmatch(name))}
    if wanted - found or strays:
        yield f"files: {sorted(wanted - found)[:5]} are missing, {sorted(strays)[:5]} are left over"


def _losses(connection: Connection, job: UUID, explained: int) -> Iterator[str]:
    """Check that faults explain all lost claims, since the work of a lost claim is done again."""
    lost = _sum(connection, "select count(*) from vectormill.claim_losses where job_id = :job", job)
    if lost > explained:
        yield f"{lost} claims were lost, {explained} of them for a cause"


def _sum(connection: Connection, query: str, job: UUID) -> int:
    return int(connection.execute(text(query), {"job": job}).scalar() or 0)


def _written(connection: Connection, job: UUID) -> tuple[int, int] | None:
    """Return the number of vectors, and of the tokens stored beside them; `None` for a data set that isn't there, since
    its job didn't complete."""
    folder = _output(connection, job)
    if folder is None:
        query = "select tokens from vectormill.embeddings where job_id = :job"
        tokens = [*connection.execute(text(query), {"job": job}).scalars()]
        return len(tokens), sum(tokens)
    tables = list(_parts(folder))
    return (sum(map(len, tables)), sum(int(np.sum(table["tokens"].to_numpy())) for table in tables)) if tables else None


def _vectors(connection: Connection, job: UUID, calm: UUID) -> Iterator[str]:
    ours, theirs = vectors(connection, job), vectors(connection, calm)
    if far := sum(index not in theirs or not _agree(vector, theirs[index]) for index, vector in ours.items()):
        yield f"{far} vectors differ from the calm run's"


def _agree(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> bool:
    """Return True if two vectors have the same direction and length. A zero or non-finite vector agrees with none."""
    if ours.shape != theirs.shape or not all(np.isfinite(each).all() and each.any() for each in (ours, theirs)):
        return False
    stretch = abs(np.linalg.norm(ours) / np.linalg.norm(theirs) - 1)
    return bool(cosine(ours, theirs) >= _LEAST_COSINE and stretch <= _MOST_STRETCH)


def vectors(connection: Connection, job: UUID) -> dict[int, npt.NDArray[np.float32]]:
    """Return a job's vectors by index."""
    if folder := _output(connection, job):
        return {
            index: np.asarray(vector, np.float32)
            for table in _parts(folder)
            for index, vector in zip(
                table["index"].to_pylist(), table["embedding"].to_numpy(zero_copy_only=False), strict=True
            )
        }
    return {row[0]: row[2] for block in embeddings.stream(connection, job) for row in block}


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
