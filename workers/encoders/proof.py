"""Proof of a model before it is added: its weights are complete, and its vectors are those of sentence-transformers.

Documents and queries, short ones and ones longer than the model reads, are compared with those of a separate load by
the library alone.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from sentence_transformers.util import batch_to_device
from transformers import PreTrainedModel

from pipeline.core.canary import CANARY
from pipeline.core.errors import ModelError
from workers.encoders import library
from workers.encoders.batching import Tokenised
from workers.encoders.library import described
from workers.encoders.local import LocalEncoder
from workers.encoders.reading import DOCUMENT, QUERY

Vectors = npt.NDArray[np.float32]

#: Maximum distance of a vector from the library's, relative to its length: float32 rounding in deep models.
_FURTHEST = 1e-4
#: Length of the longest text that is embedded; of longer ones only the token ids are compared.
_MOST_TOKENS = 8_192
#: Length of the long text for a model without a limit: some 2,000 tokens.
_UNBOUND_WORDS = 500
_SHORT = (
    CANARY,
    "x",
    "naïve café 数学 🙂",
    "  Two  spaces,\ta tab\nand UPPER İstanbul ΣΊΣΥΦΟΣ straße ",
    "[CLS] [SEP] [MASK] <s> </s> <pad> [PAD] <unk> <|endoftext|>",
    "unbelievabilities " * 3,
    "In chapter 7 the miller's daughter grinds rye, at last, and so on: " + "".join(map(str, range(30))),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Findings of a model's proof."""

    #: Encoder of the model, ready for a measurement of its rate.
    encoder: LocalEncoder
    document_prompt: str
    query_prompt: str
    #: True if all its vectors have length 1.
    normalised: bool
    #: Sentences for the person who adds the model.
    notes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Oracle:
    """Results of sentence-transformers itself, by task."""

    texts: list[str]
    vectors: dict[str, Vectors]
    #: A text longer than those that are embedded, and its token ids; empty if there is none.
    far_text: str
    far_ids: dict[str, list[int]]
    prompts: dict[str, str]
    default_prompt: str | None
    similarity: str


def prove(folder: Path, device: str, *, pooling: str | None, threads: int | None) -> Proof:
    """Prove a model, and return its encoder with the findings.

    Args:
        folder: the model's folder.
        device: device that it is tried on.
        pooling: for a folder that doesn't state its pooling.
        threads: CPU threads of the returned encoder.

    Raises:
        ModelError: the model isn't complete, isn't a dense text encoder, or has other vectors here than by the library.
    """
    # Different seeds: should a gap in the weights have gone unnoticed, the two loads fill it differently.
    torch.manual_seed(1)
    oracle = _ask_library(folder, device, pooling)
    gc.collect()
    torch.manual_seed(2)
    prompts = oracle.prompts
    encoder = LocalEncoder(
        folder,
        device,
        document_prompt=prompts[DOCUMENT],
        query_prompt=prompts[QUERY],
        pooling=pooling,
        threads=threads,
    )
    _compare(folder, encoder, oracle)
    lengths = np.linalg.norm(np.concatenate(list(oracle.vectors.values())), axis=1)
    normalised = bool((np.abs(lengths - 1) < 1e-3).all())
    return Proof(
        encoder=encoder,
        document_prompt=prompts[DOCUMENT],
        query_prompt=prompts[QUERY],
        normalised=normalised,
        notes=[*_notes_on_prompts(oracle), *_notes_on_similarity(oracle, normalised=normalised)],
    )


def _ask_library(folder: Path, device: str, pooling: str | None) -> _Oracle:
    """Embed texts with sentence-transformers alone, and check that its weights were complete."""
    with _loadings() as loadings:
        model = library.load(folder, device, pooling=pooling)
    _check_weights(folder, model, loadings)
    _check_vocabulary(folder, model)
    bound = _longest(model)
    texts = [*_SHORT, *_long_texts(bound)]
    vectors = {task: _encoded(folder, model, task, texts) for task in (DOCUMENT, QUERY)}
    if len({of_task.shape[1] for of_task in vectors.values()}) > 1:
        sizes = " and ".join(f"a {task} has {of_task.shape[1]}" for task, of_task in vectors.items())
        raise ModelError(f"{folder}: {sizes} dimensions, which can't be compared with each other.")
    far_text = _words(2 * bound) if bound > _MOST_TOKENS else ""
    return _Oracle(
        texts=texts,
        vectors=vectors,
        far_text=far_text,
        far_ids={task: _ids(model, task, far_text) for task in (DOCUMENT, QUERY) if far_text},
        prompts={name: prompt or "" for name, prompt in model.prompts.items()},
        default_prompt=model.default_prompt_name,
        similarity=model.similarity_fn_name,
    )


