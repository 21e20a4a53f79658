"""Faults after which Postgres goes on from an earlier state: the last commits are forgotten, and living workers hold
claims of which the database knows nothing."""

import time
from random import Random

from tests.chaos.faults import Done
from tests.chaos.site import Site
from tests.chaos.successor import Successor

_MISSING_SECONDS = 60.0


def fail_over(site: Site, random: Random) -> Done:
    """Lose the primary for good while its standby is about a second behind, and promote the standby."""
    successor = Successor(site.server("postgres"), site.owner_url)
    with successor.standing_by() as line:
        line.freeze()
        time.sleep(random.uniform(0.5, 1.5))
        with site.rewinding():
            successor.lose_primary()
            line.cut()
            successor.promote()
            successor.take_place()
            site.scalar("select 1")
    return Done(time.monotonic())


def restore(site: Site, _: Random) -> Done:
    """Restore a base backup without the log of the minute since, and run `restore-check --mend` like an operator."""
    successor = Successor(site.server("postgres"), site.owner_url)
    successor.back_up(site.owner_port)
    time.sleep(_MISSING_SECONDS)
    with site.rewinding():
        successor.lose_primary()
        successor.take_place()
        site.scalar("select 1")
    done, checked = time.monotonic(), site.fleet.cli_process("restore-check", "--mend")
    return Done(done, said=(f"restore-check: {checked.stderr[-300:]}",) if checked.returncode else ())
