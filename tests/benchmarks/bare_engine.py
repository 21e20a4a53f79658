"""Encoder with nothing around it. For each line on standard input it tokenises and encodes all texts, AT_A_TIME at a
time, and prints the seconds that this took."""

import json
import sys
from pathlib import Path
from time import perf_counter

from workers.encoders.imports import import_library

_WARM_UP_TEXTS = 160


def main(path: str, folder: str, threads: str, at_a_time: str) -> None:
    """Load the encoder, warm it up and print `ready`; then embed all texts for each line of input."""
    import_library()  # as workers do
    from workers.encoders.local import LocalEncoder

    texts = json.loads(Path(path).read_text(encoding="utf-8"))
    encoder = LocalEncoder(Path(folder), "cpu", threads=int(threads))
    encoder.encode(encoder.tokenise(texts[:_WARM_UP_TEXTS]))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = perf_counter()
        for at in range(0, len(texts), int(at_a_time)):
            encoder.encode(encoder.tokenise(texts[at : at + int(at_a_time)]))
        print(perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
