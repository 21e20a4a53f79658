"""Runner of the GPU's benchmark: prints one row after the other. See `--help`."""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from tests.benchmarks import gpu

_CALM = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}
_SERVERS = ("VECTORMILL_DATABASE_URL", "VECTORMILL_REDIS_URL")


def main() -> int:
    """Measure. Return exit code 0, or 1 if something failed or vectors differ."""
    begun = monotonic()
    arguments = _arguments()
    for name in [name for name in os.environ if name.startswith("VECTORMILL_") and name not in _SERVERS]:
        del os.environ[name]
    os.environ |= _CALM
    try:
        import torch

        from tests.benchmarks.gpu.table import Table
    except ModuleNotFoundError as error:
        print(f"the package {error.name} isn't installed; --help lists what is needed", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu --quick tries the benchmark out", file=sys.stderr)
        return 2
    with TemporaryDirectory(prefix="vectormill-bench-") as folder:
        table = Table(Path(folder), arguments.device, begun + 60 * arguments.minutes, quick=arguments.quick)
        table.print_all()
    return int(table.failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu",
        description=gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time that it takes at most, about; default: 8")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and few texts, to try out whether it runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
