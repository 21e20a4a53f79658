"""Eight ways through the pipeline: JSON lines or Parquet, by value or by reference, to Postgres or to files. All give
the same vectors by key, and each way's receipt verifies."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.db import embeddings, rejects
from pipeline.jobs.verification import verified_receipt
from tests.acceptance.fleet import Fleet

_DOCUMENTS = 50_000
_ROW_GROUP = 3_000


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the same rows as JSON lines and as Parquet, in two files each, with three rows that have no text."""
    folder = tmp_path_factory.mktemp("corpora")
    rows: list[dict[str, object]] = [
        {"id": f"d{n}", "text": f"document {n} tells of {n % 97} mills and {n % 89} rivers", "at": n}
        for n in range(_DOCUMENTS)
    ]
    rows[10]["text"] = ""
    rows[_DOCUMENTS // 2]["text"] = "   "
    rows[_DOCUMENTS - 1]["text"] = None
    halves = (rows[: _DOCUMENTS // 3], rows[_DOCUMENTS // 3 :])
    for kind in ("jsonl", "parquet"):
        (folder / kind).mkdir()
    for number, half in enumerate(halves):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in half)
        (folder / "jsonl" / f"{number}.jsonl").write_text(lines, encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(half), folder / "parquet" / f"{number}.parquet", row_group_size=_ROW_GROUP)
    return {kind: folder / kind for kind in ("jsonl", "parquet")}


@dataclass(frozen=True)
class Written:
    """Output of a job, in index order."""

    keys: list[str]
    indexes: list[int]
    vectors: npt.NDArray[np.float32]
    carried: list[str]


def test_all_eight_ways_give_the_same(fleet: Fleet, corpora: dict[str, Path], tmp_path: Path) -> None:
    fleet.environment |= {"VECTORMILL_CHUNK_ITEMS": "2000"}
    fleet.start_dispatcher()
    fleet.start_worker()
    found: list[Written] = []
    for kind, way, files in itertools.product(("jsonl", "parquet"), ("--by-value", "--by-reference"), (False, True)):
        folder = tmp_path / f"{kind}{way}"
        output = ["--output", str(folder)] if files else []
        job = fleet.submit(str(corpora[kind]), "--model", "static", way, "--carry", "at", *output)
        assert fleet.await_end(job)["state"] == "completed"
        with fleet.engine.begin() as connection:
            account = verified_receipt(connection, job)
            rejected = rejects.page(connection, job, -1, 10)
        assert account.verified, account
        assert account.items.embedded == _DOCUMENTS - 3
        codes = [(row["index"], row["code"]) for row in rejected]
        assert codes == [(10, "empty_text"), (_DOCUMENTS // 2, "empty_text"), (_DOCUMENTS - 1, "missing_text")]
        found.append(_from_files(folder) if files else _from_postgres(fleet, job))
    first = found[0]
    good = sorted(set(range(_DOCUMENTS)) - {10, _DOCUMENTS // 2, _DOCUMENTS - 1})
    assert first.keys == [f"d{n}" for n in good]
    for written in found:
        assert (written.keys, written.indexes) == (first.keys, good)
        assert written.carried == [str(n) for n in good]
        assert np.allclose(written.vectors, first.vectors, atol=1e-6)


def _from_postgres(fleet: Fleet, job: UUID) -> Written:
    with fleet.engine.begin() as connection:
        rows: list[Any] = [row for block in embeddings.stream(connection, job) for row in block]
    return Written(
        [row[1] for row in rows],
        [row[0] for row in rows],
        np.stack([row[2] for row in rows]),
        [str(row[5]["at"]) for row in rows],
    )


def _from_files(folder: Path) -> Written:
    """Read a data set's folder as its readers do."""
    assert (folder / "_SUCCESS").exists()
    assert not (folder / "_staging").exists()
    manifest = json.loads((folder / "_manifest.json").read_bytes())
    assert {file["name"] for file in manifest["files"]} == {path.name for path in folder.glob("*.parquet")}
    table = ds.dataset(folder).to_table().sort_by("index")
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return Written(
        table["key"].to_pylist(), table["index"].to_pylist(), flat.reshape(len(table), -1), table["at"].to_pylist()
    )
