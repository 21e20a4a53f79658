"""`python -m tests.acceptance.faults --seed 1 --minutes 60`: a long drill. Ends with 1 if there is any objection."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from tests.acceptance.faults.drill import Report, drill
from tests.acceptance.faults.faults import KINDS
from tests.acceptance.faults.load import Load
from tests.acceptance.faults.site import site

_LEASE_SECONDS = 5.0
_CHUNK_ITEMS = 200
_ITEMS = 3_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kind", action="append", help="only kinds whose name contains this")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    kinds = tuple(kind for kind in KINDS if not asked.kind or any(part in kind.name for part in asked.kind))
    print(f"seed {asked.seed}", flush=True)
    ends = time.monotonic() + 60 * asked.minutes

    def goes_on(_: Report) -> bool:
        return time.monotonic() < ends

    with site(lease_seconds=_LEASE_SECONDS, chunk_items=_CHUNK_ITEMS) as made:
        load = Load(made, _ITEMS)
        report = drill(made, load, asked.seed, kinds, goes_on=goes_on, tell=lambda line: print(line, flush=True))
        if report.said:
            print("\n".join(f"OBJECTION {said}" for said in report.said), flush=True)
            kept = shutil.copytree(made.folder / "logs", Path.cwd() / ".vectormill" / f"drill-{asked.seed}")
            print(f"logs: {kept}", flush=True)
        print(report.table())
    sys.exit(1 if report.said else 0)


if __name__ == "__main__":
    main()
