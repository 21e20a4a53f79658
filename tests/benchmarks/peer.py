"""Another library's pipeline over texts, in a process of its own, since such pipelines start processes and pools.

    python -m tests.benchmarks.peer ray|daft FOLDER FEW < TEXTS.json

It embeds the first FEW texts and then all, and prints the difference in seconds: the time until its processes have
loaded the model is in both, and isn't counted.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

_BATCH = 64

#: Embeds texts with the model in a folder, and returns the number of vectors.
Pipeline = Callable[[list[str], str], int]


class _Embedder:
    """Actor of Ray, which loads the model once."""

    def __init__(self, folder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(folder, device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed a batch of rows."""
        return {"vector": self._model.encode(batch["text"].tolist(), show_progress_bar=False)}


def with_ray(texts: list[str], folder: str) -> int:
    """Embed with Ray Data: an actor for each core, as its guide to batch inference does."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    cores = os.cpu_count() or 1
    if not ray.is_initialized():
        # One more, for what isn't an actor.
        ray.init(num_cpus=cores + 1, include_dashboard=False, logging_level="error", log_to_driver=False)
    DataContext.get_current().enable_progress_bars = False
    rows = from_items([{"text": text} for text in texts], override_num_blocks=-(-len(texts) // _BATCH))
    made = rows.map_batches(
        _Embedder,
        fn_constructor_args=(folder,),
        batch_size=_BATCH,
        compute=ActorPoolStrategy(size=cores),
        num_cpus=1,
    )
    return int(made.materialize().count())


def with_daft(texts: list[str], folder: str) -> int:
    """Embed with Daft's own function for it."""
    import daft
    from daft.functions import embed_text

    vectors = embed_text(daft.col("text"), provider="transformers", model=folder)
    return len(daft.from_pydict({"text": texts}).select(vectors.alias("vector")).collect())


PIPELINES: Mapping[str, Pipeline] = {"ray": with_ray, "daft": with_daft}


def main(name: str, folder: str, few: str) -> None:
    """Print the seconds that all texts take beyond the first few."""
    texts: list[str] = json.load(sys.stdin)
    start, run = texts[: int(few)], PIPELINES[name]
    _seconds(run, start, folder)  # warms up
    begun = _seconds(run, start, folder)
    print(_seconds(run, texts, folder) - begun)


def _seconds(run: Pipeline, texts: list[str], folder: str) -> float:
    start = perf_counter()
    count = run(texts, folder)
    taken = perf_counter() - start
    assert count == len(texts), f"{count:,} vectors of {len(texts):,} texts"
    return taken


if __name__ == "__main__":
    main(*sys.argv[1:])
