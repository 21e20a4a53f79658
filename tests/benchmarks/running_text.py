"""Running text of a wanted length in tokens, cut out of Python's manual, which is part of Python."""

from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer

#: Tokens that a BERT puts around each text.
MARKS = 2


def manual() -> str:
    """Return Python's manual of its syntax as one line of ASCII."""
    return " ".join(" ".join(topics.values()).replace("’", "'").encode("ascii", "ignore").decode().split())


class RunningText:
    """The manual as a WordPiece tokeniser reads it. Texts cut out of it overlap, but begin at different words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        whole = Tokenizer.from_str(tokenizer.to_str())
        whole.no_truncation()
        self._text = manual()
        read = whole.encode(self._text, add_special_tokens=False)
        self._spans = np.array(read.offsets)
        # A word's pieces stay the same wherever the text is cut behind it, but not if it begins within the word.
        self._words = np.flatnonzero(np.diff(np.array(read.word_ids), prepend=-1))

    def cut(self, lengths: Sequence[int], seed: int = 0) -> list[str]:
        """Return a text of each length, in tokens with the marks around it."""
        inner = np.asarray(lengths) - MARKS
        words = self._words[self._words <= len(self._spans) - inner.max()]
        first = np.random.default_rng(seed).choice(words, len(inner))
        starts, stops = self._spans[first, 0], self._spans[first + inner - 1, 1]
        return [self._text[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
