"""Control of jobs by people: cancel, pause, resume, retry; and how a job ends."""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from uuid import UUID

from sqlalchemy import Connection

from pipeline.core.chunks import RETRYABLE_REJECTS
from pipeline.core.errors import IllegalTransition, NotRetriable, UserError
from pipeline.core.job_status import Account
from pipeline.core.jobs import Job, JobState, Reason
from pipeline.db import chunks, jobs, models, rejects, sql_requests, staging
from pipeline.jobs.status import known_job
from pipeline.webhooks.events import request_ended

_CANCELLED = "cancelled by a person"
_UNACCOUNTED = (
    "{:,} items {}: the chunks' counts don't add up to the items submitted, and nobody cancelled the job; retry it, "
    "and see the runbook Restore if the database was restored"
)


def cancel(connection: Connection, job_id: UUID) -> JobState:
    """Ask a job to stop. What is committed stays. Cancelling a cancelled job changes nothing. What was asked for in SQL
    may be cancelled before it is a job.

    Raises:
        IllegalTransition: it has ended otherwise.
    """
    if jobs.begin_cancelling(connection, job_id, JobState.CANCELLED, Reason.BY_USER, _CANCELLED):
        return JobState.CANCELLING
    if _cancel_request(connection, job_id):
        return JobState.CANCELLED
    return _unless(connection, job_id, (JobState.CANCELLING, JobState.CANCELLED), "cancelled")


def _cancel_request(connection: Connection, job_id: UUID) -> bool:
    # In this order: who makes a job of the request holds the job's row first too.
    job = jobs.lock(connection, job_id)
    if job and job.state not in (JobState.STAGING, JobState.FAILED):
        return False
    request = sql_requests.cancel(connection, job_id, Reason.BY_USER, _CANCELLED)
    if request is None:
        return False
    staging.cancel(connection, job_id)
    request_ended(connection, request, JobState.CANCELLED, Reason.BY_USER, _CANCELLED)
    return True


def pause(connection: Connection, job_id: UUID) -> JobState:
    """Let no further chunk of a job start; running ones end.

    Raises:
        IllegalTransition: it has ended, or is being cancelled.
    """
    if not jobs.move(connection, job_id, JobState.PAUSED, reason=Reason.BY_USER, message="paused by a person"):
        return _unless(connection, job_id, (JobState.PAUSED,), "paused")
    return JobState.PAUSED


def resume(connection: Connection, job_id: UUID) -> JobState:
    """Let a paused job go on.

    Raises:
        IllegalTransition: it isn't paused, queued or running.
    """
    if not jobs.resume(connection, job_id):
        return _unless(connection, job_id, (JobState.QUEUED, JobState.RUNNING), "resumed")
    return JobState.QUEUED


def prioritise(connection: Connection, job_id: UUID, priority: int) -> None:
    """Let a job go before those of lower priority, from the next chunk on.

    Raises:
        IllegalTransition: it has ended.
    """
    if not jobs.set_priority(connection, job_id, priority):
        _unless(connection, job_id, (), "given another priority")


def fail(connection: Connection, job_id: UUID, reason: Reason, message: str) -> None:
    """Stop a job that can't succeed; its running chunks end. One that has ended or is being stopped stays as it is."""
    jobs.begin_cancelling(connection, job_id, JobState.FAILED, reason, message)


def pause_for(connection: Connection, job_id: UUID, reason: Reason, message: str) -> None:
    """Pause a running job until a person has mended what the message says; one that isn't running stays as it is."""
    jobs.move(connection, job_id, JobState.PAUSED, reason=reason, message=message)


def retry(connection: Connection, job_id: UUID) -> int:
    """Reopen an ended job's chunks that hold rejects which may be tried again, and, of a failed one, those that were
    cancelled. Returns how many chunks that is; 0 leaves the job as it was, also if it must fail again for its rejects.

    Raises:
        IllegalTransition: the job hasn't ended, or was cancelled.
        NotRetriable: its texts have been removed, or its model has.
    """
    job = jobs.lock(connection, job_id)
    if job is None or job.state not in (JobState.COMPLETED, JobState.FAILED):
        _unless(connection, job_id, (), "retried")
    assert job is not None
    if job.max_rejects is not None and _lasting_rejects(connection, job_id) > job.max_rejects:
        return 0
    if job.texts_removed_at:
        raise NotRetriable(
            f"job {job_id} ended too long ago: its texts were removed on "
            f"{job.texts_removed_at:%Y-%m-%d}; submit it again.",
            job_id,
        )
    if models.of_job(connection, job_id) is None:
        message = f"the model of job {job_id} is no longer in the catalogue as it was; submit it again."
        raise NotRetriable(message, job_id)
    reopened = chunks.reopen(connection, job_id, sorted(RETRYABLE_REJECTS))
    if reopened:
        jobs.requeue(connection, job_id)
    return reopened


def _lasting_rejects(connection: Connection, job_id: UUID) -> int:
    counts = rejects.count_by_code(connection, job_id)
    return sum(count for code, count in counts.items() if code not in RETRYABLE_REJECTS)


def _unless(connection: Connection, job_id: UUID, states: Sequence[JobState], done: str) -> JobState:
    state = known_job(connection, job_id).state
    if state not in states:
        raise IllegalTransition(f"job {job_id} is {state} and can't be {done}.")
    return state


def reject_limit(option: str, items_total: int) -> int | None:
    """How many rejects a job of `items_total` items may have: `N`, `P%`, or "" for the default, 10 % from 100 items on.

    Raises:
        UserError: `option` is neither.
    """
    if not option:
        return items_total // 10 if items_total >= 100 else None
    try:
        if option.endswith("%"):
            share = Decimal(option[:-1])
            if not 0 <= share <= 100:
                raise ValueError
            return int(items_total * share / 100)
        if not 0 <= int(option) < 2**63:
            raise ValueError
        return int(option)
    except (ValueError, InvalidOperation):
        raise UserError(
            "give a count such as 50, or a share such as 2.5%.", field="max_rejects", given=f'"{option}"'
        ) from None


def outcome(job: Job, account: Account) -> tuple[JobState, str | None, str | None]:
    """What a job becomes whose chunks have all ended: (state, reason, message)."""
    counts = account.items
    if job.ends_as:
        return job.ends_as, job.reason, job.message
    if lost := counts.submitted - counts.embedded - counts.reused - counts.rejected:
        how = "missing" if lost > 0 else "too many"
        return JobState.FAILED, Reason.ITEMS_UNACCOUNTED, _UNACCOUNTED.format(abs(lost), how)
    if counts.submitted and counts.rejected == counts.submitted:
        return JobState.FAILED, Reason.ALL_REJECTED, "every item was rejected; vectormill rejects says why"
    if job.max_rejects is not None and counts.rejected > job.max_rejects:
        return JobState.FAILED, Reason.TOO_MANY_REJECTS, too_many(counts.rejected, job.max_rejects)
    return JobState.COMPLETED, None, None


def too_many(rejected: int, limit: int) -> str:
    """The sentence for a job with too many rejects."""
    return f"{rejected:,} items rejected, {limit:,} allowed by max_rejects; vectormill rejects says why"
