"""Tokenisation of texts, and forward-pass inputs of token ids, as in sentence-transformers but once per text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding, Transformer

from pipeline.core.errors import ModelError
from workers.encoders import unpadded
from workers.encoders.batching import MOST_CHARACTERS_PER_TOKEN, Tokenised

#: Token ids of a text, int32.
Ids = npt.NDArray[np.int32]

DOCUMENT, QUERY = "document", "query"
#: Limits from here on count as none: for tokenisers without one, transformers has a number far above.
_NO_BOUND = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Path through a model, either of documents or of queries."""

    #: Task name in sentence-transformers, by which a router takes its route.
    task: str
    #: Prompt before each text.
    prompt: str
    reader: "_PaddedReader | _FlatReader"
    #: Tokens of the prompt if pooling leaves them out, else `None`.
    prompt_tokens: int | None

    def read(self, texts: list[str], max_tokens: int | None) -> Tokenised:
        """Return the token ids of `texts`, each truncated at `max_tokens` or the model's own limit."""
        return self.reader.read([self.prompt + text for text in texts] if self.prompt else texts, max_tokens)

    def features(self, ids: Sequence[Ids]) -> dict[str, Any]:
        """Return the arguments of the model's forward pass."""
        features = {**self.reader.features(ids), "task": self.task, "modality": "text"}
        return features if self.prompt_tokens is None else {**features, "prompt_length": self.prompt_tokens}

    def goes_with(self, other: "Way") -> bool:
        """Return True if texts of both paths may be in one batch."""
        return self.reader is other.reader and self.prompt_tokens == other.prompt_tokens


def ways_of(model: SentenceTransformer, document_prompt: str, query_prompt: str, *, unpads: bool) -> tuple[Way, Way]:
    """Return the paths of documents and of queries through a model. With `unpads`, it takes unpadded features.

    Raises:
        ModelError: the model can't be batched by token ids.
    """
    document = _way(model, DOCUMENT, document_prompt, unpads=unpads)
    query = _way(model, QUERY, query_prompt, unpads=unpads)
    if document.reader.same_as(query.reader) and not any(isinstance(module, Router) for module in model):
        query = Way(task=QUERY, prompt=query_prompt, reader=document.reader, prompt_tokens=query.prompt_tokens)
    return document, query


def _way(model: SentenceTransformer, task: str, prompt: str, *, unpads: bool) -> Way:
    first = model[0]
    if isinstance(first, Router):
        first = first.sub_modules[first._resolve_route(task=task, modality="text")][0]
    if isinstance(first, StaticEmbedding):
        return Way(task=task, prompt=prompt, reader=_FlatReader(first), prompt_tokens=None)
    if not isinstance(first, Transformer) or not getattr(first.tokenizer, "is_fast", False):
        raise ModelError("this model has no fast tokeniser; vectormill can't batch it by tokens.")
    prompt_tokens = first.preprocess(["x"], prompt=prompt, task=task).get("prompt_length") if prompt else None
    pools_all = all(getattr(module, "include_prompt", True) for module in model.modules())
    prompt_tokens = None if pools_all else prompt_tokens
    reader = _UnpaddedReader(first, task) if unpads else _PaddedReader(first, task)
    return Way(task=task, prompt=prompt, reader=reader, prompt_tokens=prompt_tokens)


