"""One machine with nothing installed: servers from wheels, and the process tree of `vectormill up`.

files, ports, wheels     private files and logs; ports that stay; where a wheel's files are
processes, runtime       processes found again by pid and create time; the record of what runs
supervisor               starts children, restarts what dies, stops all in reverse order
place, programs          where Postgres may live, and the programs that root's homes share
postgres, valkey         the two servers
machine, stages          all of it together; the children that are vectormill's own
deletion                 the deletion of a home's data
"""
