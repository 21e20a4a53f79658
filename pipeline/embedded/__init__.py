"""Deployment on one machine with nothing installed: servers from wheels, and the process tree of `vectormill up`.

files, ports, wheels     private files and logs; ports kept across restarts; the folder of a wheel
processes, runtime       processes identified by pid and create time; the record of a running `up`
supervisor               start, restart and ordered shutdown of child processes
place, programs          Postgres' folder and account; the programs that root's homes share
postgres, valkey         the two servers
machine, stages          all of it together; the children that are vectormill's own
deletion                 the deletion of a home's data
"""
