"""Lines of a batch request's file: each is read or rejected with a code, whatever the file holds."""

import io
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.chunks import RejectCode
from pipeline.core.errors import SourceError
from pipeline.sources.batch_lines import ENDPOINT, BatchLines

ITEM_BYTES = 60
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\ud800\0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("static") | ANYTHING, "input": st.sampled_from(["text", ["text"], "x" * 70, ""]) | ANYTHING},
    optional={
        "encoding_format": st.just("base64") | ANYTHING,
        "dimensions": st.just(64) | ANYTHING,
        "input_type": st.just("document") | ANYTHING,
        "user": st.just("\ud800") | ANYTHING,
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=5) | ANYTHING,
        "method": st.just("POST") | ANYTHING,
        "url": st.just(ENDPOINT) | ANYTHING,
        "body": BODIES | ANYTHING,
    },
)
LINES = st.one_of(
    st.builds(lambda row: json.dumps(row).encode(), REQUESTS | ANYTHING),
    st.builds(
        lambda row, at, put: (line := json.dumps(row).encode())[: at % len(line)] + put,
        REQUESTS,
        st.integers(0),
        st.binary(max_size=4),
    ),
    st.binary(max_size=9),
    st.sampled_from([b"", b" \t", b"[" * 5_000, b"9" * 5_000, "é".encode("utf-16"), b"\xef\xbb\xbf{}"]),
)
GOOD = b'{"custom_id": "good", "method": "POST", "url": "%s", "body": {"model": "static", "input": "text"}}'


def opened(data: bytes) -> BatchLines:
    return BatchLines("a.jsonl", "file:a", "0" * 64, len(data), lambda: io.BytesIO(data), ITEM_BYTES)


@settings(max_examples=400, derandomize=True)
@given(lines=st.lists(LINES, max_size=5), first=st.booleans())
def test_each_line_is_read_or_rejected(lines: list[bytes], first: bool) -> None:
    good = GOOD % ENDPOINT.encode()
    data = b"\n".join([good, *lines] if first else [*lines, good])
    try:
        survey = opened(data).survey(1_000)
        blocks = list(opened(data).blocks())
    except SourceError as error:
        refused = str(error)
        assert refused.startswith("a.jsonl: the file is ")
        return
    faults = [fault.message for fault in (*survey.faults, *survey.bad_lines)]
    texts = [text for rows in blocks for text in rows.texts]
    problems = [problem for rows in blocks for problem in rows.problems]
    assert survey.lines == len(texts)
    assert sum(text is None for text in texts) == len(problems)
    assert all(isinstance(code, RejectCode) for _, code, _ in problems)
    for message in (*faults, *(message for _, _, message in problems)):
        assert message.isprintable()
        assert len(message) < 300
    if first:
        assert (blocks[0].keys[0], texts[0]) == ("good", b"text")
