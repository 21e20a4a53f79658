"""Errors of the client, by the names that the pipeline's own have."""

from typing import ClassVar

from .records import JobStatus


class VectormillError(Exception):
    """Something went wrong inside vectormill."""

    #: True if the same call may succeed later without a change by a person.
    retryable: ClassVar[bool] = False


class UserError(VectormillError):
    """The request can't be carried out as it was made; the message says what to do."""

    def __init__(self, message: str, *, field: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        #: Name of the wrong argument, as the api calls it.
        self.field = field
        #: HTTP status of the api's answer; `None`: nothing was sent.
        self.status = status


class KeyRefused(UserError):
    """The key is unknown, expired or revoked, or may not do this."""


class NotFound(UserError):
    """There is no such job, collection or model in the key's workspace."""


class CollectionBusy(UserError):
    """Another sync of the collection hasn't ended."""

    retryable = True


class ServiceUnreachable(VectormillError):
    """The api can't be reached, or a server behind it, or it has too much to do. Trying again is safe."""

    retryable = True


class JobNotCompleted(VectormillError):
    """A job that was waited for has failed, was cancelled, or was paused by the system."""

    def __init__(self, status: JobStatus) -> None:
        why = status.message or status.reason or "no reason is given"
        super().__init__(f"job {status.id} ({status.name}) is {status.state}: {why}")
        self.job = status


class WaitTimedOut(VectormillError, TimeoutError):
    """The time to wait is over; the job goes on."""

    retryable = True