def _encoded(folder: Path, model: SentenceTransformer, task: str, texts: Sequence[str]) -> Vectors:
    """Return the library's vectors of texts, each embedded alone, after checking that a batch doesn't change them."""
    alone = np.stack([_encode(folder, model, task, [text])[0] for text in texts])
    together = _encode(folder, model, task, list(_SHORT))
    if not np.isfinite(alone).all():
        raise ModelError(f"{folder}: vectors of {task} texts aren't finite; the weights are damaged.")
    if not alone[0].any():
        raise ModelError(f"{folder}: the vector of a plain {task} text is zero; the weights are damaged.")
    if (furthest := float(_distances(together, alone[: len(_SHORT)]).max())) > _FURTHEST:
        raise ModelError(
            f"{folder}: a {task} text's vector depends on what is beside it in a batch (it moves by {furthest:.1%} of "
            "its length); a model padded at the left needs positions that are relative or masked."
        )
    return alone


def _encode(folder: Path, model: SentenceTransformer, task: str, texts: list[str]) -> Vectors:
    encode = model.encode_query if task == QUERY else model.encode_document
    try:
        return np.asarray(encode(texts, show_progress_bar=False), np.float32)
    except Exception as error:  # a broken model may raise anything
        which, what = "plain", ""
        if texts[0] != CANARY:  # the canary comes first
            which = "longer"
            what = "; lower max_seq_length, or the tokeniser's model_max_length, to the positions that the model has"
        raise ModelError(
            f"{folder}: sentence-transformers itself fails on a {which} {task} text ({described(error)}){what}."
        ) from error


def _compare(folder: Path, encoder: LocalEncoder, oracle: _Oracle) -> None:
    """Check that documents and queries in shared batches have the library's vectors of each text alone."""
    read = [encoder.tokenise(oracle.texts, queries=task == QUERY) for task in (DOCUMENT, QUERY)]
    for task, ids in oracle.far_ids.items():
        if list(encoder.tokenise([oracle.far_text], queries=task == QUERY).ids[0]) != ids:
            raise ModelError(f"{folder}: a long {task} text is truncated differently from sentence-transformers.")
    both = Tokenised(
        [ids for some in read for ids in some.ids],
        np.concatenate([some.lengths for some in read]),
        np.concatenate([some.truncated for some in read]),
    )
    ours = np.split(encoder.encode(both), 2)
    for task, mine in zip((DOCUMENT, QUERY), ours, strict=True):
        distances = _distances(mine, oracle.vectors[task])
        if (furthest := float(distances.max())) > _FURTHEST:
            which = "long" if int(distances.argmax()) >= len(_SHORT) else "short"
            raise ModelError(
                f"{folder}: a {which} {task} text has another vector than in sentence-transformers (off by "
                f"{furthest:.1%} of its length): the model reads texts in a way that token ids alone don't give."
            )


def _distances(some: Vectors, others: Vectors) -> npt.NDArray[np.float64]:
    """Return the distances of vectors from others, relative to the others' length."""
    lengths = np.linalg.norm(others.astype(np.float64), axis=1)
    return np.linalg.norm(some.astype(np.float64) - others, axis=1) / np.maximum(lengths, 1e-9)


def _longest(model: SentenceTransformer) -> int:
    """Return the tokens of the longest text that any path through a model reads; 0 without a limit."""
    bounds = [
        bound
        for module in model.modules()
        if isinstance(module, Transformer)
        for bound in (module.max_seq_length, module.query_length, module.document_length)
    ]
    return max((int(bound) for bound in bounds if bound and bound < 1_000_000), default=0)


