"""Start-up code of a Python process whose clock is ahead. It replaces `time.sleep`, which fails under libfaketime
0.9.10: `clock_nanosleep` until a monotonic moment ends with EINVAL."""

import select
import time
from typing import Any


def _sleep(seconds: Any) -> None:
    select.select((), (), (), seconds)


time.sleep = _sleep
