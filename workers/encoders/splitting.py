"""Splitting of texts into passages that a model reads whole, at the ends of paragraphs, sentences or words."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice

from semantic_text_splitter import TextSplitter
from tokenizers import Tokenizer

from pipeline.core.options import SplitBy
from workers.encoders.batching import (
    LEAST_TOKENS,
    MOST_CHARACTERS_PER_TOKEN,
    TOKENISED_AT_ONCE,
    Span,
    SplitRule,
    entitled,
)

#: Characters that are split at once for each token of a passage: a dozen passages, more or less. In text without spaces
#: and sentences the library's time grows with the square of what it gets.
_WINDOW_CHARACTERS_PER_TOKEN = 64
#: Room is rounded down to a multiple of this where titles make it differ: each size takes a copy of the tokeniser.
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

    def split(
        self, texts: Sequence[str], titles: Sequence[str], rule: SplitRule, beat: Callable[[], None] = lambda: None
    ) -> list[list[Span]]:
        """Return the passages of each text, in order, each `text[start:stop]`. Together they cover the text, and with
        prompt, title and special tokens none has more than `rule.tokens`. A text whose title leaves no room has none.

        `beat` is called again and again meanwhile.
        """
        most_characters = rule.tokens * MOST_CHARACTERS_PER_TOKEN
        heads = [self._prompt + entitled(title, "") for title in titles]
        # A longer title is sure to leave no room, or is a word without end.
        different = [head for head in dict.fromkeys(heads) if len(head) <= most_characters]
        rooms = dict(zip(different, (rule.tokens - count for count in self._counts(different)), strict=True))
        short = [at for at, text in enumerate(texts) if len(heads[at]) + len(text) <= most_characters]
        counts = self._counts([heads[at] + texts[at] for at in short])
        fitting = {at for at, count in zip(short, counts, strict=True) if count <= rule.tokens}
        found: list[list[Span]] = [[(0, len(text))] if at in fitting else [] for at, text in enumerate(texts)]

        def room_of(at: int) -> int:
            room = rooms.get(heads[at], 0)
            return room if heads[at] == self._prompt else room // _STEP * _STEP

        # Texts with the same room one after the other, for the sake of the copies.
        for at in sorted(set(range(len(texts))) - fitting, key=lambda at: (room_of(at), at)):
            if room_of(at) >= LEAST_TOKENS:
                found[at] = self._passages(texts[at], heads[at], room_of(at), rule, beat)
        return found

    def _counts(self, texts: Sequence[str]) -> list[int]:
        encode = self._tokenizer.encode_batch_fast
        left, counts = iter(texts), list[int]()
        while some := list(islice(left, TOKENISED_AT_ONCE)):
            counts += map(len, encode(some, add_special_tokens=self._specials))
        return counts

    def _passages(self, text: str, head: str, room: int, rule: SplitRule, beat: Callable[[], None]) -> list[Span]:
        """Split a text with `room` tokens for each passage, window by window. The last passage of a window ends where
        the window does, so the next window begins with it."""
        spans: list[Span] = []
        start, width = 0, room * _WINDOW_CHARACTERS_PER_TOKEN
        while True:
            beat()
            stop = min(len(text), start + width)
            found = self._cut(text, (start, stop), head, room, rule)
            if stop == len(text):
                return self._without_blanks(text, head, [*spans, *found], rule)
            if len(found) > 1:
                spans += found[:-1]
                start, width = found[-1][0], room * _WINDOW_CHARACTERS_PER_TOKEN
            else:
                width *= 2

    def _cut(self, text: str, window: Span, head: str, room: int, rule: SplitRule) -> list[Span]:
        """Return the passages of a window of a text, with `room` tokens each."""
        start, stop = window
        part = text[start:stop]
        while True:
            overlap = min(rule.overlap, room // 2)
            if rule.by is SplitBy.TOKEN:
                spans = self._windows(part, room, overlap)
            else:
                read = part.translate(_AS_SPACES) if rule.by is SplitBy.SENTENCE else part
                spans = [(at, at + len(cut)) for at, cut in self._cutter(room, overlap).chunk_indices(read)]
            spans = [(start + first, start + last) for first, last in spans]
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
