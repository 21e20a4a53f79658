"""Common parts of the benchmarks: interleaved rounds, ratios of medians, the table and the file of results."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

#: Measures one side once, given the round's number from 0.
Side = Callable[[int], float]
#: Measurements of each side, round by round.
Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Number of rounds, and the callback for each measurement."""

    count: int
    on_value: Callable[[int, str, float], None]

    def interleave(self, sides: Mapping[str, Side]) -> Values:
        """Measure the sides in turn, A B A B …, so that a disturbance of the machine affects all of them."""
        values: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.count):
            for name, measure in sides.items():
                values[name].append(measure(number))
                self.on_value(number, name, values[name][-1])
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Comparison of two things. `measure` returns ours first, then the one it is compared with; any further side is
    shown for information."""

    name: str
    #: Lowest accepted ratio of the first side's median to the second's.
    target: float
    unit: str
    measure: Callable[[Rounds], Values]


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of a benchmark."""

    benchmark: Benchmark
    values: Values

    @property
    def medians(self) -> dict[str, float]:
        """Median of each side over the rounds."""
        return {name: median(series) for name, series in self.values.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """First side's median divided by the median of each other side."""
        (_, ours), *others = self.medians.items()
        return {name: ours / other for name, other in others}

    @property
    def ratio(self) -> float:
        """Ratio that the target applies to."""
        return next(iter(self.ratios.values()))

    @property
    def by_round(self) -> list[float]:
        """The same ratio in each round, to see how much it scatters."""
        ours, theirs, *_ = self.values.values()
        return [a / b for a, b in zip(ours, theirs, strict=True)]

    @property
    def missed(self) -> bool:
        """True if the ratio is below its target."""
        return self.ratio < self.benchmark.target

    def record(self) -> dict[str, Any]:
        """Return the result as it stands in the file."""
        return {
            "name": self.benchmark.name,
            "ratio": round(self.ratio, 4),
            "target": self.benchmark.target,
            "rounds": len(self.by_round),
            "unit": self.benchmark.unit,
            "medians": {name: round(value, 1) for name, value in self.medians.items()},
            "ratio_to": {name: round(value, 4) for name, value in self.ratios.items()},
            "ratio_by_round": [round(value, 4) for value in self.by_round],
        }


#: No downloads, and no progress bars in between the results.
_CALM = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def use_default_settings() -> None:
    """Remove all settings from the environment, to measure the defaults on servers of our own."""
    for name in [name for name in os.environ if name.startswith("VECTORMILL_")]:
        del os.environ[name]
    os.environ |= _CALM


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write the file of results, a JSON list."""
    path.write_text(json.dumps([result.record() for result in results], indent=2) + "\n", encoding="utf-8")


def result_table(results: Iterable[Result]) -> Table:
    """Return the table of all results, with missed targets marked."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("benchmark")
    table.add_column("medians")
    for heading in ("ratio", "rounds", "target"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for result in results:
        _add_rows(table, result)
    return table


def _add_rows(table: Table, result: Result) -> None:
    (ours, ours_median), (theirs, theirs_median), *further = result.medians.items()
    unit = result.benchmark.unit
    table.add_row(
        result.benchmark.name,
        f"{ours} {ours_median:,.0f}, {theirs} {theirs_median:,.0f} {unit}",
        f"{result.ratio:.3f}",
        f"{min(result.by_round):.2f}–{max(result.by_round):.2f}",
        f"{result.benchmark.target:g}",
        Text("MISSED", "bold red") if result.missed else Text("met", "green"),
    )
    for name, value in further:
        table.add_row("", f"for information: {name} {value:,.0f} {unit}", f"{result.ratios[name]:.3f}", style="dim")