class _PaddedReader:
    """Tokeniser for transformers: sequences with special tokens, padded to the longest of their batch."""

    flat = False
    pads = True

    def __init__(self, transformer: Transformer, task: str) -> None:
        tokenizer = transformer.tokenizer
        self._fast = tokenizer.backend_tokenizer
        self._pad_id = tokenizer.pad_token_id or 0
        self._pad_left = tokenizer.padding_side == "left"
        self._cut_left = tokenizer.truncation_side == "left"
        self._splits_specials = bool(tokenizer.split_special_tokens)
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        of_task = transformer.query_length if task == QUERY else transformer.document_length
        of_module = transformer.processing_kwargs.get("text", {}).get("max_length")
        self.max_tokens = _finite(of_module or of_task or transformer.max_seq_length)

    @property
    def tokenizer(self) -> Any:
        """Tokeniser object of the `tokenizers` library."""
        return self._fast

    def same_as(self, other: "_PaddedReader | _FlatReader") -> bool:
        """Return True if it tokenises as the other one does."""
        return isinstance(other, _PaddedReader) and self._fast is other._fast and self.max_tokens == other.max_tokens

    def read(self, texts: list[str], max_tokens: int | None) -> Tokenised:
        """Return token ids with special tokens."""
        self._fast.no_padding()  # the library turns padding on whenever it tokenises
        self._fast.encode_special_tokens = self._splits_specials
        bound = _bind(self._fast, max_tokens, self.max_tokens, direction="left" if self._cut_left else "right")
        return _read(texts, None if self._cut_left else bound, self._fast.encode_batch_fast)

    def features(self, ids: Sequence[Ids]) -> dict[str, torch.Tensor]:
        """Return padded ids and their attention mask."""
        longest = max(map(len, ids))
        shape = (len(ids), longest)
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for row, sequence in enumerate(ids):
            where = slice(longest - len(sequence), None) if self._pad_left else slice(len(sequence))
            input_ids[row, where] = sequence
            mask[row, where] = 1
        features = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        if self._with_types:
            features["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        return features


class _UnpaddedReader(_PaddedReader):
    """Tokeniser for transformers that take one sequence of all texts."""

    pads = False

    def __init__(self, transformer: Transformer, task: str) -> None:
        super().__init__(transformer, task)
        self._padding = unpadded.padding_of(transformer)

    def features(self, ids: Sequence[Ids]) -> dict[str, Any]:
        """Return ids behind each other, their positions, and where each text begins."""
        return unpadded.features(ids, self._padding)


class _FlatReader:
    """Tokeniser for static embeddings: one flat list of ids, and the offset of each text."""

    flat = True
    pads = False

    def __init__(self, static: StaticEmbedding) -> None:
        self._fast = static.tokenizer
        self._fast.no_padding()
        cut = self._fast.truncation or {}
        self.max_tokens: int | None = cut.get("max_length")
        self._how = {name: cut[name] for name in ("stride", "strategy", "direction") if name in cut}

    @property
    def tokenizer(self) -> Any:
        """Tokeniser object of the `tokenizers` library."""
        return self._fast

    def same_as(self, other: "_PaddedReader | _FlatReader") -> bool:
        """Return True if it tokenises as the other one does."""
        return isinstance(other, _FlatReader) and self._fast is other._fast

    def read(self, texts: list[str], max_tokens: int | None) -> Tokenised:
        """Return token ids without special tokens."""
        bound = _bind(self._fast, max_tokens, self.max_tokens, **self._how)
        whole = self._how.get("direction") == "left"
        return _read(texts, None if whole else bound, partial(self._fast.encode_batch_fast, add_special_tokens=False))

    def features(self, ids: Sequence[Ids]) -> dict[str, torch.Tensor]:
        """Return flat ids and offsets."""
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.concatenate(ids, dtype=np.int64)
        return {
            "input_ids": torch.from_numpy(flat),
            "offsets": torch.from_numpy(np.cumsum(lengths) - lengths),
        }


def _finite(bound: float | None) -> int | None:
    return int(bound) if bound and bound != inf and bound < _NO_BOUND else None


def _bind(tokenizer: Any, *limits: int | None, **how: Any) -> int | None:
    """Set a tokeniser's truncation to the least of `limits`, and return it; None if there is no limit."""
    least = min((limit for limit in limits if limit), default=None)
    if least:
        tokenizer.enable_truncation(least, **how)
    else:
        tokenizer.no_truncation()
    return least


def _read(texts: list[str], bound: int | None, encode: Callable[[list[str]], list[Any]]) -> Tokenised:
    """Tokenise texts with `encode`, which truncates them. The result is that of whole texts, though only the start of a
    long one may be read. `bound` is the truncation in tokens if it is at the end, else `None`."""
    most = bound * MOST_CHARACTERS_PER_TOKEN if bound else None
    encodings = encode([text[:most] for text in texts])
    begun = np.array([most is not None and len(text) > most for text in texts], dtype=np.bool_)
    for at, text in enumerate(texts):
        # The last word of a text truncated at `most` may be tokenised differently. It doesn't matter if more than a
        # whole length of tokens lies between `bound` and that word: overflowing tokens come in such lengths. White
        # space and endless words have too few tokens.
        if begun[at] and len(encodings[at].overflowing) < 2:
            (encodings[at],) = encode([text])
            begun[at] = False
    lengths = np.fromiter(map(len, encodings), dtype=np.int32, count=len(encodings))
    truncated = np.zeros(len(encodings), dtype=np.bool_)
    lost = np.zeros(len(encodings), dtype=np.int64)
    for at, encoding in enumerate(encodings):
        if over := encoding.overflowing:
            special = sum(encoding.special_tokens_mask)
            truncated[at], lost[at] = True, sum(len(part) - special for part in over)
            if begun[at]:  # the rest has as many tokens for its length
                assert most is not None
                lost[at] += int(lost[at] + lengths[at] - special) * (len(texts[at]) - most) // most
    flat = np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int32, count=int(lengths.sum()))
    ends = np.cumsum(lengths).tolist()
    return Tokenised([flat[start:end] for start, end in pairwise([0, *ends])], lengths, truncated, lost)
