"""Human-readable numbers, sizes and durations, for the terminal and the browser. Pure."""

_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


def short(value: float) -> str:
    """Format a number with three digits at most: `4.3k`, `310k`, `12.4M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.{0 if value >= 99.95 * size else 1}f}{letter}"
    return f"{value:.0f}" if value >= 9.95 or not value else f"{value:.1f}"


def size(count: float) -> str:
    """Format a number of bytes: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 99.5 or unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Format a duration in two units at most: `4 min 40 s`."""
    whole = round(seconds)
    if 0 < seconds < 0.05:
        return "< 0.1 s"
    if whole < _MINUTE:
        return f"{seconds:.1f} s" if seconds < 9.95 and seconds != whole else f"{whole} s"
    if whole < _HOUR:
        return _two(whole // _MINUTE, "min", whole % _MINUTE, "s")
    if whole < _DAY:
        return _two(whole // _HOUR, "h", whole % _HOUR // _MINUTE, "min")
    return _two(whole // _DAY, "d", whole % _DAY // _HOUR, "h")


def about(seconds: float) -> str:
    """Format a duration in one unit: `4 min`."""
    for unit, letter in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit):,} {letter}"
    return f"{seconds:.0f} s"


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large:,} {large_unit} {small} {small_unit}" if small else f"{large:,} {large_unit}"
