"""Drill: a schedule of faults from a seed, done to a site under load, and the table of its results."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from math import inf
from random import Random
from statistics import median, quantiles

from tests.acceptance.fleet import eventually
from tests.acceptance.poison import Poison
from tests.chaos.faults import Back, Kind, concerns
from tests.chaos.kinds import KINDS
from tests.chaos.load import Load
from tests.chaos.on_servers import ROLE_SECONDS
from tests.chaos.secrets import leaks
from tests.chaos.site import BRITTLE, START_SECONDS, Site

#: Time after which a recovery is given up.
_RECOVERY_SECONDS = 600.0
_POLL_SECONDS = 0.05
_PAUSE_SECONDS = (0.0, 1.0)
#: Number of leases for which a fault that is over may still let a lease run out: after a gap in the database the
#: sweep waits for one.
_LEASES_LATER = 3


@dataclass
class Report:
    """Observations of a drill."""

    seed: int
    #: Seconds to recovery of each fault, by kind.
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    items: int = 0
    jobs: int = 0
    tokens_embedded: float = 0
    tokens_committed: float = 0
    chunks: int = 0
    #: Numbers of harmful texts that were rejected for it, by kind.
    poisons: Counter[Poison] = field(default_factory=Counter)
    #: Start of the faults, by the monotonic clock: the preparation before it isn't counted.
    begun: float = 0.0
    #: Number of faults begun.
    tried: int = 0
    #: Start and end of each fault that may let leases run out, by the database's clock.
    windows: list[tuple[datetime, datetime]] = field(default_factory=list)

    @contextmanager
    def objecting(self, what: str) -> Iterator[None]:
        """Turn an exception into an objection, so that the steps after the block are still done."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.said.append(f"{what}: {type(error).__name__}: {error}")

    @property
    def faults(self) -> int:
        """Number of faults done."""
        return sum(map(len, self.recoveries.values()))

    @property
    def wasted(self) -> float:
        """Share of tokens that were embedded in vain."""
        return 1 - self.tokens_committed / self.tokens_embedded if self.tokens_embedded else 0.0

    @property
    def wasted_chunks(self) -> float:
        """Waste per fault, in chunks of average size."""
        wasted = self.tokens_embedded - self.tokens_committed
        return wasted / (self.tokens_committed / self.chunks) / self.faults if self.chunks and self.faults else 0.0

    def table(self) -> str:
        """Return the report as Markdown."""
        lines = ["| fault | times | recovery p50 | p99 |", "|---|---:|---:|---:|"]
        for name, seconds in sorted(self.recoveries.items()):
            lines.append(f"| {name} | {len(seconds)} | {median(seconds):.1f} s | {_p99(seconds):.1f} s |")
        every = [one for seconds in self.recoveries.values() for one in seconds]
        if every:
            lines.append(f"| all | {len(every)} | {median(every):.1f} s | {_p99(every):.1f} s |")
        lines.append("")
        lines.append(
            f"{self.items:,} items in {self.jobs} jobs; {self.wasted:.1%} of the tokens embedded in vain, "
            f"{self.wasted_chunks:.2f} chunks a fault; "
            f"{len(self.said)} objections."
        )
        if self.poisons:
            told = ", ".join(f'{count} "{poison}"' for poison, count in sorted(self.poisons.items()))
            lines += ["", f"Texts that do harm, each rejected with its code: {told}."]
        return "\n".join(lines)


def _p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100, method="inclusive")[98] if len(seconds) > 1 else seconds[0]


def schedule(seed: int, kinds: tuple[Kind, ...]) -> Iterator[tuple[Kind, Random]]:
    """Yield faults without end, each with a random generator of its own. Each round has all kinds, as often as their
    weights say, in random order."""
    random = Random(seed)
    while True:
        bag = [kind for kind in kinds for _ in range(kind.weight)]
        random.shuffle(bag)
        for kind in bag:
            yield kind, Random(random.random())


