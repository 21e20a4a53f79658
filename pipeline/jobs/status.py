"""Status and receipt of a job, always computed as sums over its chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from pipeline.core.chunks import ChunkState
from pipeline.core.collections import NO_SYNC, SyncCounts
from pipeline.core.errors import UnknownJob, UserError
from pipeline.core.job_status import (
    Account,
    AccountedItems,
    AccountedTokens,
    ChunkCounts,
    EmbeddedOn,
    ItemCounts,
    JobStatus,
    Rate,
    Receipt,
    TokenCounts,
    TruncatedItem,
)
from pipeline.core.jobs import Job, JobState
from pipeline.core.requests import RequestState
from pipeline.db import attempts, chunks, jobs, sql_requests, syncs, usage

#: Time window of rates, which is shorter right after a job's start.
RATE_WINDOW_SECONDS = 60.0
#: Maximum age of stored progress; if it is older, its dispatcher may be gone.
FRESH_SECONDS = 5.0
_MOST_NAMESAKES, _SHOWN_NAMESAKES = 1_000, 5
_WAITS = "requested in SQL; the dispatcher will turn it into a job"


def find_job(connection: Connection, workspace_id: int | None, name_or_id: str) -> UUID:
    """Return the id of a workspace's job, or of any workspace's, by its name, id or a unique prefix of the id.

    If several jobs have the name, the newest is meant. A request made in SQL that isn't a job yet, or can't become
    one, has the id that the job would have.

    Raises:
        UnknownJob: there is no such job.
        UserError: several jobs have this prefix.
    """
    if "\0" in name_or_id:  # Postgres accepts no NUL in a text
        raise UnknownJob("no such job.")
    if named := namesakes(connection, workspace_id, name_or_id, 1):
        return named[0].id
    found = sql_requests.ids_beginning(connection, workspace_id, name_or_id.lower(), _SHOWN_NAMESAKES + 1)
    if not found:
        raise UnknownJob(f'no job "{name_or_id}"; vectormill jobs lists them.')
    if len(found) > 1:
        shown = ", ".join(map(str, found[:_SHOWN_NAMESAKES])) + (" …" if len(found) > _SHOWN_NAMESAKES else "")
        raise UserError(f'"{name_or_id}" is a prefix of several job ids: {shown}; give a longer one.')
    return found[0]


@dataclass(frozen=True, slots=True)
class Namesake:
    """A job, or a request made in SQL, that has a given name."""

    id: UUID
    state: str

    @property
    def has_ended(self) -> bool:
        """True if it is completed, failed or cancelled."""
        return self.state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


def namesakes(connection: Connection, workspace_id: int | None, name: str, limit: int) -> list[Namesake]:
    """Return the jobs with this name, and requests made in SQL that aren't jobs, the newest first."""
    if "\0" in name:  # Postgres accepts no NUL in a text
        return []
    return [Namesake(**row) for row in sql_requests.named_with_jobs(connection, workspace_id, name, limit)]


def find_job_to_change(connection: Connection, workspace_id: int | None, name_or_id: str, *, ended: bool) -> UUID:
    """Return the id of a job that a command is to change, by its name, id or a unique prefix of the id.

    A name must be unambiguous: among all jobs with the name if the command is for jobs that have `ended`, otherwise
    among those that haven't ended.

    Raises: as `find_job`, and
        UserError: several jobs have the name; the message lists them.
    """
    found = find_job(connection, workspace_id, name_or_id)
    fit = [
        each for each in namesakes(connection, workspace_id, name_or_id, _MOST_NAMESAKES) if ended or not each.has_ended
    ]
    if len(fit) > 1:
        raise UserError(f"{several(name_or_id, fit)}; give the id of the one that is meant.")
    return fit[0].id if fit else found


def several(name: str, bearers: Sequence[Namesake]) -> str:
    """Return a clause that lists the jobs with a name, for the beginning of a sentence."""
    shown = [f"{each.id} ({each.state})" for each in bearers[:_SHOWN_NAMESAKES]]
    if more := len(bearers) - len(shown):
        shown.append(f"{more:,} more")
    return f'{len(bearers):,} jobs are called "{name}": {", ".join(shown)}'


def known_job(connection: Connection, job_id: UUID) -> Job:
    """Return the job with this id.

    Raises:
        UnknownJob: there is none.
    """
    job = jobs.by_id(connection, job_id)
    if job is None:
        if asked := sql_requests.status(connection, job_id):
            raise UnknownJob(f"{job_id} isn't a job: it is a request made in SQL, and its state is {asked['state']}.")
        raise UnknownJob(f"no job {job_id}; vectormill jobs lists them.")
    return job


def job_status(connection: Connection, job_id: UUID) -> JobStatus:
    """Return a job's status.

    The counts of a running job may be the dispatcher's, a second old; without fresh ones, they are summed up now.
    A request made in SQL that isn't a job is shown as `staging`, `failed` or `cancelled`.
    """
    # The job is read before its progress: the last progress comes with the job's end, so an ended job never shows an
    # earlier one.
    job = jobs.by_id(connection, job_id)
    asked = None
    if job is None or job.state in (JobState.STAGING, JobState.FAILED):
        asked = sql_requests.status(connection, job_id)
    if job is None:
        return _of_request(asked) if asked else sum_up(connection, job_id)
    kept = jobs.fresh_progress(connection, job_id, FRESH_SECONDS)
    try:
        found = sum_up(connection, job_id) if kept is None else JobStatus(**{**kept, **_of_job(job)})
    except UnknownJob:  # its submission was undone just now
        return job_status(connection, job_id)
    return found.model_copy(update=_asked(asked)) if asked else found


