"""Dry run of `vectormill submit`: what a job would cost, by the fleet's rates or by those measured here."""

import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import accumulate
from typing import Any

from rich.table import Table
from rich.text import Text
from sqlalchemy import RowMapping

from pipeline.catalog.models import as_model, find_row, portable
from pipeline.catalog.rates import slot_rates
from pipeline.cli.context import CommandContext, database_url
from pipeline.cli.oneshot import oneshot
from pipeline.cli.output import print_json, stderr, stdout, tell
from pipeline.core import humanize
from pipeline.core.errors import UserError
from pipeline.core.options import KeptOptions
from pipeline.db import usage, workers
from pipeline.ingest.estimate import Fleet, Measurement, Tokens, estimate
from pipeline.ingest.prediction import Measured, Rates, catalogue_rates, is_enough, workers_rates
from pipeline.ingest.request import JobRequest
from pipeline.ingest.row_costs import SampleRow, measure_rows
from pipeline.ingest.submission import planning
from pipeline.ingest.submit import tell_namesake
from pipeline.sources import Source

#: Age of the workers' chunks that count.
_WINDOW_SECONDS = 3_600.0
#: Time for which a model is measured here; with what comes before and after, less than 30 s.
_MEASURE_SECONDS = 12.0
#: Slots of a machine by default.
_USUAL_SLOTS = 2
_MOST_ITEMS = 10**15
#: Texts and carried columns that are measured.
_SAMPLE_BYTES = 16 * 1024 * 1024


def read_count(given: str | None) -> int | None:
    """Return the number of items that `--at` names, such as `1e9` or `1_000_000`.

    Raises:
        UserError: it isn't a positive whole number.
    """
    if given is None:
        return None
    try:
        count = Decimal(given)
    except InvalidOperation:
        count = Decimal("nan")
    if not count.is_finite() or not 1 <= count <= _MOST_ITEMS or count != int(count):
        raise UserError("give a positive whole number of items, such as 1e9 or 1_000_000.", field="at", given=given)
    return int(count)


def estimate_job(place: CommandContext, wish: JobRequest, corpus: Source, at: int | None) -> dict[str, Any]:
    """Estimate a job, scaled to `at` items if given."""
    with place.engine.begin() as connection:
        row = find_row(connection, place.workspace_id, wish.model)
        rates = slot_rates(connection, as_model(row), wish.precision)
        live = [dict(each) for each in workers.live(connection) if row["name"] in each["models"]]
        tell_namesake(connection, place.workspace_id, str(wish.name), corpus)
    fleet = Fleet(
        slots=sum(worker["slots"] for worker in live),
        devices=sum(map(_devices, live)),
        planning=planning(place.settings),
    )
    price = row["price_per_million"]
    return estimate(
        corpus,
        replace(as_model(row), tokens_per_second=min(rates.values())),
        wish,
        fleet,
        _Measuring(place, row, wish, corpus, *slots_of_a_machine(live)).measure,
        price_per_million=None if price is None else float(price),
        at=at,
    )