def drill(
    site: Site,
    load: Load,
    report: Report,
    kinds: tuple[Kind, ...] = KINDS,
    *,
    goes_on: Callable[[Report], bool],
    tell: Callable[[str], None] = print,
) -> None:
    """Do faults one after the other as long as `goes_on` returns True, then let the work end and check what is left.
    All observations are on the report, whatever ends the drill."""
    try:
        with report.objecting("the start"):
            site.start_all()
            load.begin()
            _do_all(site, load, report, kinds, goes_on, tell)
        with report.objecting("the end of the load"):
            load.finish()
            report.said += _unexplained(site, report.windows)
        with report.objecting("the search for what may be found nowhere"):
            report.said += leaks(site)
        with report.objecting("the end of all processes"):
            report.said += site.fleet.ended_alone()
            site.keep_counts()
            report.tokens_committed = float(site.scalar("select coalesce(sum(prompt_tokens), 0) from vectormill.usage"))
            report.chunks = site.scalar("select count(distinct chunk_id) from vectormill.usage")
            report.said += site.end_all()
            report.tokens_embedded = site.tokens_embedded()
    finally:
        report.said += load.said
        report.poisons = load.poisons
        report.items, report.jobs = load.items_ended, sum(map(len, load.ended.values()))


def _do_all(
    site: Site,
    load: Load,
    report: Report,
    kinds: tuple[Kind, ...],
    goes_on: Callable[[Report], bool],
    tell: Callable[[str], None],
) -> None:
    told, report.begun = 0, time.monotonic()
    for kind, random in schedule(report.seed, tuple(kind for kind in kinds if kind.possible(site))):
        if not goes_on(report):
            break
        time.sleep(random.uniform(*_PAUSE_SECONDS))
        site.keep_counts()
        report.tried += 1
        said = len(report.said)
        try:
            _do(site, load, kind, random, report, tell)
        except Exception as error:  # noqa: BLE001 - the drill goes on, and ends with an objection
            report.said.append(f"{kind.name}: {type(error).__name__}: {error}")
        report.said += [f"{kind.name}: {ended}" for ended in site.fleet.ended_alone()]
        site.start_missing()
        for objection in report.said[said:]:
            tell(f"     {objection}")
        for objection in load.said[told:]:
            tell(f"     {objection}")
            told += 1


def _do(site: Site, load: Load, kind: Kind, random: Random, report: Report, tell: Callable[[str], None]) -> None:
    eventually(partial(concerns, site, kind.of), "a chunk that it concerns", START_SECONDS)
    begun = _now(site)
    load.explain(kind.pauses, inf)
    try:
        done = kind.do(site, random)
        seconds = _await_recovery(kind.back(site, done, _now(site), kind.of)) - done.since
    finally:
        load.explain(kind.pauses)
        site.keep_counts()
        if kind.expires:
            report.windows.append((begun, _now(site)))
    seconds = max(0.0, seconds)
    report.recoveries.setdefault(kind.name, []).append(seconds)
    report.said += [f"{kind.name}: {said}" for said in done.said]
    if seconds > kind.most_seconds:
        report.said.append(f"{kind.name}: back after {seconds:.1f} s, not within {kind.most_seconds:g} s")
    tell(f"{report.faults:4} {kind.name}: back after {seconds:.1f} s")


def _now(site: Site) -> datetime:
    now: datetime = site.scalar("select clock_timestamp()")
    return now


def _await_recovery(back: Back) -> float:
    deadline = time.monotonic() + _RECOVERY_SECONDS
    while (moment := back()) is None:
        if time.monotonic() > deadline:
            raise AssertionError(f"no recovery within {_RECOVERY_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return moment


def _unexplained(site: Site, windows: list[tuple[datetime, datetime]]) -> list[str]:
    """Return an objection for each lease that ran out with no fault near that could cause it. The brittle model is left
    out: its texts can cause that at any time."""
    grace = timedelta(seconds=_LEASES_LATER * site.lease_seconds + ROLE_SECONDS)
    query = """
        select chunk_id, fence, lost_at from vectormill.claim_losses
        where cause = 'lease expired' and model <> :brittle order by lost_at
    """
    return [
        f"a lease ran out without a cause: chunk {row['chunk_id']}, fence {row['fence']}, {row['lost_at']:%X}"
        for row in site.rows(query, brittle=BRITTLE)
        if not any(begun <= row["lost_at"] <= ended + grace for begun, ended in windows)
    ]
