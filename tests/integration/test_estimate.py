"""Job estimates compared with the real cost, by the real tokeniser."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from pipeline.core.errors import SourceError, UserError
from pipeline.core.models import Model
from pipeline.core.options import Columns, JobOptions
from pipeline.db import usage
from pipeline.ingest.estimate import estimate
from pipeline.sources import Corpus
from tests.support.jobs_made import make_model
from workers.encoders.local import LocalEncoder

_DOCUMENTS = 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a corpus: a fifth of its texts are duplicates, one in a thousand is empty, and lengths differ widely."""
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    with path.open("w") as file:
        for n in range(_DOCUMENTS):
            same = n - 1 if n % 5 == 4 else n
            text = "" if n % 1_000 == 999 else f"{same} mill " * (same * 7_919 % 97 + 1)
            file.write(json.dumps({"id": n, "text": text}) + "\n")
    return path


@pytest.fixture
def model(engine: Engine) -> Model:
    return replace(make_model(engine, tokens_per_second=10_000.0), max_item_tokens=64, dimensions=384)


@pytest.fixture(scope="module")
def encoder(static_model: Path) -> LocalEncoder:
    return LocalEncoder(static_model, "cpu")


@pytest.mark.parametrize("by_reference", [False, True])
def test_the_truth_lies_in_the_interval(corpus: Path, model: Model, encoder: LocalEncoder, by_reference: bool) -> None:
    def tokenise(texts: Sequence[str], most: int | None) -> tuple[Sequence[int], Sequence[bool]]:
        read = encoder.tokenise(list(texts), most)
        return read.lengths.tolist(), read.truncated.tolist()

    source = Corpus([str(corpus)], Columns(), 100_000)
    found = estimate(source, model, JobOptions(by_reference=by_reference), 2, tokenise)
    texts = [each.decode() for rows in source.blocks() for each in rows.texts if each]
    lengths, cut = tokenise(texts, 64)
    assert found["items"]["total"] == _DOCUMENTS
    tokens = found["tokens"]
    margin = (tokens["high"] - tokens["low"]) / 2
    assert abs(sum(lengths) - tokens["total"]) < 2 * margin
    assert 0 < margin < tokens["total"] / 20
    assert found["truncated"]["share"] == pytest.approx(sum(cut) / len(cut), abs=0.05)
    assert found["time"] == {"seconds": round(tokens["total"] / 20_000, 1), "slots": 2, "tokens_per_second": 20_000.0}
    if by_reference:
        assert tokens["sampled_items"] == pytest.approx(2_000, abs=20)
    else:
        assert found["items"]["rejected"] == 20
        assert found["duplicates"]["share"] == pytest.approx(1 - len(set(texts)) / len(texts), abs=1e-4)


def test_where_the_bytes_go(corpus: Path, model: Model) -> None:
    def tokenise(texts: Sequence[str], _: int | None) -> tuple[Sequence[int], Sequence[bool]]:
        return [1] * len(texts), [False] * len(texts)

    def of(**options: object) -> dict[str, int]:
        made = JobOptions.model_validate(options)
        found: dict[str, int] = estimate(Corpus([str(corpus)], Columns(), 100_000), model, made, 0, tokenise)["bytes"]
        return found

    rows, halves, files = of(), of(dtype="float16"), of(by_reference=True, output="/somewhere")
    assert files["postgres"] == 0
    assert 384 * 4 * _DOCUMENTS < files["parquet"] < 384 * 4 * _DOCUMENTS * 1.1
    assert rows["parquet"] == 0
    assert rows["postgres"] > 384 * 4 * _DOCUMENTS
    assert halves["postgres"] < rows["postgres"] - 384 * _DOCUMENTS


def test_a_wrong_column_is_said(corpus: Path, model: Model) -> None:
    source = Corpus([str(corpus)], Columns(text="body"), 100)
    with pytest.raises(SourceError, match='no column "body"'):
        estimate(source, model, JobOptions(), 0, lambda texts, _: ([], []))


def test_what_is_not_refused_is_said(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "docs.tsv"
    path.write_text('ID\ttext\n1\t"mill"\n')
    for by_reference in (False, True):
        source, options = Corpus([str(path)], Columns(), 1_000), JobOptions(by_reference=by_reference)
        found = estimate(source, model, options, 1, lambda texts, _: ([1] * len(texts), [False] * len(texts)))
        assert ['If "ID" holds keys' in found["notices"][0], "fields stand in quotes" in found["notices"][1]] == [
            True
        ] * 2
    with pytest.raises(UserError, match=r"max_item_tokens 65: .* reads 64 tokens of a text at most"):
        estimate(source, model, JobOptions(max_item_tokens=65), 1, lambda texts, _: ([], []))


def test_the_rate_follows_what_workers_did_last(engine: Engine) -> None:
    """The rate follows up and down: work of an hour ago counts next to nothing."""
    name = make_model(engine, tokens_per_second=400.0).name

    def work(tokens: int, minutes_ago: int) -> float | None:
        with engine.begin() as connection:
            connection.execute(
                text("""
                    insert into vectormill.usage
                      (workspace_id, job_id, model, prompt_tokens, device_seconds, created_at, device, precision)
                    values (1, gen_random_uuid(), :model, :tokens, 10, now() - make_interval(mins => :age), 'cpu',
                            'float32')
                """),
                {"model": name, "tokens": tokens, "age": minutes_ago},
            )
            measured = usage.measured_rates(connection, 3_600, 5)
            return next((float(row["rate"]) for row in measured if row["model"] == name), None)

    assert work(1_000, 70) is None
    assert work(4_000, 55) == pytest.approx(400)
    assert work(35_000, 10) == pytest.approx(3_500, rel=0.01)
    assert work(4_000, 0) == pytest.approx(400 + 3_100 * 0.12, rel=0.1)
