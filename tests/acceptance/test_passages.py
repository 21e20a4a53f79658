"""Passages of long texts: by value and by reference, to Postgres and to files, while a worker dies."""

import json
import os
import signal
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from sqlalchemy import text

from pipeline.cli.demo import docstrings
from pipeline.jobs.verification import verified_receipt
from tests.acceptance.fleet import Fleet

_DOCUMENTS = 2_000
_PACKAGES = Path("/var/lib/dpkg/status")
_LICENCES = Path("/usr/share/doc")


def _long_texts() -> list[tuple[str, str]]:
    """Return 2,000 real texts with subjects: Debian's packages and licences where there are any, and several docstrings
    each."""
    found: list[tuple[str, str]] = []
    if _PACKAGES.exists():
        for package in _PACKAGES.read_text(encoding="utf-8").split("\n\n")[:300]:
            name, _, rest = package.partition("\n")
            if "\nDescription: " in rest:
                found.append((name.removeprefix("Package: "), rest[rest.index("\nDescription: ") + 1 :]))
    licences = sorted(_LICENCES.glob("*/copyright"))[:200]
    found += [(path.parent.name, path.read_text(encoding="utf-8", errors="replace")[:6_000]) for path in licences]
    together: list[str] = []
    for where, doc in docstrings():
        together.append(doc.replace("\0", ""))
        if sum(map(len, together)) > 800:
            found.append((where, "\n\n".join(together)[:3_000]))
            together.clear()
        if len(found) == _DOCUMENTS:
            break
    return found


@dataclass(frozen=True)
class Corpus:
    """Rows with subject and body, as JSON lines and as Parquet."""

    bodies: dict[str, str]
    subjects: dict[str, str]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("long")
    rows = [{"id": f"t{n}", "subject": subject, "body": body} for n, (subject, body) in enumerate(_long_texts())]
    assert len(rows) == _DOCUMENTS
    lines, parquet = folder / "long.jsonl", folder / "long.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), parquet, row_group_size=300)
    return Corpus(
        bodies={row["id"]: row["body"] for row in rows},
        subjects={row["id"]: row["subject"] for row in rows},
        files={"jsonl": lines, "parquet": parquet},
    )


@dataclass(frozen=True)
class Passage:
    """A passage's row, as a reader of the output sees it."""

    key: str
    passage: int
    start: int
    stop: int
    tokens: int
    vector: npt.NDArray[np.float32]


_COLUMNS = ("key", "passage", "start", "stop", "tokens")


def _read(fleet: Fleet, job: UUID, folder: Path | None) -> list[Passage]:
    if folder:
        found = ds.dataset(folder, exclude_invalid_files=True).to_table().to_pylist()
        return [
            Passage(**{name: row[name] for name in _COLUMNS}, vector=np.asarray(row["embedding"], dtype=np.float32))
            for row in found
        ]
    query = text(f"select {', '.join(_COLUMNS)}, vector::text from vectormill.passages where job_id = :job")
    with fleet.engine.begin() as connection:
        rows = connection.execute(query, {"job": job}).all()
    return [
        Passage(**dict(zip(_COLUMNS, row[:-1], strict=True)), vector=np.array(json.loads(row[-1]), dtype=np.float32))
        for row in rows
    ]


def _whole_texts(found: list[Passage], bodies: dict[str, str]) -> dict[str, str]:
    """Return each key's text as its passages give it, in order and without a gap."""
    of_key: dict[str, list[Passage]] = defaultdict(list)
    for each in found:
        of_key[each.key].append(each)
    for key, passages in of_key.items():
        passages.sort(key=lambda each: each.passage)
        assert [each.passage for each in passages] == list(range(len(passages))), f"{key}: missing or double"
    return {key: "".join(bodies[key][each.start : each.stop] for each in some) for key, some in of_key.items()}


@pytest.mark.parametrize(
    ("kind", "way", "files"),
    [
        pytest.param("jsonl", "--by-value", False, id="by-value-postgres"),
        pytest.param("parquet", "--by-reference", True, id="by-reference-parquet"),
        pytest.param("jsonl", "--by-value", True, id="by-value-parquet", marks=pytest.mark.nightly),
        pytest.param("parquet", "--by-reference", False, id="by-reference-postgres", marks=pytest.mark.nightly),
    ],
)
def test_passages_give_each_text_back(
    fleet: Fleet, corpus: Corpus, static_model: Path, tmp_path: Path, kind: str, way: str, *, files: bool
) -> None:
    fleet.start_dispatcher()
    fleet.start_worker()
    folder = tmp_path / "vectors" if files else None
    job = fleet.submit(
        *(str(corpus.files[kind]), "--model", "static", "--text", "{body}", "--split", "64", way),
        *(("--output", str(folder)) if folder else ()),
    )
    child, *_ = fleet.child_at_work(job)
    os.kill(child.pid, signal.SIGKILL)
    ended = fleet.await_end(job)
    assert fleet.cli("rejects", str(job), "--json").stdout.strip() == "[]"
    assert (ended["state"], ended["items"]["embedded"]) == ("completed", _DOCUMENTS)
    with fleet.engine.begin() as connection:
        receipt = verified_receipt(connection, job)
    found = _read(fleet, job, folder)
    assert (receipt.verified, receipt.passages, receipt.items.embedded) == (True, len(found), _DOCUMENTS)
    assert len(found) > 3 * _DOCUMENTS
    assert _whole_texts(found, corpus.bodies) == corpus.bodies
    assert max(each.tokens for each in found) <= 64
    assert ended["passages"] == len(found)
    assert receipt.truncated == 0
    alone = SentenceTransformer(str(static_model), device="cpu").encode(
        [corpus.bodies[each.key][each.start : each.stop] for each in found[::50]]
    )
    made = np.stack([each.vector for each in found[::50]])
    cosine = (alone * made).sum(1) / (np.linalg.norm(alone, axis=1) * np.linalg.norm(made, axis=1))
    assert cosine.min() > 1 - 1e-5
