"""What the benchmarks share: interleaved rounds, ratios of medians, the table and the file of results."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

#: Measures one side once; gets the round's number, from 0.
Side = Callable[[int], float]
#: What each side measured, round by round.
Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often both sides are measured, and who hears of it."""

    count: int
    on_value: Callable[[int, str, float], None]

    def interleave(self, sides: Mapping[str, Side]) -> Values:
        """Measure A B A B …: what disturbs the machine for a while disturbs all sides."""
        values: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.count):
            for name, measure in sides.items():
                values[name].append(measure(number))
                self.on_value(number, name, values[name][-1])
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Two things to compare. `measure` gives ours first, then what it is compared with; any further side is shown
    for information."""

    name: str
    #: The least ratio of the first side's median to the second's.
    target: float
    unit: str
    measure: Callable[[Rounds], Values]


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark's outcome."""

    benchmark: Benchmark
    values: Values

    @property
    def medians(self) -> dict[str, float]:
        """Each side's median over the rounds."""
        return {name: median(series) for name, series in self.values.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """The first side's median divided by that of each other side."""
        (_, ours), *others = self.medians.items()
        return {name: ours / other for name, other in others}

    @property
    def ratio(self) -> float:
        """The ratio that the target is about."""
        return next(iter(self.ratios.values()))

    @property
    def by_round(self) -> list[float]:
        """That ratio in each round, to see how much it scatters."""
        ours, theirs, *_ = self.values.values()
        return [a / b for a, b in zip(ours, theirs, strict=True)]

    @property
    def missed(self) -> bool:
        """Whether the ratio is below its target."""
        return self.ratio < self.benchmark.target

    def record(self) -> dict[str, Any]:
        """The result as it stands in the file."""
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


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write the file of results, a JSON list."""
    path.write_text(json.dumps([result.record() for result in results], indent=2) + "\n", encoding="utf-8")


def result_table(results: Iterable[Result]) -> Table:
    """All results; what missed its target says so."""
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
