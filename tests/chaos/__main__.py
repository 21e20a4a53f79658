"""Long drill: `python -m tests.chaos --seed 1 --minutes 60`. Its leases and chunks are short, so that much happens;
with `--defaults` it runs at default settings, and measures what is promised there. Exits with 1 if there is any
objection.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from random import Random

from tests.chaos.drill import Report, drill
from tests.chaos.kinds import AT_DEFAULTS, KINDS
from tests.chaos.load import LANES, POISONED, Load, Way
from tests.chaos.site import Site, site

_LEASE_SECONDS, _CHUNK_ITEMS, _ITEMS = 5.0, 200, 6_000
_DEFAULT_LEASE_SECONDS, _MANY_ITEMS = 30.0, 20_000
#: Two lanes, so that pending chunks never run out.
_LANES_AT_DEFAULTS = ((Way("minilm", "jsonl"),), (Way("minilm", "jsonl"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kind", action="append", help="only kinds whose name contains this")
    parser.add_argument("--defaults", action="store_true", help="default settings, few kinds, with time limits")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    kinds = tuple(
        kind
        for kind in (AT_DEFAULTS if asked.defaults else KINDS)
        if not asked.kind or any(part in kind.name for part in asked.kind)
    )
    print(f"seed {asked.seed}", flush=True)

    def goes_on(so_far: Report) -> bool:
        return time.monotonic() < so_far.begun + 60 * asked.minutes

    lease_seconds, chunk_items = (_DEFAULT_LEASE_SECONDS, None) if asked.defaults else (_LEASE_SECONDS, _CHUNK_ITEMS)
    items, lanes = (_MANY_ITEMS, _LANES_AT_DEFAULTS) if asked.defaults else (_ITEMS, (*LANES, POISONED))
    with site(lease_seconds=lease_seconds, chunk_items=chunk_items, brittle=not asked.defaults) as made:
        load, report = Load(made, items, lanes, Random(asked.seed)), Report(asked.seed)
        try:
            drill(made, load, report, kinds, goes_on=goes_on, tell=lambda line: print(line, flush=True))
        except BaseException as error:  # including KeyboardInterrupt
            report.said.append(f"broken off: {type(error).__name__}")
            raise
        finally:
            _tell(made, report)
    sys.exit(1 if report.said else 0)


def _tell(made: Site, report: Report) -> None:
    if report.said:
        print("\n".join(f"OBJECTION {said}" for said in report.said), flush=True)
        kept = Path.cwd() / ".vectormill" / f"drill-{report.seed}"
        shutil.rmtree(kept, ignore_errors=True)
        print(f"logs: {shutil.copytree(made.folder / 'logs', kept)}", flush=True)
    print(report.table(), flush=True)


if __name__ == "__main__":
    main()
