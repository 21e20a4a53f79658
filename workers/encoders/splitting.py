"""Splitting of texts into passages that a model reads whole, at the ends of paragraphs, sentences or words."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

from pipeline.core.options import SplitBy
from workers.encoders.batching import LEAST_TOKENS, MOST_CHARACTERS_PER_TOKEN, Span, SplitRule, entitled

#: Characters that are split at once, so that a long text takes no more memory.
_PIECE = 1_000_000
#: Capacities are rounded down to a multiple of this where titles make them differ: each takes a copy of the tokeniser.
_STEP = 8
_COPIES = 4
#: New lines that are mere white space where sentences alone decide.
_AS_SPACES = str.maketrans("\n\r", "  ")


class Splitter:
    """Splitter that counts with a model's own tokeniser. For one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, *, add_special_tokens: bool) -> None:
        """Copy the tokeniser, so that nobody else sets its truncation or padding."""
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = tokenizer.encode_special_tokens
        self._prompt, self._specials = prompt, add_special_tokens
        self._cutter: Callable[[int, int], TextSplitter] = lru_cache(_COPIES)(self._new_cutter)

    def split(self, texts: Sequence[str], titles: Sequence[str], rule: SplitRule) -> list[list[Span]]:
        """Return the passages of each text, in order, each `text[start:stop]`. Together they cover the text, and with
        prompt, title and special tokens none has more than `rule.tokens`. A text whose title leaves no room has none.
        """
        heads = [self._prompt + entitled(title, "") for title in titles]
        different = list(dict.fromkeys(heads))
        rooms = dict(zip(different, (rule.tokens - count for count in self._counts(different)), strict=True))
        short = [at for at, text in enumerate(texts) if len(text) <= rule.tokens * MOST_CHARACTERS_PER_TOKEN]
        counts = self._counts([heads[at] + texts[at] for at in short])
        fitting = {at for at, count in zip(short, counts, strict=True) if count <= rule.tokens}
        found: list[list[Span]] = []
        for at, (text, head) in enumerate(zip(texts, heads, strict=True)):
            room = rooms[head] if head == self._prompt else rooms[head] // _STEP * _STEP
            if room < LEAST_TOKENS:
                found.append([])
            elif at in fitting:
                found.append([(0, len(text))])
            else:
                found.append([span for piece in _pieces(text) for span in self._cut(text, piece, head, room, rule)])
        return found

    def _counts(self, texts: list[str]) -> list[int]:
        return list(map(len, self._tokenizer.encode_batch_fast(texts, add_special_tokens=self._specials)))

    def _cut(self, text: str, piece: Span, head: str, room: int, rule: SplitRule) -> list[Span]:
        """Return the passages of a piece of a text, with `room` tokens each."""
        start, stop = piece
        while True:
            overlap = min(rule.overlap, room // 2)
            if rule.by is SplitBy.TOKEN:
                spans = self._windows(text[start:stop], room, overlap)
            else:
                part = text[start:stop]
                part = part.translate(_AS_SPACES) if rule.by is SplitBy.SENTENCE else part
                spans = [(at, at + len(cut)) for at, cut in self._cutter(room, overlap).chunk_indices(part)]
            spans = self._without_blanks(text, head, [(start + first, start + last) for first, last in spans], rule)
            # Tokens on both sides of a cut may merge or part, so that a passage has a few more by itself.
            over = max(self._counts([head + text[first:last] for first, last in spans])) - rule.tokens
            if over <= 0 or room == 1:
                return spans
            room = max(1, room - over)

    def _without_blanks(self, text: str, head: str, spans: list[Span], rule: SplitRule) -> list[Span]:
        """Join passages of white space alone, of which no model makes a vector that means anything, with those beside
        them where these stay within the bound."""
        joined = spans[:1]
        for span in spans[1:]:
            start, stop = joined[-1][0], span[1]
            blank = any(text[first:last].isspace() for first, last in (joined[-1], span))
            if blank and self._counts([head + text[start:stop]])[0] <= rule.tokens:
                joined[-1] = (start, stop)
            else:
                joined.append(span)
        return joined

    def _new_cutter(self, room: int, overlap: int) -> TextSplitter:
        return TextSplitter.from_huggingface_tokenizer(self._tokenizer, room, overlap=overlap, trim=False)

    def _windows(self, text: str, room: int, overlap: int) -> list[Span]:
        """Return windows of `room` tokens."""
        starts = [first for first, _ in self._tokenizer.encode(text, add_special_tokens=False).offsets]
        if not starts:
            return [(0, len(text))]
        starts[0] = 0
        spans = []
        for at in range(0, max(1, len(starts) - overlap), room - overlap):
            end = starts[at + room] if at + room < len(starts) else len(text)
            if end > starts[at]:  # a character may be several tokens
                spans.append((starts[at], end))
        return spans


def _pieces(text: str) -> Iterator[Span]:
    """Yield the pieces of a text that are split by themselves. They end with a paragraph, a line or a word."""
    start = 0
    while len(text) - start > _PIECE:
        most = start + _PIECE
        ends = (text.rfind(sign, most - _PIECE // 8, most) + len(sign) for sign in ("\n\n", "\n", " "))
        stop = next((end for end in ends if end > most - _PIECE // 8), most)
        yield start, stop
        start = stop
    yield start, len(text)
