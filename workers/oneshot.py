"""Model in a separate process, for callers that never import torch. Reads and writes JSON.

    python -m workers.oneshot devices              [[name, memory in bytes, kind], …]
    python -m workers.oneshot describe SOURCE      the model's record for the catalogue; a bare model needs
                                                   --pooling P before SOURCE
    python -m workers.oneshot gateway              an upstream's fields on standard input → its record
    python -m workers.oneshot queries              {"model", "texts"} on standard input → vectors
    python -m workers.oneshot tokens               {"model", "texts", "titles", "options", "max_item_tokens"}
                                                   → [counts, seconds]
    python -m workers.oneshot measure              {"model", "rows", "slots", …} on standard input → what
                                                   `workers.measuring` finds

SOURCE is a folder, or a hub id and its revision. `model` is a catalogue entry, see `pipeline.catalog.models.portable`.

An error is one line on standard error, and exit code 2.
"""

import json
import os
import sys
from time import perf_counter
from typing import Any

from pipeline.catalog.models import from_portable, weights_bytes, weights_sha256
from pipeline.core.errors import VectormillError
from pipeline.core.models import Model, Upstream
from pipeline.core.options import KeptOptions
from workers.encoders.devices import list_devices
from workers.encoders.imports import import_library
from workers.encoders.layout import check_layout
from workers.encoders.model_cache import Loader
from workers.encoders.weights import WeightsSource


def describe(source: WeightsSource, pooling: str | None = None) -> dict[str, Any]:
    """Prove a model, and return its record for the catalogue: fingerprint, sizes, prompts, canary, rate on this
    machine and the kind of its device, and `notes`, sentences for the person who adds it.

    Raises:
        ModelError: it can't be loaded, isn't a dense text encoder, or has other vectors here than by its library.
    """
    folder = source.folder()
    check_layout(folder, pooling)
    fingerprint = weights_sha256(folder, pooling)
    import_library()
    from workers.encoders.proof import prove

    device = list_devices()[0].name
    # Half of the cores, so that the rate is that of a slot: one of two replicas that share a CPU.
    proof = prove(folder, device, pooling=pooling, threads=max(1, (os.cpu_count() or 1) // 2))
    encoder = proof.encoder
    return {
        "path": source.path,
        "hub_id": source.hub_id,
        "revision": source.revision,
        "pooling": pooling,
        "weights_sha256": fingerprint,
        "weights_bytes": weights_bytes(folder),
        "dimensions": encoder.dimensions,
        "max_item_tokens": encoder.max_item_tokens,
        "document_prompt": proof.document_prompt,
        "query_prompt": proof.query_prompt,
        "normalised": proof.normalised,
        "canary": encoder.canary().astype("<f4").tobytes().hex(),
        "tokens_per_second": _rate(encoder),
        "device": encoder.device_kind,
        "notes": proof.notes,
    }


def _source(words: list[str]) -> WeightsSource:
    match words:
        case [folder]:
            return WeightsSource(path=folder)
        case [hub_id, revision]:
            return WeightsSource(hub_id=hub_id, revision=revision)
    raise SystemExit(__doc__)


def _rate(encoder: Any) -> float:
    """Return the tokens per second, measured for a second on texts of usual length."""
    text = "A sentence of a usual length, as it stands in the documents that people embed. " * 4
    tokens, start = 0, perf_counter()
    while perf_counter() - start < 1.0:
        tokenised = encoder.tokenise([text] * 32)
        encoder.encode(tokenised)
        tokens += int(tokenised.lengths.sum())
    return round(tokens / (perf_counter() - start), 1)


def queries(model: Model, texts: list[str]) -> list[list[float]]:
    """Return the vectors of search queries, embedded with the model's query prompt.

    Raises:
        ModelError: the model isn't the one that was added to the catalogue, or gives no vectors.
    """
    if model.upstream:
        from workers.upstream import probe

        return probe.embed_now(model.upstream, [model.query_prompt + text for text in texts])

    encoder = Loader(list_devices()[0].name, None, "float32").load(model)
    encoder.prove(model.canary)
    vectors: list[list[float]] = encoder.encode(encoder.tokenise(texts, queries=True)).tolist()
    return vectors


def tokens(model: Model, asked: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the tokens of texts, as `workers.measuring.count` does, and the seconds that this took on one core.

    Raises:
        ModelError: the model isn't the one that was added to the catalogue.
    """
    from workers.measuring import count

    encoder, began = Loader("cpu", None, "float32").load(model), perf_counter()
    options = KeptOptions.from_json(asked["options"])
    counted = count(encoder, asked["texts"], asked["titles"], options, asked["max_item_tokens"])
    return counted, perf_counter() - began


def main(arguments: list[str]) -> Any:
    """Run the command that the arguments name, and return its result."""
    match arguments:
        case ["devices"]:
            return list_devices()
        case ["gateway"]:
            from workers.upstream import probe

            return probe.describe(Upstream(**json.load(sys.stdin)))
        case ["describe", "--pooling", pooling, *source]:
            return describe(_source(source), pooling)
        case ["describe", *source]:
            return describe(_source(source))
        case ["queries"]:
            asked = json.load(sys.stdin)
            return queries(from_portable(asked["model"]), asked["texts"])
        case ["tokens"]:
            asked = json.load(sys.stdin)
            return tokens(from_portable(asked["model"]), asked)
        case ["measure"]:
            from workers.measuring import measure

            asked = json.load(sys.stdin)
            return measure(asked, from_portable(asked["model"]))
    raise SystemExit(__doc__)


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1:])))
    except VectormillError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
