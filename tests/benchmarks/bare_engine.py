"""The encoder with nothing around it. For each line on standard input it tokenises and encodes all texts, and prints
the seconds that this took.

    python -m tests.benchmarks.bare_engine TEXTS.json MODEL_FOLDER THREADS
"""

import json
import sys
from pathlib import Path
from time import perf_counter

from workers.encoder import Encoder

_WARM_UP_TEXTS = 160


def main(path: str, folder: str, threads: str) -> None:
    """Load, warm up, say `ready`, then do as told."""
    texts = json.loads(Path(path).read_text(encoding="utf-8"))
    encoder = Encoder(Path(folder), "cpu", threads=int(threads))
    encoder.encode(encoder.tokenise(texts[:_WARM_UP_TEXTS]))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = perf_counter()
        encoder.encode(encoder.tokenise(texts))
        print(perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