def _asked(asked: RowMapping) -> dict[str, Any]:
    """Return the status fields of a request made in SQL. They apply to a failed job that was requested again too."""
    waits = asked["state"] == RequestState.REQUESTED
    return {
        "state": JobState.STAGING if waits else JobState(asked["state"]),
        "reason": asked["reason"],
        "message": asked["message"] or (_WAITS if waits else None),
        "finished_at": asked["finished_at"],
    }


def _of_request(asked: RowMapping) -> JobStatus:
    """Return the status of a request made in SQL that isn't a job."""
    return JobStatus(
        id=asked["id"],
        name=asked["name"],
        **_asked(asked),
        model=asked["model"],
        labels={},
        output=None,
        notices=[],
        items=ItemCounts(),
        tokens=TokenCounts(),
        rate=Rate(),
        eta_seconds=None,
        chunks=ChunkCounts(),
        created_at=asked["created_at"],
        started_at=None,
    )


def list_jobs(connection: Connection, workspace_id: int | None, **wanted: Any) -> list[JobStatus]:
    """Return the statuses of the jobs that `db.jobs.page` finds, each with its workspace's name."""
    found = jobs.page(connection, workspace_id, **wanted)
    return [job_status(connection, row["id"]).model_copy(update={"workspace": row["workspace"]}) for row in found]


def sum_up(connection: Connection, job_id: UUID) -> JobStatus:
    """Return a job's status, summed over its chunks."""
    job, sums = known_job(connection, job_id), chunks.sums(connection, job_id)
    rates = usage.recent_rates(connection, job_id, RATE_WINDOW_SECONDS)
    sync = sync_counts(connection, job)
    total = _total(job, sums, sync)
    over = sync.unchanged + sums["embedded"] + sums["reused"] + sums["rejected"] + sums["cancelled"]
    pending = max(0, total - over)
    pace = rates.items_per_second
    counted = {name: sums[name] for name in ("embedded", "reused", "rejected", "cancelled", "truncated")}
    return JobStatus(
        **_of_job(job),
        items=ItemCounts(total=total, pending=pending, unchanged=sync.unchanged, removed=sync.removed, **counted),
        passages=sums["passages"] if job.options.splits else None,
        lost_tokens=sums["lost_tokens"],
        most_truncated=_most_truncated(connection, job_id, sums),
        tokens=TokenCounts(prompt=sums["prompt_tokens"]),
        rate=Rate(
            items_per_second=round(rates.items_per_second, 1),
            tokens_per_second=round(rates.tokens_per_second, 1),
            roofline=None if rates.roofline is None else round(rates.roofline, 3),
        ),
        eta_seconds=None if job.state.ended or not pace else round(pending / pace, 1),
        chunks=ChunkCounts(**{state: sums[f"{state}_chunks"] for state in ChunkState}),
    )


def sync_counts(connection: Connection, job: Job) -> SyncCounts:
    """Return the counts of a sync's rows; all 0 if the job is none."""
    return syncs.counts(connection, job.id) if job.options.sync else NO_SYNC


def _total(job: Job, sums: RowMapping, sync: SyncCounts) -> int:
    """Return the number of a job's items, and for a sync of its unchanged rows."""
    return int(job.items_total or sums["items"]) - int(sums["vacant"]) + sync.unchanged


def _most_truncated(connection: Connection, job_id: UUID, sums: RowMapping) -> list[TruncatedItem]:
    return chunks.most_truncated(connection, job_id) if sums["lost_tokens"] else []


def _of_job(job: Job) -> dict[str, Any]:
    same = ("id", "name", "state", "reason", "message", "model", "created_at", "started_at", "finished_at")
    return {
        **{name: getattr(job, name) for name in same},
        "labels": dict(job.labels),
        "output": job.options.output,
        "notices": list(job.notices),
    }


def current_account(connection: Connection, job_id: UUID) -> Account:
    """Return a job's account from the current state of its chunks."""
    job, sums = known_job(connection, job_id), chunks.sums(connection, job_id)
    billed = attempts.billed(connection, job_id)
    sync = sync_counts(connection, job)
    counted = {name: sums[name] for name in ("embedded", "reused", "rejected", "cancelled")}
    counted |= {"unchanged": sync.unchanged, "removed": sync.removed, "forgotten": sums["forgotten"]}
    items = AccountedItems(**{"in": _total(job, sums, sync), **counted})
    tokens = AccountedTokens(
        prompt=sums["prompt_tokens"],
        # Without an upstream, a job is billed for the tokens that it embeds.
        billed=sums["prompt_tokens"] if billed is None else billed.tokens,
        unanswered=billed.unanswered if billed else 0,
        reused=sums["reused_tokens"],
        saved=sums["reused_tokens"] + sync.tokens_saved,
    )
    return Account(items=items, tokens=tokens, balanced=items.submitted == items.settled)


def receipt(connection: Connection, job_id: UUID) -> Receipt:
    """Return a job's receipt, which is frozen when the job ends.

    `truncated` counts embedded texts of which the model read only the beginning. That, the devices, and what was
    forgotten since, are read anew.
    """
    job = known_job(connection, job_id)
    account = Account.model_validate(job.receipt) if job.receipt else current_account(connection, job_id)
    sums = chunks.sums(connection, job_id)
    account.items.forgotten = sums["forgotten"]
    devices = [EmbeddedOn(**row) for row in usage.devices_of_job(connection, job_id)]
    return Receipt(
        id=job_id,
        state=job.state,
        passages=sums["passages"] if job.options.splits else None,
        truncated=sums["truncated"],
        lost_tokens=sums["lost_tokens"],
        most_truncated=_most_truncated(connection, job_id, sums),
        embedded_on=devices,
        **dict(account),
    )