def _long_texts(bound: int) -> list[str]:
    """Return texts longer than a model reads, or as long as is tried."""
    if not bound:
        return [_words(_UNBOUND_WORDS)]
    if bound > _MOST_TOKENS:
        return [_words(_MOST_TOKENS // 6)]
    # The second text is also longer than the part of a text that is read at first.
    return [_words(2 * bound), _words(10 * bound)] if bound <= _MOST_TOKENS // 8 else [_words(2 * bound)]


def _words(pairs: int) -> str:
    """Return a text of two to five tokens for each pair."""
    return " ".join(f"word {n}" for n in range(pairs))


def _features(model: SentenceTransformer, task: str, text: str) -> dict[str, Any]:
    prompt = model.prompts.get(task) or None
    return batch_to_device(model.preprocess([text], prompt=prompt, task=task), model.device)


def _ids(model: SentenceTransformer, task: str, text: str) -> list[int]:
    """Return the token ids of a text as the library tokenises it."""
    ids: list[int] = _features(model, task, text)["input_ids"].flatten().tolist()
    return ids


@contextmanager
def _loadings() -> Iterator[list[tuple[PreTrainedModel, dict[str, Any]]]]:
    """Collect transformers' report on each model loaded within the block: its missing and its unexpected weights."""
    noted: list[tuple[PreTrainedModel, dict[str, Any]]] = []
    original = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
        model, told = original.__func__(cls, *args, **{**kwargs, "output_loading_info": True})
        noted.append((model, told))
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield noted
    finally:
        PreTrainedModel.from_pretrained = original


def _check_weights(
    folder: Path, model: SentenceTransformer, loadings: Sequence[tuple[PreTrainedModel, dict[str, Any]]]
) -> None:
    """Check that no weights were missing or left over, except those of heads that the vectors don't go through."""
    for part, told in loadings:
        unknown = sorted(key for key in told["unexpected_keys"] if _is_of_body(part, key))
        missing = {*told["missing_keys"], *(mismatch[0] for mismatch in told["mismatched_keys"])}
        if lacking := sorted(_needed(model, part, missing)):
            beside = f" (it has {unknown[0]} and {len(unknown)} such, which no part takes)" if unknown else ""
            raise ModelError(
                f"{folder}: the weights lack {_some(lacking)}{beside}; sentence-transformers would fill them at "
                "random. Save the model again where it was trained."
            )
        if unknown:
            raise ModelError(
                f"{folder}: the weights hold {_some(unknown)}, for which config.json has no place, so that they would "
                "be left out; bring config.json and weights of the same model."
            )


def _some(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1:,} more"


def _is_of_body(part: PreTrainedModel, key: str) -> bool:
    """Return True if unexpected weights belong to a part that the vectors go through, not to another task's head."""
    first, _, rest = key.removeprefix(f"{part.base_model_prefix}.").partition(".")
    is_buffer = rest.endswith(("position_ids", "inv_freq", "token_type_ids"))
    return first in dict(part.named_children()) and not is_buffer


def _needed(model: SentenceTransformer, part: PreTrainedModel, missing: set[str]) -> set[str]:
    """Return the missing weights of `part` on which vectors of documents or queries depend."""
    parameters = {name: weight for name, weight in part.named_parameters() if name in missing}
    needed = missing - parameters.keys() & part.state_dict().keys()
    if not parameters:
        return needed
    for task in (DOCUMENT, QUERY):
        with torch.enable_grad():
            vector = model(_features(model, task, CANARY), task=task)["sentence_embedding"]
        slopes = torch.autograd.grad(vector.sum(), list(parameters.values()), allow_unused=True)
        needed |= {name for name, slope in zip(parameters, slopes, strict=True) if slope is not None}
    return needed


def _check_vocabulary(folder: Path, model: SentenceTransformer) -> None:
    """Check that tokenisers and weights belong to the same model, as far as their sizes tell."""
    for module in model.modules():
        if isinstance(module, StaticEmbedding):
            rows, specials = module.num_embeddings, set[int]()
        elif isinstance(module, Transformer) and module.tokenizer is not None:
            rows = module.model.get_input_embeddings().weight.shape[0]
            specials = set(module.tokenizer.all_special_ids)
        else:
            continue
        known = set(module.tokenizer.get_vocab().values())
        if known <= specials:
            raise ModelError(f"{folder}: the tokeniser knows no words; copy its vocabulary, tokenizer.json, too.")
        if (last := max(known)) >= rows:
            raise ModelError(
                f"{folder}: the tokeniser has token {last:,}, the weights only {rows:,} rows; bring tokeniser and "
                "weights of the same model."
            )


def _notes_on_prompts(oracle: _Oracle) -> Iterator[str]:
    unread = [name for name, prompt in oracle.prompts.items() if prompt and name not in (DOCUMENT, QUERY)]
    if unread:
        default = f" (default_prompt_name: {oracle.default_prompt})" if oracle.default_prompt in unread else ""
        yield (
            f"Its prompts {', '.join(unread)}{default} aren't read here, nor by encode_document and encode_query: "
            f'before documents it reads "{oracle.prompts[DOCUMENT]}", before queries "{oracle.prompts[QUERY]}".'
        )


def _notes_on_similarity(oracle: _Oracle, *, normalised: bool) -> Iterator[str]:
    if oracle.similarity != "cosine" and not normalised:
        yield (
            f"It was trained for {oracle.similarity} similarity and its vectors aren't of length one; vectormill's own "
            "search ranks by cosine."
        )
