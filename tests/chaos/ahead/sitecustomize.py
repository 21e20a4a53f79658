"""What a Python process whose clock is ahead begins with: the library that shows it another time makes its sleep fail
(libfaketime 0.9.10: `clock_nanosleep` until a monotonic moment ends with EINVAL)."""

import select
import time
from typing import Any


def _sleep(seconds: Any) -> None:
    select.select((), (), (), seconds)


time.sleep = _sleep
