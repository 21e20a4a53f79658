"""The one tree of errors. Each type says whether trying again can help, and how a command ends."""

from typing import ClassVar


class VectormillError(Exception):
    """Something went wrong inside vectormill."""

    #: Whether the same call may succeed later without a change by a person.
    retryable: ClassVar[bool] = False
    #: What a command exits with (DESIGN: exit codes).
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class UserError(VectormillError):
    """The request can't be carried out as it was made."""

    exit_code = 2


class SourceError(UserError):
    """A source can't be read. The message names the file, the row and the mend."""


class SourceChanged(SourceError):
    """A source is no longer what it was when the job was made."""


class StorageRefused(UserError):
    """A storage refuses access. The message names the URI; credentials come from the environment."""


class UnknownModel(UserError):
    """The catalogue has no such model for this workspace."""


class UnknownJob(UserError):
    """There is no such job in this workspace."""


class IllegalTransition(UserError):
    """The job's state doesn't allow this."""


class IdempotencyConflict(UserError):
    """The idempotency key was used before with another payload."""


class ServiceUnreachable(VectormillError):
    """A server that vectormill needs can't be reached. Trying again is safe."""

    retryable = True
    exit_code = 6


class StorageUnreachable(ServiceUnreachable):
    """A storage doesn't answer, after its client's own retries."""


class WaitTimedOut(VectormillError):
    """The time given with --timeout passed before the job ended; the job goes on."""

    retryable = True
    exit_code = 7


class ModelError(VectormillError):
    """A model can't be used on this machine."""


class LeaseLost(VectormillError):
    """Another worker owns the chunk, or nobody may: what was computed is discarded."""


class ServerFailed(VectormillError):
    """An embedded server didn't start. The message names its log."""
