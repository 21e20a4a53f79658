"""Control of jobs: cancel, pause, resume, retry, priority; and the outcome of a job."""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from uuid import UUID

from sqlalchemy import Connection

from pipeline.core.chunks import RETRYABLE_REJECTS
from pipeline.core.errors import IllegalTransition, NotRetriable, UserError
from pipeline.core.job_status import Account
from pipeline.core.jobs import Job, JobState, Reason
from pipeline.db import chunks, forgets, jobs, models, rejects, sql_requests, staging, syncs
from pipeline.jobs.status import known_job
from pipeline.webhooks.events import request_ended

_CANCELLED = "cancelled by a person"
#: Message of a whole sync of a source without rows.
EMPTY_SYNC = (
    "the source has no rows; nothing was removed. If the collection shall be empty, drop and create it, or name the "
    "keys to remove in a delta"
)
_UNACCOUNTED = (
    "{:,} items {}: the chunks' counts don't add up to the items submitted, and nobody cancelled the job; retry it, "
    "and see the runbook Restore if the database was restored"
)


def cancel(connection: Connection, job_id: UUID) -> JobState:
    """Cancel a job, or a request made in SQL that isn't a job yet. Committed results stay. Idempotent.

    Raises:
        IllegalTransition: it has ended as completed or failed.
    """
    if jobs.begin_cancelling(connection, job_id, JobState.CANCELLED, Reason.BY_USER, _CANCELLED):
        for other in syncs.beside(connection, job_id):  # the same source for other versions of a collection
            jobs.begin_cancelling(connection, other, JobState.CANCELLED, Reason.BY_USER, _CANCELLED)
        return JobState.CANCELLING
    if _cancel_request(connection, job_id):
        return JobState.CANCELLED
    return _unless(connection, job_id, (JobState.CANCELLING, JobState.CANCELLED), "cancelled")


def _cancel_request(connection: Connection, job_id: UUID) -> bool:
    # Lock order: the dispatcher that turns the request into a job also locks the job's row first.
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
    """Pause a job: no further chunk starts, and running ones finish.

    Raises:
        IllegalTransition: it has ended, or is being cancelled.
    """
    if not jobs.move(connection, job_id, JobState.PAUSED, reason=Reason.BY_USER, message="paused by a person"):
        return _unless(connection, job_id, (JobState.PAUSED,), "paused")
    return JobState.PAUSED


def resume(connection: Connection, job_id: UUID) -> JobState:
    """Resume a paused job. A queued or running one stays as it is.

    Raises:
        IllegalTransition: it isn't paused, queued or running.
    """
    if not jobs.resume(connection, job_id):
        return _unless(connection, job_id, (JobState.QUEUED, JobState.RUNNING), "resumed")
    return JobState.QUEUED


def prioritise(connection: Connection, job_id: UUID, priority: int) -> None:
    """Set a job's priority. From the next chunk on, it goes ahead of jobs with a lower one.

    Raises:
        IllegalTransition: it has ended.
    """
    if not jobs.set_priority(connection, job_id, priority):
        _unless(connection, job_id, (), "given another priority")


def fail(connection: Connection, job_id: UUID, reason: Reason, message: str) -> None:
    """Fail a job that can't succeed; its running chunks finish. A job that has ended or is being cancelled stays so."""
    jobs.begin_cancelling(connection, job_id, JobState.FAILED, reason, message)


def pause_for(connection: Connection, job_id: UUID, reason: Reason, message: str) -> None:
    """Pause a job until a person has fixed the problem in the message, if it is queued or running."""
    jobs.move(connection, job_id, JobState.PAUSED, reason=reason, message=message)


