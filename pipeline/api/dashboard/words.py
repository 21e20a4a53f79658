"""Formatting of numbers and times for people, and advice on reject codes and job reasons. Pure."""

from datetime import UTC, datetime
from decimal import Decimal
from urllib.parse import urlsplit

from markupsafe import Markup

from pipeline.core.chunks import RejectCode
from pipeline.core.humanize import duration
from pipeline.core.job_status import JobStatus
from pipeline.core.jobs import JobState, Reason

_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


def number(value: float) -> str:
    """Format a whole number with thousands separators."""
    return f"{value:,.0f}"


def money(value: Decimal | float | None) -> str:
    """Format an amount in the operator's currency, with the digits that small ones need."""
    if value is None:
        return "–"
    if 0 < value < 0.0001:
        return "< 0.0001"
    whole, _, decimals = f"{value:,.4f}".partition(".")
    return f"{whole}.{decimals[:2]}{decimals[2:].rstrip('0') if value < 1 else ''}"


def percent(part: float, whole: float) -> str:
    """Format a share; 100 % and 0 % only where it is all or nothing."""
    if not whole:
        return "–"
    share = 100 * part / whole
    return f"{min(99, max(1, round(share)))} %" if 0 < share < 100 else f"{share:.0f} %"


def progress(status: JobStatus) -> str:
    """Format a job's progress; for one that ended early, the share of items that have a vector."""
    items = status.items
    if status.state in (JobState.FAILED, JobState.CANCELLED):
        return percent(items.embedded + items.reused + items.unchanged, items.total)
    return percent(items.over, items.total)


def count(value: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: `1 chunk`, `2 chunks`."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def ordinal(value: int) -> str:
    """Format a number as 1st, 2nd, 3rd …"""
    ending = "th" if 10 <= value % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value:,}{ending}"


def rough(seconds: float) -> str:
    """Format an estimate without more digits than it deserves, so that it changes seldom."""
    step = 5 if seconds < 50 else 15 if seconds < 600 else _MINUTE if seconds < _HOUR else 5 * _MINUTE
    return duration(max(step, round(seconds / step) * step))


def age(moment: datetime | None, now: datetime | None = None) -> str:
    """Format the time since a moment in one unit, so that it changes seldom."""
    if moment is None:
        return "–"
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < _MINUTE:
        return "just now"
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds // unit:,.0f} {name} ago"
    raise AssertionError(seconds)


def until(moment: datetime) -> Markup:
    """Format the time until a moment, or since it if it is past, as an element with the exact time."""
    seconds = (moment - datetime.now(UTC)).total_seconds()
    if seconds <= 0:
        return ago(moment)
    told = f"in {duration(seconds).rpartition(' ')[0].rpartition(' ')[0] or duration(seconds)}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment.isoformat(), exact(moment), told)


def exact(moment: datetime) -> str:
    """Format a moment to the second, UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(moment: datetime | None) -> Markup:
    """Format `age` as an element that shows the exact time on hover."""
    if moment is None:
        return Markup("–")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment.isoformat(), exact(moment), age(moment))


def time_left(status: JobStatus, now: datetime | None = None) -> str | None:
    """Estimate the time left of a running job, from its last minute's pace and from its pace since it began.

    The range between the two shows the uncertainty. None: the job isn't running, or nothing is committed to judge by.
    """
    items, pace = status.items, status.rate.items_per_second
    if status.state is not JobState.RUNNING or not status.started_at or not pace or not items.over:
        return None
    elapsed = ((now or datetime.now(UTC)) - status.started_at).total_seconds()
    guesses = sorted((items.pending / pace, items.pending * max(elapsed, 0.1) / items.over))
    least, most = rough(guesses[0]), rough(guesses[1])
    return f"about {least}" if guesses[1] < 1.25 * guesses[0] or least == most else f"{least} to {most}"


def took(status: JobStatus) -> float | None:
    """Return the seconds from a job's first claim to its end; None before the end."""
    if not status.started_at or not status.finished_at:
        return None
    return max(0.0, (status.finished_at - status.started_at).total_seconds())


def page_name(uri: str) -> str:
    """Return the last part of a path or URI."""
    return urlsplit(uri).path.rstrip("/").rpartition("/")[2] or uri


