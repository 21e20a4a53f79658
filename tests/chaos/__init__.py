"""Drills: real processes at work, faults from a seeded schedule, and an oracle that joins input with output.

wire.py       line to Postgres that knows the protocol: it strikes inside COPY, before COMMIT, after COMMIT
store_line.py line to the object store that strikes in the middle of an upload
trap.py       trap that such a line springs, once
disk.py       small disk that can be filled
successor.py  Postgres that takes another one's place without its last commits
site.py       installation under drill: servers, dispatchers, workers, an upstream, an object store, two small disks
load.py       jobs of all kinds, one after the other, as long as the drill lasts
faults.py     model of a fault, and of the recovery from it
on_workers.py, on_servers.py, on_timelines.py     faults, each with its repair
kinds.py      all kinds of faults, and their frequencies
secrets.py    search for texts and keys where they mustn't be
drill.py      schedule, drill, and table of its results
__main__.py   `python -m tests.chaos --seed 1 --minutes 60`
"""
