"""Meter of a command's peak memory, which it prints in bytes.

    python -m tests.benchmarks.peak COMMAND…

A process of its own, which imports next to nothing: the peak that the kernel reports of a child begins with the size
of the process that started it.
"""

import os
import sys

_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def main(command: list[str]) -> int:
    """Run a command without its standard output, print its peak memory, and return its exit code."""
    silence = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=[silence])
    _, status, usage = os.wait4(pid, 0)
    print(usage.ru_maxrss * _UNIT_BYTES)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
