"""A model on a device: texts become token ids once, token-budget batches become vectors. The only import of torch."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import structlog
import torch
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import disable_default_handler, disable_progress_bar, enable_propagation

from pipeline.canary import CANARY, cosine, is_canary
from pipeline.errors import ModelError
from pipeline.jobs import RejectCode
from workers.batching import MOST_CHARACTERS_PER_TOKEN, Batch, Tokenised, token_batches
from workers.own_ids import OwnIds

log = structlog.get_logger()

#: Padded tokens in one forward pass. A CPU is fastest while a batch fits its caches, a GPU while it has work.
_BUDGET_TOKENS = {"cpu": 1_024, "mps": 8_192, "cuda": 32_768}
_MOST_ITEMS = 2_048
#: Models without attention read a flat list of ids: no padding, so bigger batches.
_FLAT_BUDGET_TOKENS = 131_072


def list_devices() -> list[tuple[str, int]]:
    """The devices to embed on, each with its memory in bytes: every CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [(f"cuda:{n}", torch.cuda.get_device_properties(n).total_memory) for n in range(count)]
    if torch.backends.mps.is_available():
        return [("mps", int(torch.mps.recommended_max_memory()))]
    return [("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]


class Encoder:
    """A loaded model. One thread may read texts while another one runs batches; no more at once."""

    def __init__(
        self,
        folder: Path,
        device: str,
        *,
        document_prompt: str = "",
        dtype: str = "float32",
        threads: int | None = None,
    ) -> None:
        """Load weights from `folder`.

        `dtype` (float32, bfloat16, float16) counts on CUDA only; `threads` on the CPU only.

        Raises:
            ModelError: they can't be loaded, or this model can't be batched by token ids.
        """
        if threads:
            torch.set_num_threads(threads)
        disable_progress_bar()
        # What it warns of comes out as all logs do.
        disable_default_handler()
        enable_propagation()
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        try:
            self._model = SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={
                    "use_safetensors": True,
                    "torch_dtype": getattr(torch, dtype) if on_cuda else torch.float32,
                },
            ).eval()
        except Exception as error:  # whatever a broken model raises, it is the model that is broken
            raise ModelError(f"{folder}: the model can't be loaded ({type(error).__name__}: {error})") from error
        self._prompt = document_prompt
        self._expected = b""
        self._reader = _reader_of(self._model)
        self._own_ids: OwnIds | None = None
        self.budget_tokens = _FLAT_BUDGET_TOKENS if self._reader.flat else _BUDGET_TOKENS.get(self.device.type, 8_192)
        self.dimensions = int(self._model.get_embedding_dimension() or 0)
        self.max_item_tokens = self._reader.max_tokens
        self._check_against_library()

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that the model brings, by name."""
        return {name: prompt or "" for name, prompt in self._model.prompts.items()}

    @property
    def held_bytes(self) -> int:
        """Memory of the device that this process holds; on a CPU, of the process."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self.device))
        if self.device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return int(psutil.Process().memory_info().rss)

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None, prompt: str | None = None) -> Tokenised:
        """Read `texts` once: ids, lengths, and which were cut at `max_tokens` (default: the model's own bound)."""
        prefix = self._prompt if prompt is None else prompt
        return self._reader.read([prefix + text for text in texts] if prefix else list(texts), max_tokens)

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Run every text through the model, in token-budget batches, longest first; no further one once `stop` says so.

        Running out of memory halves the token budget for good. A batch that fails is halved down to the text that
        does it, which comes back without a vector.
        """
        pending = list(token_batches(tokenised.lengths, self.budget_tokens, _MOST_ITEMS))
        pending.reverse()
        while pending:
            at = pending.pop()
            start = perf_counter()
            try:
                vectors = self._forward([tokenised.ids[n] for n in at])
            except Exception as error:  # noqa: BLE001 - whatever one text does to the model, the others go on
                if len(at) == 1:
                    why = _without_memory(error) or f"the model raised {type(error).__name__}"
                    failure = (RejectCode.ENCODE_FAILED, why)
                    yield Batch(at, tokenised.lengths[at], perf_counter() - start, failure=failure)
                    continue
                if _without_memory(error):
                    self._shrink(int(tokenised.lengths[at].max()) * len(at))
                half = len(at) // 2
                pending += [at[half:], at[:half]]
            else:
                lengths = tokenised.lengths[at]
                padded = int(lengths.sum() if self._reader.flat else lengths.max() * len(at))
                yield Batch(at, lengths, perf_counter() - start, vectors, padded_tokens=padded)
                if stop():
                    return

    def find_own_ids(self, ids: Mapping[int, list[int]]) -> int | None:
        """The position of token ids that are this model's own, where a caller's are to be OpenAI's."""
        if self._own_ids is None:
            self._own_ids = OwnIds(self._reader._fast)
        return self._own_ids.find(ids)

    def encode(self, tokenised: Tokenised) -> npt.NDArray[np.float32]:
        """Vectors of all texts in their order, as float32 of shape (texts, dimensions).

        Raises:
            ModelError: the model fails on one of them.
        """
        vectors = np.empty((len(tokenised.ids), self.dimensions), dtype=np.float32)
        for batch in self.batches(tokenised):
            if batch.vectors is None:
                raise ModelError(f"the model fails: {batch.failure}")
            vectors[batch.at] = batch.vectors
        return vectors

    def _shrink(self, failed_tokens: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget_tokens = max(1, min(self.budget_tokens, failed_tokens // 2))
        log.warning("out_of_memory", device=str(self.device), budget_tokens=self.budget_tokens)

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> npt.NDArray[np.float32]:
        features = {name: tensor.to(self.device) for name, tensor in self._reader.features(ids).items()}
        result: npt.NDArray[np.float32] = self._model(features)["sentence_embedding"].float().cpu().numpy()
        return result

    def canary(self) -> npt.NDArray[np.float32]:
        """The canary text's vector."""
        return self.encode(self.tokenise([CANARY]))[0]

    def prove(self, expected: bytes) -> None:
        """Compare the canary's vector with the one in the catalogue, little-endian float32.

        Raises:
            ModelError: they disagree: other weights, a broken driver or a broken device.
        """
        self._expected = expected
        self.prove_again()

    def prove_again(self) -> None:
        """Repeat the last proof, to tell a bad text from a bad device.

        Raises:
            ModelError: the canary comes out wrong now.
        """
        if not is_canary(self.canary(), self._expected):
            raise ModelError("the canary text's vector differs from the catalogue's: wrong weights or a broken device")

    def _check_against_library(self) -> None:
        """Prove that reading by token ids gives the library's own vectors."""
        texts = [CANARY, "naïve café 数学 🙂 " + " ".join(map(str, range(1_000))), "x"]
        ours = self.encode(self.tokenise(texts))
        theirs = self._model.encode(texts, prompt=self._prompt or None, show_progress_bar=False)
        tolerance = 1e-5 if self._model.dtype == torch.float32 else 1e-2
        for mine, other in zip(ours, np.asarray(theirs, dtype=np.float32), strict=True):
            if cosine(mine, other) < 1 - tolerance:
                raise ModelError(
                    "this model reads texts in a way that token ids alone don't give; vectormill can't batch it"
                )


def _without_memory(error: Exception) -> str | None:
    lacking = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
    return "the device's memory doesn't hold this text" if lacking else None


class _PaddedReader:
    """Reads for transformers: sequences with special tokens, padded to the longest of their batch."""

    flat = False

    def __init__(self, transformer: Any) -> None:
        tokenizer = transformer.tokenizer
        self._fast = tokenizer.backend_tokenizer
        self._lower = bool(getattr(transformer, "do_lower_case", False))
        self._pad_id = tokenizer.pad_token_id or 0
        self._pad_left = tokenizer.padding_side == "left"
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        bound = transformer.max_seq_length
        self.max_tokens = int(bound) if bound and bound < 1_000_000 else None

    def read(self, texts: list[str], max_tokens: int | None) -> Tokenised:
        self._fast.no_padding()  # the library turns it on whenever it reads for itself
        bound = _bound(self._fast, max_tokens, self.max_tokens)
        return _read([text.lower() for text in texts] if self._lower else texts, bound, self._fast.encode_batch_fast)

    def features(self, ids: list[list[int]]) -> dict[str, torch.Tensor]:
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


class _FlatReader:
    """Reads for static embeddings: one flat list of ids, and where each text starts in it."""

    flat = True

    def __init__(self, static: Any) -> None:
        self._fast = static.tokenizer
        self._fast.no_padding()
        self.max_tokens: int | None = (self._fast.truncation or {}).get("max_length")

    def read(self, texts: list[str], max_tokens: int | None) -> Tokenised:
        bound = _bound(self._fast, max_tokens, self.max_tokens)
        return _read(texts, bound, partial(self._fast.encode_batch_fast, add_special_tokens=False))

    def features(self, ids: list[list[int]]) -> dict[str, torch.Tensor]:
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in ids])
        return {
            "input_ids": torch.from_numpy(flat),
            "offsets": torch.from_numpy(np.cumsum(lengths) - lengths),
        }


def _bound(tokenizer: Any, *limits: int | None) -> int | None:
    """Let a tokeniser cut texts at the least of `limits`, which is returned; None is none."""
    least = min((limit for limit in limits if limit), default=None)
    if least:
        tokenizer.enable_truncation(least)
    else:
        tokenizer.no_truncation()
    return least


def _read(texts: list[str], bound: int | None, encode: Callable[[list[str]], list[Any]]) -> Tokenised:
    """Token ids of texts that `encode` cuts at `bound`, as it would give them for whole texts."""
    most = bound * MOST_CHARACTERS_PER_TOKEN if bound else None
    encodings = encode([text[:most] for text in texts])
    for at, text in enumerate(texts):
        # Where a text was cut its last word may be read otherwise. That doesn't matter if more than a whole length of
        # tokens lies between: what overflows comes in such lengths. White space and endless words have too few tokens.
        if most and len(text) > most and len(encodings[at].overflowing) < 2:
            (encodings[at],) = encode([text])
    lengths = np.fromiter((len(e.ids) for e in encodings), dtype=np.int32, count=len(encodings))
    truncated = np.fromiter((bool(e.overflowing) for e in encodings), dtype=np.bool_, count=len(encodings))
    return Tokenised([e.ids for e in encodings], lengths, truncated)


def _reader_of(model: Any) -> _PaddedReader | _FlatReader:
    first = model[0]
    if type(first).__name__ == "StaticEmbedding":
        return _FlatReader(first)
    if getattr(getattr(first, "tokenizer", None), "is_fast", False):
        return _PaddedReader(first)
    raise ModelError("this model has no fast tokeniser; vectormill can't batch it by tokens")