#: Reject code → fault of the item, and advice.
REJECTS: dict[RejectCode, tuple[str, str]] = {
    RejectCode.MISSING_TEXT: (
        "The row has no text.",
        "Fill the column in the source, or leave such rows out, and submit them again.",
    ),
    RejectCode.NOT_A_STRING: (
        "The text is a number, a list or an object.",
        "Write it as a string in the source, and submit the rows again.",
    ),
    RejectCode.EMPTY_TEXT: ("The text is empty or blank.", "Nothing to embed: leave such rows out of the source."),
    RejectCode.INVALID_UTF8: (
        "The text isn't UTF-8.",
        "Find the file's encoding, convert it, and submit the rows again.",
    ),
    RejectCode.NUL_CHARACTER: (
        "The text holds a NUL character, which Postgres can't keep.",
        "Remove \\0 from the source, and submit the rows again.",
    ),
    RejectCode.TOO_LARGE: (
        "The text is larger than the operator allows.",
        "Split it into passages, or ask for a higher VECTORMILL_ITEM_BYTES.",
    ),
    RejectCode.BAD_KEY: ("The key can't be used.", "Give the row a short, printable key, and submit it again."),
    RejectCode.DUPLICATE_KEY: (
        "An earlier row has the same key, and the sync was told to reject such rows.",
        "Make keys unique in the source, or sync with --on-duplicate-key last.",
    ),
    RejectCode.FORGOTTEN: (
        "The key was forgotten, so nothing of the row is kept.",
        "Remove the row from the source, or allow the key again.",
    ),
    RejectCode.BAD_REQUEST: (
        "The line isn't a request for an embedding.",
        "Fix the line that the message names, and upload the file again.",
    ),
    RejectCode.BAD_ROW: ("The row can't be parsed.", "Fix the row that the message names, and submit it again."),
    RejectCode.TOO_LONG: (
        "The text has more tokens than the model reads, and the job was told to reject such texts.",
        "Split it into passages, or submit with --on-long truncate.",
    ),
    RejectCode.BAD_VECTOR: (
        "The model gave a vector with a value that isn't a number.",
        "Retry; if it happens again, the text is one that this model fails on.",
    ),
    RejectCode.ENCODE_FAILED: (
        "The model failed on this text alone.",
        "Read the message, then retry once the worker is fixed.",
    ),
    RejectCode.CRASHED_WORKER: (
        "Twice a worker's process died while it embedded this text.",
        "Look at the worker's log and memory, then retry.",
    ),
    RejectCode.GATEWAY_REFUSED: (
        "The upstream refused this text.",
        "Read the message: often the text is too long for it, or against its rules. Retry after a change there.",
    ),
    RejectCode.GATEWAY_FAILED: ("The upstream failed on this text and on no other.", "Retry later."),
}

#: Reason of a job's state → its name, and advice.
REASONS: dict[Reason, tuple[str, str]] = {
    Reason.BY_USER: ("by a person", ""),
    Reason.WORKERS_FAILING: (
        "workers keep failing",
        "Look at Workers for the reason that each gives, fix it, then resume.",
    ),
    Reason.MODEL_CANNOT_LOAD: (
        "no worker can load the model",
        "Look at Workers for the reason; fix the model's files or its key, then start again.",
    ),
    Reason.SOURCE_CHANGED: ("a source file has changed", "Restore the file as it was and retry, or submit it again."),
    Reason.SOURCE_DAMAGED: ("a source file can't be read", "Fix the file, then submit it again."),
    Reason.STORAGE_REFUSED: (
        "the storage refuses access, or is full",
        "Give workers the credentials, or the disk the room, that the message names, then resume.",
    ),
    Reason.TABLE_REFUSED: ("the target table refuses the vectors", "Fix the table as the message says."),
    Reason.KEY_REFUSED: ("the upstream refuses the key", "Give workers a live key, then resume."),
    Reason.BUDGET_SPENT: ("the upstream's budget is spent", "Top it up or raise its limit, then resume."),
    Reason.GATEWAY_REFUSED: (
        "the upstream refuses the requests",
        "Let the model's address serve that model again, with the same vectors, then resume.",
    ),
    Reason.ALL_REJECTED: ("every item was rejected", "Its rejects say why: usually it is the wrong text column."),
    Reason.TOO_MANY_REJECTS: (
        "too many rejects",
        "Its rejects say why. Retry what may succeed, or submit with a higher --max-rejects.",
    ),
    Reason.ITEMS_UNACCOUNTED: (
        "items are unaccounted for",
        "The database lost commits, or was restored. Retry: what has no vector is embedded.",
    ),
    Reason.SOURCE_EMPTY: (
        "the source has no rows",
        "Nothing was removed. Sync again once it has rows; or drop and create the collection to empty it.",
    ),
    Reason.TOO_MANY_REMOVED: (
        "too many keys would be removed",
        "Nothing was removed. If the source is whole, sync again with a higher --max-removed.",
    ),
}


def reason(code: str | None) -> tuple[str, str]:
    """Return the name of a reason, and advice. One of an older version is named as it stands."""
    return REASONS[Reason(code)] if code in list(Reason) else (code or "", "")


def advice(code: str) -> tuple[str, str]:
    """Return the fault of items with a reject code, and advice."""
    return REJECTS[RejectCode(code)]
