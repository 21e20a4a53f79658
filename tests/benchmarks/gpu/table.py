"""Table of the GPU's benchmark: its rows in order, each printed when it is measured, in the time that there is."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import torch

from pipeline.core.errors import ServerFailed, ServiceUnreachable
from tests.benchmarks.gpu import texts as kinds
from tests.benchmarks.gpu.embedding import AHEAD, OURS, TOKENISING, Contenders, Row
from tests.benchmarks.gpu.models import BGE_LARGE, MINILM, Shape, make_model
from tests.benchmarks.gpu.texts import Texts
from tests.benchmarks.roofline import MatrixProduct, flops_per_token

if TYPE_CHECKING:
    from tests.benchmarks.gpu.pipeline import Fleet

#: The most telling rows come first, then the jobs, which need some of their rates.
_FIRST = ((BGE_LARGE, kinds.LONG), (MINILM, kinds.SHORT), (BGE_LARGE, kinds.MIXED), (MINILM, kinds.MIXED))
_LAST = ((MINILM, kinds.LONG), (BGE_LARGE, kinds.SHORT), (BGE_LARGE, kinds.LONGEST), (MINILM, kinds.LONGEST))
_JOBS = (MINILM, BGE_LARGE)
#: Time of all jobs, in rows.
_JOBS_WEIGHT = 4
_LEAST_SECONDS = 1.0
#: Tokens and texts of a row. With more its rates would be the same.
_ROW_TOKENS, _LEAST_TEXTS = 3_000_000, 64
_QUICK_TOKENS, _QUICK_TEXTS, _QUICK_SECONDS = 1_000, 8, 1.0
_PRODUCTS = 10
_JOB_SECONDS, _MOST_JOB_TOKENS = 12, 30_000_000


class Table:
    """Table that is printed until a time of the monotonic clock."""

    def __init__(self, folder: Path, device: str, until: float, *, quick: bool) -> None:
        self._folder, self._device, self._until, self._quick = folder, device, until, quick
        self._texts = Texts()
        self._loaded: dict[str, Contenders] = {}
        #: The encoder's tokens per second.
        self._rates: dict[tuple[Shape, str], float] = {}
        self._weight_left = len(_FIRST) + _JOBS_WEIGHT + len(_LAST)
        self._peak = 0.0
        #: True if something failed, or vectors differ.
        self.failed = False

    def print_all(self) -> None:
        """Measure and print all rows."""
        self._print_head()
        for shape, kind in _FIRST:
            self._print(f"{shape.name}, {kind}", 1, partial(self._print_rates_of, shape, kind))
        self._print("whole jobs of mixed texts", _JOBS_WEIGHT, self._print_jobs)
        for shape, kind in _LAST:
            self._print(f"{shape.name}, {kind}", 1, partial(self._print_rates_of, shape, kind))

    def _print_head(self) -> None:
        dtype, size = (torch.bfloat16, 8_192) if self._device == "cuda" else (torch.float32, 512)
        product = MatrixProduct(self._device, dtype, size)
        # The best of several: an idle GPU has yet to raise its clock.
        self._peak = max(product.flops_per_second() for _ in range(_PRODUCTS))
        name = torch.cuda.get_device_name() if self._device == "cuda" else "CPU"
        _say(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}")
        _say(f"matrix product of {size:,} × {size:,}, {dtype}: {self._peak / 1e12:,.3g} TFLOP/s")
        if self._device == "cpu":
            _say("on a CPU ours is in float32, whatever it is told")
        if self._quick:
            _say("tiny models and few texts: that it runs is all that this tells")

    def _print(self, name: str, weight: int, measure: Callable[[], None]) -> None:
        """Print a row that `measure` prints, or why it doesn't."""
        _say(f"\n{name}")
        try:
            if self._share(weight) < _LEAST_SECONDS:
                raise TimeoutError("no time is left")
            measure()
        except ModuleNotFoundError as error:
            _say(f"  skipped: the package {error.name} isn't installed")
        except (TimeoutError, ServerFailed, ServiceUnreachable) as error:
            _say(f"  skipped: {error}")
        except Exception as error:  # noqa: BLE001 - the next rows may tell more than this one
            self.failed = True
            _say(f"  FAILED: {type(error).__name__}: {error}")
        self._weight_left -= weight

    def _share(self, weight: int) -> float:
        """Return the seconds of a row: its part of the time that is left."""
        return (self._until - monotonic()) * weight / self._weight_left

    def _print_rates_of(self, shape: Shape, kind: str) -> None:
        model = self._load(shape)
        if self._quick:
            row = model.measure(self._texts.of(kind, _QUICK_TOKENS, _QUICK_TEXTS), _QUICK_SECONDS)
        else:
            row = model.measure(self._texts.of(kind, _ROW_TOKENS, _LEAST_TEXTS), self._share(1))
        self._rates[shape, kind] = row.rates[OURS]
        self.failed |= not row.equal
        self._print_rates(row, flops_per_token(model.folder))

    def _print_rates(self, row: Row, flops: int) -> None:
        _line(f"rounds: {row.rounds}; tokens a text: {row.tokens_per_text:,.0f}", "tokens/s", "ours is", "of matmul")
        ours = row.rates[OURS]
        for name, rate in row.rates.items():
            if name == TOKENISING:
                texts, cores = rate / row.tokens_per_text, row.rates[AHEAD] / rate
                _line(name, f"{rate:,.0f}")
                _say(f"    that is {texts:,.0f} texts/s; {cores:.2g} cores keep up with the encoder")
            else:
                ratio = "" if name in (AHEAD, OURS) else f"{ours / rate:.2f} ×"
                _line(name, f"{rate:,.0f}", ratio, self._of_peak(rate, flops))
        for name, cosine in row.cosines.items():
            _line(f"least cosine, {name}", f"{cosine:.7f}")
        if not row.equal:
            _say("  IN FLOAT32 VECTORS DIFFER")

    def _print_jobs(self) -> None:
        until = monotonic() + self._share(_JOBS_WEIGHT)
        # Imported here since the other rows need no servers, nor the packages that talk to them.
        from tests.benchmarks.gpu import pipeline

        with pipeline.fleet({shape.name: self._load(shape).folder for shape in _JOBS}, self._device) as fleet:
            _line("from queued to completed", "tokens/s", "of encoder", "of matmul")
            for shape in _JOBS:
                for output in pipeline.OUTPUTS:
                    self._print_job(fleet, shape, output, until)

    def _print_job(self, fleet: "Fleet", shape: Shape, output: str, until: float) -> None:
        name, alone = f"{shape.name}, vectors to {output}", self._rates.get((shape, kinds.MIXED))
        if alone is None:
            _line(name, "skipped: there is no rate of the encoder alone")
            return
        tokens = _QUICK_TOKENS if self._quick else min(_MOST_JOB_TOKENS, round(alone * _JOB_SECONDS))
        try:
            if monotonic() > until:
                raise TimeoutError("no time is left")
            rate = fleet.rate(shape.name, self._texts.of(kinds.MIXED, tokens, _LEAST_TEXTS), output, until)
        except TimeoutError as error:
            _line(name, str(error))
        else:
            flops = flops_per_token(self._load(shape).folder)
            _line(name, f"{rate:,.0f}", f"{rate / alone:.0%}", self._of_peak(rate, flops))

    def _of_peak(self, rate: float, flops: int) -> str:
        return f"{rate * flops / self._peak:.1%}"

    def _load(self, shape: Shape) -> Contenders:
        if shape.name not in self._loaded:
            made = shape.tiny() if self._quick else shape
            folder = make_model(made, self._folder / shape.name, self._device)
            self._loaded[shape.name] = Contenders(folder, self._device)
        return self._loaded[shape.name]


def _line(name: str, *cells: str) -> None:
    _say(f"  {name:<46}" + "".join(f"{cell:>14}" for cell in cells))


def _say(line: str) -> None:
    print(line, flush=True)
