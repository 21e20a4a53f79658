"""A model's own token ids, told from OpenAI's."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

#: So many different ids of OpenAI's are hardly ever what a WordPiece tokeniser makes of any text: of docstrings cut at
#: 8 tokens, one in a thousand, of 8,600 cut at 10 to 32, none. Of a Unigram's or a BPE's they often are: at 16, every
#: fifth.
_TELLING = 16
#: Where a client has cut a text, its last word may be read otherwise.
_LAST_WORD = 8
#: Of ids so many are looked at: all other texts wait meanwhile.
_LOOKED_AT = 128


class OwnIds:
    """Recognises ids that one model's tokeniser makes. For one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A copy, which nobody else sets bounds of.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._size = self._tokenizer.get_vocab_size()
        self._around: list[int] = self._tokenizer.encode("").ids
        self._is_telling = type(self._tokenizer.model).__name__ == "WordPiece"

    def find(self, ids: Mapping[int, list[int]]) -> int | None:
        """The position of ids, among those of one request, that are taken for the model's own.

        They are if they stand between the tokeniser's marks for beginning and end. Without these, a WordPiece's are if
        they are many different ones, or if all of the request could be, and together are many.
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
        """Return whether the tokeniser, from the text that they are by its vocabulary, makes them again."""
        if max(ids) >= self._size or min(ids) < 0:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        again = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) < 4 * _LAST_WORD:
            return bool(again == list(ids))
        whole = len(ids) - _LAST_WORD
        return bool(again[:whole] == list(ids[:whole]))