def slots_of_a_machine(live: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the slots that share a device on this machine, or on another if no worker is here, and how many of them
    are one worker's."""
    hosts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for worker in live:
        hosts[worker["host"]].append(worker)
    machine = hosts.get(socket.gethostname()) or max(hosts.values(), key=len, default=[])
    replicas = max((worker["slots"] // _devices(worker) for worker in machine), default=_USUAL_SLOTS)
    on_cpu = [worker["slots"] for worker in machine if worker["device"] == "cpu"]
    return sum(on_cpu) or replicas, replicas


def _devices(worker: Mapping[str, Any]) -> int:
    return len(worker["device"].split(","))


def _bounded(rows: Sequence[SampleRow]) -> Sequence[SampleRow]:
    """Return as many of the rows as their bytes allow, at least one."""
    ends = accumulate(len(row.text) + len(row.title) + len(row.carried or b"") for row in rows)
    return rows[: max(1, sum(1 for end in ends if end <= _SAMPLE_BYTES))]


@dataclass(frozen=True, slots=True)
class _Measuring:
    """Measurement of a sample for one dry run."""

    place: CommandContext
    row: RowMapping
    wish: JobRequest
    corpus: Source
    #: Slots that are measured at once, and those of one worker, which have a share of the cores each.
    slots: int
    replicas: int

    def measure(self, rows: Sequence[SampleRow], items: int) -> Measurement:
        """Measure sampled rows, for a job of about `items` items. Of very long ones a part is enough."""
        rows = _bounded(rows)
        options = KeptOptions.of(self.wish, self.corpus.columns, self.corpus.item_bytes, None)
        item, vector = measure_rows(self.place.engine, rows, options, self._dimensions)
        with self.place.engine.begin() as connection:
            work = usage.recent_chunks(
                connection, self.row["name"], parquet=options.output is not None, window_seconds=_WINDOW_SECONDS
            )
        if rows and is_enough(work, items):
            tokens, tokenise_seconds = self._tokens(rows, options)
            rates = workers_rates(work, tokenise_seconds, vector.seconds)
        elif rows and self.row["kind"] == "local":
            tokens, rates = self._measured_here(rows, options)
        else:
            tokens, _ = self._tokens(rows, options)
            rates = catalogue_rates(self.row["tokens_per_second"], vector.seconds)
        return Measurement(tokens=tokens, rates=rates, item=item, vector=vector)

    @property
    def _dimensions(self) -> int:
        return self.wish.dimensions or self.row["dimensions"]

    @property
    def _max_item_tokens(self) -> int | None:
        bounds = (self.wish.max_item_tokens, self.row["max_item_tokens"])
        return min((bound for bound in bounds if bound), default=None)

    def _tokens(self, rows: Sequence[SampleRow], options: KeptOptions) -> tuple[Tokens, float]:
        """Return the tokens of sampled rows, and the seconds in which one is read."""
        texts = [row.text.decode() for row in rows]
        if self.row["kind"] == "gateway":  # only the upstream has its tokeniser
            stderr.print("Tokens are estimated: an upstream counts them itself, and four characters are about one.")
            return Tokens([len(text) // 4 + 1 for text in texts], [False] * len(texts), [0] * len(texts)), 0.0
        asked = {
            "model": portable(as_model(self.row)),
            "texts": texts,
            "titles": [row.title.decode() for row in rows],
            "options": options.to_json(),
            "max_item_tokens": self._max_item_tokens,
        }
        counted, seconds = oneshot(["tokens"], asked)
        return Tokens(**counted), seconds / max(1, sum(counted["lengths"]))

    def _measured_here(self, rows: Sequence[SampleRow], options: KeptOptions) -> tuple[Tokens, Rates]:
        stderr.print(
            "Workers did too little with this model lately to tell its rate; measuring it here, for about 20 s."
        )
        found = oneshot(
            ["measure"],
            {
                "model": portable(as_model(self.row)),
                "rows": [
                    (row.key, row.text.decode(), row.carried and row.carried.decode(), row.title.decode())
                    for row in rows
                ],
                "options": options.to_json(),
                "dimensions": self._dimensions,
                "max_item_tokens": self._max_item_tokens,
                "slots": self.slots,
                "replicas": self.replicas,
                "seconds": _MEASURE_SECONDS,
                "database_url": database_url(self.place.settings),
            },
        )
        return Tokens(**found.pop("tokens")), Rates(measured=Measured.HERE, **found)


def print_estimate(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print an estimate, and its notices on standard error."""
    tell(found["notices"])
    if as_json:
        print_json(found)
    else:
        stdout.print(_table(found))
        for passage in (found["passages"] or {"sample": []})["sample"]:
            stdout.print(_passage(passage))


def _table(found: Mapping[str, Any]) -> Table:
    """Return an estimate as a table, a line for each piece of time, size and cost."""
    items, tokens, time, pieces = found["items"], found["tokens"], found["time"], found["pieces"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column()
    scaled = "scaled from the corpus; " if found["at"] else ""
    table.add_row("items", f"{items['total']:,}   {scaled}about {items['rejected']:,} would be rejected")
    table.add_row("tokens", f"about {tokens['total']:,}   95 %: {tokens['low']:,} to {tokens['high']:,}")
    table.add_row("", f"{tokens['mean']:g} a text, measured on {tokens['sampled_items']:,} of them")
    duplicates = found["duplicates"]
    once = "; embedded once" if found["embedded_once"] and duplicates["share"] else ""
    table.add_row("duplicates", f"{duplicates['share']:.1%} of {duplicates['compared_items']:,} texts compared{once}")
    if passages := found["passages"]:
        table.add_row("passages", f"about {passages['total']:,}   {passages['mean']:g} a text")
    lost = found["truncated"]["lost_tokens"]
    loss = f"   about {lost:,} tokens wouldn't be read; --on-long split makes passages" if lost else ""
    table.add_row("truncated", f"{found['truncated']['share']:.1%}{loss}")
    slots = _count(time["slots"], "slot") if time["slots"] else "one slot; no worker serves this model now"
    table.add_row("time", f"about {humanize.duration(time['seconds'])} on {slots}")
    table.add_row("  submit", f"{humanize.duration(pieces['submit_seconds'])}   {_SUBMITTING[found['by_reference']]}")
    table.add_row("  start", humanize.duration(pieces["start_seconds"]))
    rate = humanize.short(time["tokens_per_second"])
    table.add_row("  embed", f"{humanize.duration(pieces['embed_seconds'])}   with writing {rate} tok/s")
    table.add_row("  write", humanize.duration(pieces["write_seconds"]))
    table.add_row("", _measured(time))
    table.add_row("WAL", f"about {humanize.size(pieces['wal_bytes'])}")
    for where, name in (("postgres", "Postgres"), ("parquet", "Parquet")):
        if found["bytes"][where]:
            table.add_row("disk", f"about {humanize.size(found['bytes'][where])} in {name}")
    if pieces["cost"] is None:
        table.add_row("cost", f"{_hours(pieces['device_hours'])} of devices; the model has no price")
    else:
        table.add_row("cost", f"about {pieces['cost']:,.2f}   and {_hours(pieces['device_hours'])} of devices")
    return table


def _passage(passage: Mapping[str, Any]) -> Text:
    """Return a passage of the sample, cut to a few lines."""
    name = f"{passage['key'] or 'a text'}, passage {passage['passage']:,}"
    place = f"characters {passage['start']:,} to {passage['stop']:,}, {passage['tokens']:,} tokens"
    shown = " ".join(passage["text"].split())
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + " …"
    return Text.assemble("\n", (f"{name}   {place}\n", "bright_black"), shown)


_SHOWN_CHARACTERS = 300
_SUBMITTING = {False: "reading and staging the texts", True: "locating the texts"}


def _measured(time: Mapping[str, Any]) -> str:
    match time["measured"]:
        case Measured.WORKERS:
            return "measured by the workers in the last hour"
        case Measured.HERE:
            seconds = humanize.duration(time["measured_seconds"])
            return f"measured here, in {seconds}, on {time['device']}; the workers may differ"
    return "by the catalogue's rate; writing was measured here"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 0.1 else humanize.duration(hours * 3_600)