def retry(connection: Connection, job_id: UUID) -> int:
    """Retry an ended job: reopen its chunks with retryable rejects, and a failed job's cancelled chunks too.

    Return the number of reopened chunks. If it is 0, the job stays as it was: no chunk can be retried, or the job
    would fail again because of its other rejects.

    Raises:
        IllegalTransition: the job hasn't ended, or was cancelled.
        NotRetriable: its texts or its model have been removed.
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
    if job.options.sync and job.reason in (Reason.TOO_MANY_REMOVED, Reason.SOURCE_EMPTY):
        way = ", with a higher max_removed if that is right" if job.reason == Reason.TOO_MANY_REMOVED else ""
        message = f"job {job_id} was refused for what its source lacks; sync again{way}."
        raise NotRetriable(message, job_id)
    if job.options.sync and not syncs.is_latest(connection, job_id):
        message = f"another sync of its collection has begun since job {job_id}, or it has been dropped; sync again."
        raise NotRetriable(message, job_id)
    if job.options.by_reference and not job.options.sync and chunks.sums(connection, job_id)["forgotten"]:
        message = f"keys of job {job_id} were forgotten, and its files have them still; submit the files again."
        raise NotRetriable(message, job_id)
    if job.options.output and (forget := forgets.of_workspace(connection, job.workspace_id)):
        # Between the erasure of an item and that of its vector it would count as one without a vector.
        raise IllegalTransition(f"keys are being forgotten (request {forget}); retry job {job_id} when that is done.")
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
    """Return the number of rejects that a job may have, or `None` for any number.

    Args:
        option: `N`, `P%`, or "" for the default: 10 % for a job of 100 items or more, otherwise no limit.

    Raises:
        UserError: `option` is none of these.
    """
    return _limit("max_rejects", option, items_total, 10)


def removal_limit(option: str, keys: int) -> int | None:
    """Return the number of a collection's keys that a whole sync may remove, or `None` for any number. As
    `reject_limit`, but the default is 20 %."""
    return _limit("max_removed", option, keys, 20)


def removal_refused(option: str, keys: int, removed: int) -> tuple[Reason, str] | None:
    """Return why a whole sync that would remove so many keys fails; `None`: it may remove them."""
    limit = removal_limit(option, keys)
    if limit is None or removed <= limit:
        return None
    return Reason.TOO_MANY_REMOVED, (
        f"the source lacks {removed:,} of the collection's {keys:,} keys, and max_removed allows {limit:,} to go; "
        "nothing was embedded or removed. If the source is whole, sync again with a higher max_removed"
    )


def _limit(field: str, option: str, total: int, default_percent: int) -> int | None:
    if not option:
        return total * default_percent // 100 if total >= 100 else None
    try:
        if option.endswith("%"):
            share = Decimal(option[:-1])
            if not 0 <= share <= 100:
                raise ValueError
            return int(total * share / 100)
        if not 0 <= int(option) < 2**63:
            raise ValueError
        return int(option)
    except (ValueError, InvalidOperation):
        raise UserError("give a count such as 50, or a share such as 2.5%.", field=field, given=f'"{option}"') from None


def outcome(job: Job, account: Account) -> tuple[JobState, str | None, str | None]:
    """Return the final (state, reason, message) of a job whose chunks have all ended."""
    counts = account.items
    if job.ends_as:
        return job.ends_as, job.reason, job.message
    if lost := counts.submitted - counts.embedded - counts.reused - counts.unchanged - counts.rejected:
        how = "missing" if lost > 0 else "too many"
        return JobState.FAILED, Reason.ITEMS_UNACCOUNTED, _UNACCOUNTED.format(abs(lost), how)
    names_all = job.options.sync is None or job.options.sync.whole  # a delta may be of one row that became null
    if names_all and counts.submitted and counts.rejected == counts.submitted:
        return JobState.FAILED, Reason.ALL_REJECTED, "every item was rejected; see: vectormill rejects JOB"
    if job.max_rejects is not None and counts.rejected > job.max_rejects:
        return JobState.FAILED, Reason.TOO_MANY_REJECTS, too_many(counts.rejected, job.max_rejects)
    return JobState.COMPLETED, None, None


def too_many(rejected: int, limit: int) -> str:
    """Return the message of a job that has too many rejects."""
    return f"{rejected:,} items rejected, {limit:,} allowed by max_rejects; see: vectormill rejects JOB"
