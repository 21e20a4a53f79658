"""Drills: real processes at work, faults from a seeded schedule, and an oracle that joins what went in with what came
out.

    wire.py       a line to Postgres that knows the protocol: it strikes inside COPY, before COMMIT, after COMMIT
    trap.py       what strikes there, once
    site.py       what is drilled: servers, dispatchers, workers, a gateway, an object store, two small disks
    load.py       jobs of all kinds, one after the other, as long as the drill lasts
    faults.py     what a fault is, and when what it struck is back
    on_workers.py, on_servers.py     how each is done, and mended
    kinds.py      all of them, and how often each comes
    drill.py      the schedule, the drill, its table
    __main__.py   `python -m tests.chaos --seed 1 --minutes 60`
"""
