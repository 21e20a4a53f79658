"""Detection of token ids that are a model's own instead of OpenAI's."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

#: Number of different ids that is taken as proof. This many ids of OpenAI's are hardly ever ones that a WordPiece
#: tokeniser makes of any text: of docstrings truncated at 8 tokens one in a thousand, of 8,600 truncated at 10 to 32
#: none. With a Unigram or BPE tokeniser they often are: at 16, one in five.
_TELLING = 16
#: Ids at the end that aren't compared: if a client has truncated the text, its last word may be tokenised differently.
_LAST_WORD = 8
#: Number of ids that are checked, since all other texts wait meanwhile.
_LOOKED_AT = 128


class OwnIds:
    """Detector of ids that one model's tokeniser makes. For one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A copy, so that nobody else sets its truncation or padding.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._size = self._tokenizer.get_vocab_size()
        self._around: list[int] = self._tokenizer.encode("").ids
        self._is_telling = type(self._tokenizer.model).__name__ == "WordPiece"

    def find(self, ids: Mapping[int, list[int]]) -> int | None:
        """Return the position of ids, among those of one request, that are taken for the model's own, or None.

        Ids qualify only if the tokeniser makes them again from their text. They are taken if they also stand between
        its marks for beginning and end. Without marks, only a WordPiece tokeniser's are taken: if they are many
        different ones, or if all ids of the request qualify and together are many different ones.
        """
        own = {
            at: each
            for at, each in ids.items()
            if (self._is_telling or self._is_marked(each)) and self._could_be(each[:_LOOKED_AT])
        }
        for at, each in own.items():
            if self._is_marked(each) or (self._is_telling and len(set(each)) >= _TELLING):
                return at
        if self._is_telling and len(own) == len(ids) and len(set().union(*own.values())) >= _TELLING:
            return next(iter(own))
        return None

    def _is_marked(self, ids: Sequence[int]) -> bool:
        around = self._around
        return len(around) > 1 and len(ids) > 1 and (ids[0], ids[-1]) == (around[0], around[-1])

    def _could_be(self, ids: Sequence[int]) -> bool:
        """Return True if the tokeniser makes these ids again from the text that they decode to."""
        if max(ids) >= self._size or min(ids) < 0:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        again = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) < 4 * _LAST_WORD:
            return bool(again == list(ids))
        whole = len(ids) - _LAST_WORD
        return bool(again[:whole] == list(ids[:whole]))
