"""Geometry of bars, strips and charts, as numbers that a template turns into SVG. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import RowMapping

from pipeline.api.dashboard import words
from pipeline.core import humanize
from pipeline.core.job_status import ItemCounts
from pipeline.db.dashboard import Cell

#: Column widths of the throughput chart: in steps like these it is seldom redrawn while a job goes on.
_WIDTHS_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 43_200, 86_400, 604_800)
_LEAST_COLUMNS, _MOST_COLUMNS = 12, 60
MOST_CELLS = 120


@dataclass(frozen=True, slots=True)
class Segment:
    """Segment of a bar, in hundredths of the whole."""

    kind: str
    begin: float
    width: float


def bar(items: ItemCounts) -> list[Segment]:
    """Return a bar of a job's items by outcome; pending items are the rest of it."""
    segments, at = [], 0.0
    for kind in ("embedded", "reused", "unchanged", "rejected", "cancelled"):
        if items.total and (count := getattr(items, kind)):
            # A single reject among millions must be visible.
            width = max(0.6, 100 * count / items.total)
            segments.append(Segment(kind, round(min(at, 100 - width), 2), round(width, 2)))
            at += width
    return segments


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a chart: `height` in hundredths of the highest scale line."""

    begin: float
    width: float
    height: float
    tip: str
    #: True while the column's time isn't over yet.
    open: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Chart of columns side by side."""

    columns: Sequence[Column]
    #: Value of the scale's highest line.
    top: float
    begin: str
    end: str


def width_of_columns(seconds: float) -> int:
    """Return the seconds that one column of the throughput chart covers, for a job that took `seconds`."""
    return next((width for width in _WIDTHS_SECONDS if seconds / width <= _MOST_COLUMNS), _WIDTHS_SECONDS[-1])


def throughput(
    spans: Sequence[tuple[int, int, int]], width_seconds: int, begin: datetime, end: datetime, *, going_on: bool
) -> Chart:
    """Return the chart of tokens a second over time. `spans` are those of `db.dashboard.throughput`."""
    first = int(begin.timestamp() // width_seconds) * width_seconds
    slots = max(1, int((end.timestamp() - first) // width_seconds) + 1)
    # A job of one second is drawn as a column, not as the whole chart.
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
    """Format a moment, with its day where the chart covers more than one."""
    pattern = "%H:%M:%S" if (end - begin).total_seconds() < 3_600 else "%H:%M"
    return f"{moment.astimezone(UTC):{pattern if begin.date() == end.date() else '%d %b %H:%M'}}"


def _scale(highest: float) -> float:
    """Round up to 1, 1.5, 2, 3, 4, 5, 6, 8 or 10, times a power of ten."""
    if highest <= 0:
        return 0.0
    power = 10.0 ** (len(str(int(highest))) - 1) if highest >= 1 else 1.0
    return next(power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= highest)


def days(rows: Sequence[RowMapping], names: Sequence[str]) -> Chart:
    """Return the chart of tokens on each day of `names`, from usage by day."""
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


def hours(tokens: Sequence[tuple[datetime, int]]) -> Chart:
    """Return the chart of the tokens of consecutive hours, each given by its beginning. The last one isn't over."""
    top = _scale(max((float(number) for _, number in tokens), default=0.0))
    width = 100 / len(tokens)
    columns = [
        Column(
            begin=round(at * width, 3),
            width=round(width, 3),
            height=round(100 * number / top, 2) if top else 0.0,
            tip=f"{words.count(number, 'token')}|{hour:%H:%M} to {hour + timedelta(hours=1):%H:%M} UTC",
            open=at == len(tokens) - 1,
        )
        for at, (hour, number) in enumerate(tokens)
    ]
    first, end = tokens[0][0], tokens[-1][0] + timedelta(hours=1)
    return Chart(columns, top, _clock(first, first, end), _clock(end, first, end))


@dataclass(frozen=True, slots=True)
class Drawn:
    """Cell of the chunk strip, as it is drawn."""

    kind: str
    tip: str
    #: True if some of its chunks were claimed more than once.
    again: bool
    #: Task of its last claim, if it is one chunk.
    task_id: str | None


def strip(cells: Sequence[Cell]) -> list[Drawn]:
    """Return the chunk strip, each cell in the worst state among its chunks."""
    return [Drawn(_kind(cell), _tip(cell), cell.claims > cell.chunks, cell.task_id) for cell in cells]


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
    lines = [f"{name}: {told}", f"{words.count(cell.items, 'item')}, {words.count(cell.claims, 'claim')}"]
    if cell.rejected_items:
        lines.append(words.count(cell.rejected_items, "reject"))
    if cell.lost:
        lines.append(f"{words.count(cell.lost, 'claim')} lost: {cell.last_error or 'no reason known'}")
    return "|".join(lines)
