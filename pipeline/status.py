"""Where a job stands, and its receipt: always sums over its chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from pipeline.errors import UnknownJob, UserError
from pipeline.jobs import JobState, RequestState
from pipeline.store import attempts, chunks, jobs, requests, usage
from pipeline.verify import count_missing_and_double

#: Rates are taken over so long a time, or since the job's start.
RATE_WINDOW_SECONDS = 60.0
#: Kept progress that is older is no progress: its dispatcher may be gone.
FRESH_SECONDS = 5.0
_MOST_NAMESAKES, _SHOWN_NAMESAKES = 1_000, 5
_WAITS = "asked for in SQL; the dispatcher makes a job of it"


def find_job(connection: Connection, workspace_id: int | None, name_or_id: str) -> UUID:
    """The job of a workspace, or of any, with this id, a unique beginning of it, or this name (the newest that bears
    it). What was asked for in SQL and is no job yet, or can't be one, has the id that the job would have.

    Raises:
        UnknownJob: there is none.
        UserError: the beginning fits several jobs.
    """
    if "\0" in name_or_id:  # Postgres takes none in a text
        raise UnknownJob("no such job.")
    if named := namesakes(connection, workspace_id, name_or_id, 1):
        return named[0].id
    most = _SHOWN_NAMESAKES + 1
    of_each = (store.ids_beginning(connection, workspace_id, name_or_id.lower(), most) for store in (jobs, requests))
    found = [job_id for ids in of_each for job_id in ids]
    if not found:
        raise UnknownJob(f'no job "{name_or_id}"; vectormill jobs lists them.')
    if len(found) > 1:
        shown = ", ".join(map(str, found[:_SHOWN_NAMESAKES])) + (" …" if len(found) > _SHOWN_NAMESAKES else "")
        raise UserError(f'"{name_or_id}" is the beginning of several jobs\' ids: {shown}; give more of it.')
    return found[0]


@dataclass(frozen=True, slots=True)
class Namesake:
    """One of those that bear a name."""

    id: UUID
    state: str

    @property
    def has_ended(self) -> bool:
        """Return whether nothing more will happen to it by itself."""
        return self.state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


def namesakes(connection: Connection, workspace_id: int | None, name: str, limit: int) -> list[Namesake]:
    """The jobs of this name, and what was asked for in SQL and is none, the newest first."""
    if "\0" in name:  # Postgres takes none in a text
        return []
    found = [
        Namesake(**row) for store in (jobs, requests) for row in store.named(connection, workspace_id, name, limit)
    ]
    return sorted(found, key=lambda each: each.id, reverse=True)[:limit]


def find_job_to_change(connection: Connection, workspace_id: int | None, name_or_id: str, *, ended: bool) -> UUID:
    """The job that is to be changed, as only those that have `ended`, or haven't, can be. Of the jobs of a name it must
    be the only one, or the only one that hasn't ended.

    Raises: as `find_job`, and
        UserError: several bear the name; the message lists them.
    """
    found = find_job(connection, workspace_id, name_or_id)
    fit = [
        each for each in namesakes(connection, workspace_id, name_or_id, _MOST_NAMESAKES) if ended or not each.has_ended
    ]
    if len(fit) > 1:
        raise UserError(f"{several(name_or_id, fit)}; give the id of the one that is meant.")
    return fit[0].id if fit else found


def several(name: str, bearers: Sequence[Namesake]) -> str:
    """The jobs of a name, for the beginning of a sentence."""
    shown = [f"{each.id} ({each.state})" for each in bearers[:_SHOWN_NAMESAKES]]
    if more := len(bearers) - len(shown):
        shown.append(f"{more:,} more")
    return f'{len(bearers):,} jobs are called "{name}": {", ".join(shown)}'


def job_row(connection: Connection, job_id: UUID) -> RowMapping:
    """A job's row.

    Raises:
        UnknownJob: there is none.
    """
    row = jobs.by_id(connection, job_id)
    if row is None:
        if asked := requests.standing(connection, job_id):
            raise UnknownJob(f"{job_id} is no job: it was asked for in SQL, and is {asked['state']}.")
        raise UnknownJob(f"no job {job_id}; vectormill jobs lists them.")
    return row


def job_status(connection: Connection, job_id: UUID) -> dict[str, Any]:
    """All that a job's status shows. Counts are items or tokens, rates are per second.

    Of a job that runs, counts may be the dispatcher's, a second old; where no dispatcher keeps them they are summed.
    What was asked for in SQL is shown as `staging`, `failed` or `cancelled` though it is no job.
    """
    # In this order: the last progress comes with the job's end, so an ended job never shows an earlier one.
    row = jobs.by_id(connection, job_id)
    asked = None
    if row is None or row["state"] in (JobState.STAGING, JobState.FAILED):
        asked = requests.standing(connection, job_id)
    if row is None:
        return _of_request(asked) if asked else sum_up(connection, job_id)
    kept = jobs.fresh_progress(connection, job_id, FRESH_SECONDS)
    found = sum_up(connection, job_id) if kept is None else {**kept, **_of_row(row)}
    return found | (_asked(asked) if asked else {})


def _asked(asked: RowMapping) -> dict[str, Any]:
    """How it stands by its request, where there is one: a failed job may have been asked for again."""
    waits = asked["state"] == RequestState.REQUESTED
    return {
        "state": JobState.STAGING.value if waits else asked["state"],
        "reason": asked["reason"],
        "message": asked["message"] or (_WAITS if waits else None),
        "finished_at": _written(asked["finished_at"]),
    }


def _of_request(asked: RowMapping) -> dict[str, Any]:
    """What `job_status` shows of what is no job."""
    return {
        "id": str(asked["id"]),
        "name": asked["name"],
        **_asked(asked),
        "model": asked["model"],
        "labels": {},
        "output": None,
        "notices": [],
        "items": dict.fromkeys(("total", "embedded", "reused", "rejected", "cancelled", "pending", "truncated"), 0),
        "tokens": {"prompt": 0},
        "rate": {"items_per_second": 0.0, "tokens_per_second": 0.0},
        "eta_seconds": None,
        "chunks": dict.fromkeys(("pending", "running", "done", "cancelled"), 0),
        "created_at": _written(asked["created_at"]),
        "started_at": None,
    }


def _written(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def list_jobs(connection: Connection, workspace_id: int | None, **wanted: Any) -> list[dict[str, Any]]:
    """The statuses of the jobs that `store.jobs.page` finds, each with its workspace's name."""
    found = jobs.page(connection, workspace_id, **wanted)
    return [job_status(connection, row["id"]) | {"workspace": row["workspace"]} for row in found]


