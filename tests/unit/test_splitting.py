"""Passages of texts: they cover the text, none is over the bound, and offsets are exact."""

import pydoc_data.topics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.core.options import SplitBy
from tests.support.models import bundled_folder
from workers.encoders import splitting
from workers.encoders.batching import LEAST_TOKENS, Span, SplitRule, entitled
from workers.encoders.splitting import Splitter

#: Tokens that a part of a text may have by itself beyond those that it has within the text.
_MERGED = 6
#: Letters that tokenisers and Unicode treat in special ways: emoji of several characters, combining marks, line ends,
#: right-to-left, scripts without spaces.
_ODD = [
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "é",
    "à́̂",
    "\r\n",
    "\n\n",
    "\u2028",
    "שלום",
    "مرحبا",
    "世界。",
    "こんにちは",
    "ﬁ",
    "\u200b",
    "\t",
    " ",
    "ß",
]
_TEXTS = st.lists(st.sampled_from(_ODD) | st.text(max_size=30) | st.just("A sentence. Another one! "), max_size=40).map(
    "".join
)


def _bpe() -> Tokenizer:
    """Return a byte-level tokeniser, in which a letter may be several tokens and white space counts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([pydoc_data.topics.topics["assert"]], trainer)
    return made


_TOKENISERS = {
    "word pieces": (Tokenizer.from_file(str(Path(bundled_folder(), "tokenizer.json"))), True),
    "bytes": (_bpe(), False),
}
_SPLITTERS = {
    name: Splitter(tokeniser, "", add_special_tokens=special) for name, (tokeniser, special) in _TOKENISERS.items()
}


def _tokens(name: str, text: str) -> int:
    tokeniser, special = _TOKENISERS[name]
    tokeniser.no_truncation()
    tokeniser.no_padding()
    return len(tokeniser.encode(text, add_special_tokens=special))


def _check(name: str, text: str, title: str, rule: SplitRule, spans: list[Span]) -> None:
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    for (start, stop), (after, end) in pairwise(spans):
        assert start <= after <= stop <= end
        if not rule.overlap:
            assert after == stop
        assert _tokens(name, text[after:stop]) <= rule.overlap + _MERGED
    for start, stop in spans:
        assert _tokens(name, entitled(title, text[start:stop])) <= rule.tokens


@pytest.mark.parametrize("name", _TOKENISERS)
@given(
    text=_TEXTS,
    title=st.sampled_from(["", "A title"]),
    tokens=st.integers(24, 60),
    overlap=st.integers(0, 12),
    by=st.sampled_from(list(SplitBy)),
)
def test_passages_cover_a_text_within_the_bound(
    name: str, text: str, title: str, tokens: int, overlap: int, by: SplitBy
) -> None:
    rule = SplitRule(tokens, overlap, by)
    (spans,) = _SPLITTERS[name].split([text], [title], rule)
    assert spans
    _check(name, text, title, rule, spans)


def test_paragraphs_stay_whole_where_they_fit() -> None:
    text = "First one. It has two sentences.\n\nSecond one.\n\nThird one, which is a little longer than the others."
    (spans,) = _SPLITTERS["word pieces"].split([text], [""], SplitRule(20))
    first, second, third = text.split("\n\n")
    assert [text[start:stop].strip() for start, stop in spans] == [f"{first}\n\n{second}", third]


def test_sentences_go_over_the_ends_of_lines() -> None:
    text = "One sentence that goes\non in the next line. And a\nsecond one here. A third."
    (spans,) = _SPLITTERS["word pieces"].split([text], [""], SplitRule(17, by=SplitBy.SENTENCE))
    assert [text[start:stop].strip() for start, stop in spans] == [
        "One sentence that goes\non in the next line.",
        "And a\nsecond one here. A third.",
    ]


@pytest.mark.parametrize("by", SplitBy)
def test_white_space_is_no_passage_of_its_own(by: SplitBy) -> None:
    text = "\n\n\n" + "A sentence of a long paragraph. " * 20 + "\n\n \n\n" + "Another paragraph. " * 20 + "\n\n\n"
    (spans,) = _SPLITTERS["word pieces"].split([text], [""], SplitRule(24, by=by))
    assert not [span for span in spans if text[slice(*span)].isspace()]
    assert "".join(text[start:stop] for start, stop in spans) == text


def test_passages_of_tokens_are_full() -> None:
    text = " ".join(["word"] * 1_000)
    (spans,) = _SPLITTERS["word pieces"].split([text], [""], SplitRule(102, by=SplitBy.TOKEN))
    assert [_tokens("word pieces", text[start:stop]) for start, stop in spans] == [102] * 10


def test_a_short_text_is_one_passage() -> None:
    texts = ["short", " two\n\nparagraphs "]
    assert _SPLITTERS["word pieces"].split(texts, ["", "T"], SplitRule(32)) == [[(0, 5)], [(0, len(texts[1]))]]


def test_a_title_without_room_for_passages_gives_none() -> None:
    splitter, title = _SPLITTERS["word pieces"], " ".join(["word"] * 40)
    assert splitter.split(["x " * 40], [title], SplitRule(40 + LEAST_TOKENS)) == [[]]
    assert splitter.split(["x"], ["word" * 10_000], SplitRule(40 + LEAST_TOKENS)) == [[]]


def test_what_fits_with_its_title_needs_no_room() -> None:
    splitter = _SPLITTERS["word pieces"]
    assert splitter.split(["hi"], ["one two three four five six seven"], SplitRule(16)) == [[(0, 2)]]


def test_windows_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is split as if it had been split at once."""
    text, rule = "\n\n".join(list(pydoc_data.topics.topics.values())[:8]), SplitRule(64, 8)
    found = _SPLITTERS["word pieces"].split([text], [""], rule)
    monkeypatch.setattr(splitting, "_WINDOW_CHARACTERS_PER_TOKEN", 100_000)
    assert found == _SPLITTERS["word pieces"].split([text], [""], rule)


def test_the_clock_beats_while_a_text_without_end_is_split() -> None:
    beats: list[None] = []
    text = "1.5,2.25," * 20_000
    (spans,) = _SPLITTERS["word pieces"].split([text], [""], SplitRule(256), lambda: beats.append(None))
    assert len(beats) > 10
    assert "".join(text[start:stop] for start, stop in spans) == text


def test_a_long_text_is_split_window_by_window() -> None:
    text = "\n\n".join(pydoc_data.topics.topics.values())
    assert len(text) > 400_000
    rule = SplitRule(256, 16)
    (spans,) = _SPLITTERS["word pieces"].split([text], [""], rule)
    _check("word pieces", text, "", rule, spans)
