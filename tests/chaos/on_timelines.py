"""Faults after which Postgres goes on from an earlier state: what was committed last is forgotten, and workers that
live hold claims of which the database knows nothing."""

import time
from random import Random

from tests.chaos.faults import Done
from tests.chaos.site import Site
from tests.chaos.successor import Successor

_MISSING_SECONDS = 60.0


def fail_over(site: Site, random: Random) -> Done:
    """The primary is lost for good while its standby has had nothing for a second, and the standby is promoted."""
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
    """A base backup is restored, without the log of the minute since, and an operator runs the check."""
    successor = Successor(site.server("postgres"), site.owner_url)
    successor.back_up(site.owner_port)
    time.sleep(_MISSING_SECONDS)
    with site.rewinding():
        successor.lose_primary()
        successor.take_place()
        site.scalar("select 1")
    done, checked = time.monotonic(), site.fleet.cli_process("restore-check", "--mend")
    return Done(done, said=(f"restore-check: {checked.stderr[-300:]}",) if checked.returncode else ())
