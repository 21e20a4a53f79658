"""A model in a process of its own, for doors that never import torch. Reads and writes JSON.

    python -m workers.oneshot devices              [[name, memory in bytes], …]
    python -m workers.oneshot describe SOURCE      what the catalogue records of a model
    python -m workers.oneshot gateway              a gateway's address on standard input → what the catalogue records
    python -m workers.oneshot queries SOURCE       {"prompt", "texts"} on standard input → vectors
    python -m workers.oneshot tokens SOURCE        {"prompt", "texts", "max_tokens"} → [lengths, which are cut]

SOURCE is a folder, or a hub id and its revision. Of a gateway's model, `queries -` finds the address in the payload.

An error is one line on standard error, and exit code 2.
"""

import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from pipeline.catalog import weights_bytes, weights_sha256
from pipeline.errors import VectormillError
from pipeline.jobs import Upstream
from workers.weights import Source


def describe(source: Source) -> dict[str, Any]:
    """What the catalogue records of a model: fingerprint, sizes, prompts, canary, rate on this machine.

    Raises:
        ModelError: it can't be loaded or batched.
    """
    import numpy as np

    from workers.encoder import Encoder, list_devices

    folder = source.folder()
    fingerprint = weights_sha256(folder)
    device, _ = list_devices()[0]
    prompts = Encoder(folder, device).prompts
    document = prompts.get("document") or prompts.get("passage") or ""
    # Measured as a slot embeds: one of two replicas that share a CPU.
    encoder = Encoder(folder, device, document_prompt=document, threads=max(1, (os.cpu_count() or 1) // 2))
    canary = encoder.canary()
    return {
        "path": source.path,
        "hub_id": source.hub_id,
        "revision": source.revision,
        "weights_sha256": fingerprint,
        "weights_bytes": weights_bytes(folder),
        "dimensions": encoder.dimensions,
        "max_item_tokens": encoder.max_item_tokens,
        "document_prompt": document,
        "query_prompt": prompts.get("query", ""),
        "normalised": bool(abs(float(np.linalg.norm(canary)) - 1) < 1e-3),
        "canary": canary.astype("<f4").tobytes().hex(),
        "tokens_per_second": _rate(encoder),
    }


def _source(words: list[str]) -> Source:
    match words:
        case [folder]:
            return Source(path=folder)
        case [hub_id, revision]:
            return Source(hub_id=hub_id, revision=revision)
    raise SystemExit(__doc__)


def _rate(encoder: Any) -> float:
    """Tokens a second over a second's work on texts of usual length."""
    text = "A sentence of a usual length, as it stands in the documents that people embed. " * 4
    tokens, start = 0, perf_counter()
    while perf_counter() - start < 1.0:
        tokenised = encoder.tokenise([text] * 32)
        encoder.encode(tokenised)
        tokens += int(tokenised.lengths.sum())
    return round(tokens / (perf_counter() - start), 1)


def queries(folder: Path, prompt: str, texts: list[str]) -> list[list[float]]:
    """Vectors of search queries, with the model's query prompt."""
    from workers.encoder import Encoder, list_devices

    encoder = Encoder(folder, list_devices()[0][0])
    vectors: list[list[float]] = encoder.encode(encoder.tokenise(texts, prompt=prompt)).tolist()
    return vectors


def tokens(folder: Path, prompt: str, texts: list[str], max_tokens: int | None) -> tuple[list[int], list[bool]]:
    """How many tokens the model reads of each document, and whether it cuts it."""
    from workers.encoder import Encoder

    read = Encoder(folder, "cpu").tokenise(texts, max_tokens, prompt=prompt)
    return read.lengths.tolist(), read.truncated.tolist()


def main(arguments: list[str]) -> Any:
    """Do what the arguments say."""
    match arguments:
        case ["devices"]:
            from workers.encoder import list_devices

            return list_devices()
        case ["gateway"]:
            from workers import inquiry

            return inquiry.describe(Upstream(**json.load(sys.stdin)))
        case ["queries", "-"]:
            from workers import inquiry

            asked = json.load(sys.stdin)
            return inquiry.embed_now(Upstream(**asked["upstream"]), [asked["prompt"] + text for text in asked["texts"]])
        case ["describe", *source]:
            return describe(_source(source))
        case ["queries", *source]:
            asked = json.load(sys.stdin)
            return queries(_source(source).folder(), asked["prompt"], asked["texts"])
        case ["tokens", *source]:
            asked = json.load(sys.stdin)
            return tokens(_source(source).folder(), asked["prompt"], asked["texts"], asked["max_tokens"])
    raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1:])))
    except VectormillError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