def sum_up(connection: Connection, job_id: UUID) -> dict[str, Any]:
    """What `job_status` shows, summed over the job's chunks."""
    row, sums = job_row(connection, job_id), chunks.sums(connection, job_id)
    rates = usage.recent_rates(connection, job_id, RATE_WINDOW_SECONDS)
    ended = JobState(row["state"]).ended
    total = row["items_total"] or sums["items"]
    over = sums["embedded"] + sums["reused"] + sums["rejected"] + sums["cancelled"]
    pending = max(0, total - over)
    pace = rates["items_per_second"]
    return {
        **_of_row(row),
        "items": {
            "total": total,
            **{name: sums[name] for name in ("embedded", "reused", "rejected", "cancelled")},
            "pending": pending,
            "truncated": sums["truncated"],
        },
        "tokens": {"prompt": sums["prompt_tokens"]},
        "rate": {name: round(rate, 1) for name, rate in rates.items()},
        "eta_seconds": None if ended or not pace else round(pending / pace, 1),
        "chunks": {state: sums[f"{state}_chunks"] for state in ("pending", "running", "done", "cancelled")},
    }


def _of_row(row: RowMapping) -> dict[str, Any]:
    return {
        "id": str(row["id"]),
        "name": row["name"],
        "state": row["state"],
        "reason": row["reason"],
        "message": row["message"],
        "model": row["model_name"],
        "labels": row["labels"],
        "output": row["options"].get("output"),
        "notices": row["notices"],
        **{moment: _written(row[moment]) for moment in ("created_at", "started_at", "finished_at")},
    }


def current_receipt(connection: Connection, job_id: UUID) -> dict[str, Any]:
    """The account of a job as its chunks stand now.

    Tokens: `prompt` by those who embedded the items; `billed` by a gateway's replies, those to lost claims too;
    `unanswered`, about, in requests of which no reply tells whether they are billed.
    """
    row, sums = job_row(connection, job_id), chunks.sums(connection, job_id)
    billed = attempts.billed(connection, job_id)
    counted = {name: sums[name] for name in ("embedded", "reused", "rejected", "cancelled")}
    into = row["items_total"] or sums["items"]
    return {
        "items": {"in": into, **counted},
        "tokens": {
            "prompt": sums["prompt_tokens"],
            # What is embedded here costs what it takes.
            "billed": sums["prompt_tokens"] if billed is None else billed.tokens,
            "unanswered": billed.unanswered if billed else 0,
            "reused": sums["reused_tokens"],
        },
        "balanced": into == sum(counted.values()),
    }


def _settled(account: Mapping[str, Any]) -> dict[str, Any]:
    """What can't change after a job's end. A lost claim's request may still be answered, and then it is billed."""
    tokens = {name: count for name, count in account["tokens"].items() if name not in ("billed", "unanswered")}
    return {**account, "tokens": tokens}


def receipt(connection: Connection, job_id: UUID, *, verify: bool = False) -> dict[str, Any]:
    """A job's account, frozen if it has ended; verified row by row if asked.

    `missing` and `double` are those of `pipeline.verify`. It is `verified` when both are 0, it balances, and the
    chunks still say what was frozen. `truncated` counts embedded texts of which only the beginning was read.
    """
    row = job_row(connection, job_id)
    account: dict[str, Any] = row["receipt"] or current_receipt(connection, job_id)
    truncated = chunks.sums(connection, job_id)["truncated"]
    named = {"id": str(job_id), "state": row["state"], **account, "truncated": truncated}
    if not verify:
        return named
    missing, double = count_missing_and_double(connection, row)
    unchanged = _settled(account) == _settled(current_receipt(connection, job_id))
    verified = bool(account["balanced"] and unchanged and not missing and not double)
    return named | {"verified": verified, "missing": missing, "double": double}
