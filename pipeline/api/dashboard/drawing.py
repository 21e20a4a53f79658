"""Bars, strips and curves as numbers that a template turns into SVG. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import RowMapping

from pipeline.api.dashboard import words
from pipeline.core import humanize
from pipeline.core.job_status import ItemCounts
from pipeline.db.dashboard import Cell

#: Widths of a column of the throughput chart: with steps like these it is redrawn seldom while a job goes on.
_WIDTHS_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 43_200, 86_400, 604_800)
_LEAST_COLUMNS, _MOST_COLUMNS = 12, 60
MOST_CELLS = 120


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar, in hundredths of the whole."""

    kind: str
    begin: float
    width: float


def bar(items: ItemCounts) -> list[Segment]:
    """A job's items by outcome; what is waiting is the rest."""
    segments, at = [], 0.0
    for kind in ("embedded", "reused", "rejected", "cancelled"):
        if items.total and (count := getattr(items, kind)):
            # One reject among millions must be seen.
            width = max(0.6, 100 * count / items.total)
            segments.append(Segment(kind, round(min(at, 100 - width), 2), round(width, 2)))
            at += width
    return segments


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a chart: `height` in hundredths of the highest scale line."""

    begin: float
    width: float
    height: float
    tip: str
    #: Its time isn't over yet.
    open: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Columns side by side."""

    columns: Sequence[Column]
    #: What the scale's highest line stands for.
    top: float
    begin: str
    end: str


def width_of_columns(seconds: float) -> int:
    """How many seconds a column of the throughput chart stands for, of a job that took `seconds`."""
    return next((width for width in _WIDTHS_SECONDS if seconds / width <= _MOST_COLUMNS), _WIDTHS_SECONDS[-1])


def throughput(
    spans: Sequence[tuple[int, int, int]], width_seconds: int, begin: datetime, end: datetime, *, going_on: bool
) -> Chart:
    """Tokens a second over time. `spans` as `db.dashboard.throughput` gives them."""
    first = int(begin.timestamp() // width_seconds) * width_seconds
    slots = max(1, int((end.timestamp() - first) // width_seconds) + 1)
    # A job of a second is a column, not a wall.
    room = max(slots, _LEAST_COLUMNS)
    top = _scale(max((tokens / width_seconds for _, _, tokens in spans), default=0.0))
    columns = []
    for start, items, tokens in spans:
        at = (start - first) // width_seconds
        rate = tokens / width_seconds
        when = f"{datetime.fromtimestamp(start, UTC):%H:%M:%S}"
        columns.append(
            Column(
                begin=round(100 * at / room, 3),
                width=round(100 / room, 3),
                height=round(100 * rate / top, 2) if top else 0.0,
                tip=f"{humanize.short(rate)} tok/s, {humanize.short(items / width_seconds)} items/s"
                f"|{humanize.duration(width_seconds)} from {when} UTC",
                open=going_on and start + width_seconds > end.timestamp(),
            )
        )
    last = datetime.fromtimestamp(first + room * width_seconds, UTC)
    return Chart(columns, top, _clock(begin, begin, last), _clock(last, begin, last))


def _clock(moment: datetime, begin: datetime, end: datetime) -> str:
    """A moment, with its day where the chart covers more than one."""
    pattern = "%H:%M:%S" if (end - begin).total_seconds() < 3_600 else "%H:%M"
    return f"{moment.astimezone(UTC):{pattern if begin.date() == end.date() else '%d %b %H:%M'}}"


def _scale(highest: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10, times a power of ten."""
    if highest <= 0:
        return 0.0
    power = 10.0 ** (len(str(int(highest))) - 1) if highest >= 1 else 1.0
    return next(power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= highest)


def days(rows: Sequence[RowMapping], names: Sequence[str]) -> Chart:
    """Tokens of each day of `names`, from usage by day."""
    by_day = {row["group"]: (row["total_tokens"], row["cost"]) for row in rows}
    top = _scale(max((float(tokens) for tokens, _ in by_day.values()), default=0.0))
    columns = []
    for at, name in enumerate(names):
        tokens, costs = by_day.get(name, (0, None))
        more = f", cost {words.money(costs)}" if costs is not None else ""
        columns.append(
            Column(
                begin=round(100 * at / len(names), 3),
                width=round(100 / len(names), 3),
                height=round(100 * tokens / top, 2) if top else 0.0,
                tip=f"{words.count(int(tokens), 'token')}{more}|{name}",
            )
        )
    return Chart(columns, top, names[0], names[-1])


@dataclass(frozen=True, slots=True)
class Drawn:
    """A cell of the chunk strip."""

    kind: str
    tip: str
    #: Some of its chunks were claimed more than once.
    again: bool


def strip(cells: Sequence[Cell]) -> list[Drawn]:
    """Cells by the worst that is true of their chunks."""
    return [Drawn(_kind(cell), _tip(cell), cell.claims > cell.chunks) for cell in cells]


def _kind(cell: Cell) -> str:
    kinds = {
        "trouble": cell.lost,
        "cancelled": cell.cancelled,
        "running": cell.running,
        "pending": cell.pending,
        "rejected": cell.rejected_items,
    }
    return next((kind for kind, holds in kinds.items() if holds), "done")


def _tip(cell: Cell) -> str:
    if cell.chunks == 1:
        name = f"chunk {cell.first_chunk + 1:,}"
    else:
        name = f"chunks {cell.first_chunk + 1:,} to {cell.last_chunk + 1:,}"
    done = cell.chunks - cell.pending - cell.running - cell.cancelled
    states = {"done": done, "running": cell.running, "waiting": cell.pending, "cancelled": cell.cancelled}
    told = ", ".join(f"{number:,} {state}" if cell.chunks > 1 else state for state, number in states.items() if number)
    lines = [f"{name}: {told}", f"{words.count(cell.items, 'item')}, {words.count(cell.claims, 'attempt')}"]
    if cell.rejected_items:
        lines.append(words.count(cell.rejected_items, "reject"))
    if cell.lost:
        lines.append(f"{words.count(cell.lost, 'attempt')} lost: {cell.last_error or 'no reason known'}")
    return "|".join(lines)
