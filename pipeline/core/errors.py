"""The one tree of errors. Each type says whether trying again can help, and how a command ends."""

from typing import ClassVar
from uuid import UUID


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

    def __init__(self, message: str | None = None, *, field: str | None = None, given: str = "") -> None:
        super().__init__(message)
        #: The option that is wrong, as a request's JSON calls it. Each door spells it in its own way.
        self.field = field
        #: The option's value, where the message begins with it.
        self.given = given

    def __str__(self) -> str:
        return self.spelled(self.field)

    def spelled(self, field: str | None) -> str:
        """Return the message after the option's name as `field` spells it."""
        place = f"{field} {self.given}".rstrip() if field else self.given
        return f"{place}: {self.args[0]}" if place else self.args[0]


class SourceError(UserError):
    """A source can't be read. The message names the file, the row and the mend."""


class EmptySource(SourceError):
    """A source has no rows."""


class SourceStopped(SourceError):
    """A query was ended before its last row."""


class SourceChanged(SourceError):
    """A source is no longer what it was when the job was made."""


class StorageRefused(UserError):
    """A storage refuses access, or has no room. The message names the URI; credentials come from the environment."""


class UnknownModel(UserError):
    """The catalogue has no such model for this workspace."""


class UnknownJob(UserError):
    """There is no such job in this workspace."""


class IllegalTransition(UserError):
    """The job's state doesn't allow this."""


class NotRetriable(UserError):
    """What the job was made of is gone. The same corpus may be submitted again."""

    def __init__(self, message: str, job_id: UUID) -> None:
        super().__init__(message)
        self.job_id = job_id


class IdempotencyConflict(UserError):
    """The idempotency key was used before with another payload."""


class ServiceUnreachable(VectormillError):
    """A server that vectormill needs can't be reached. Trying again is safe."""

    retryable = True
    exit_code = 6


class LoginRefused(ServiceUnreachable):
    """A server is there and refuses the login that its URL holds. A person must mend the URL, or the server."""

    exit_code = 2


class StorageUnreachable(ServiceUnreachable):
    """A storage doesn't answer, after its client's own retries."""


class Waiting(VectormillError):
    """Something else must end before this can be done. Nothing is wrong."""

    retryable = True


class WaitTimedOut(VectormillError):
    """The time to wait passed before the job ended; the job goes on."""

    retryable = True
    exit_code = 7


class ModelError(VectormillError):
    """A model can't be used on this machine."""


class ModelUnusable(ModelError):
    """A model can't be loaded here, or its canary comes out wrong: whatever the text is, another machine may do it."""


class BadReply(VectormillError):
    """A gateway's reply can't be used: what is in it isn't what was asked for."""

    retryable = True


class GatewayBusy(VectormillError):
    """A gateway, or the limits of its key, let nothing through for longer than a worker waits."""

    retryable = True

    def __init__(self, message: str, wait_seconds: float) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


class GatewayRefused(VectormillError):
    """A gateway refuses, whatever the text is, until a person has mended what the message says."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        #: Of the pause, one of `jobs.Reason`.
        self.reason = reason


class GatewayChanged(GatewayRefused):
    """A gateway's vectors are another model's by now: what it made lately isn't written."""


class LeaseLost(VectormillError):
    """The chunk isn't as this claim left it: it is another worker's, or the database has lost commits. What was
    computed is discarded."""


class ServerFailed(VectormillError):
    """An embedded server didn't start. The message names its log."""


class ApiError(VectormillError):
    """What the gateway answers instead of vectors, in OpenAI's envelope."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        #: More headers of the answer.
        self.headers: dict[str, str] = {}


class InvalidPayload(ApiError):
    """The body isn't a request for embeddings."""

    status = 400
    code = "invalid_payload"


class ModelsOwnTokens(InvalidPayload):
    """Token ids are the model's own; OpenAI's are read, and read as these they would be another text."""

    def __init__(self, index: int) -> None:
        told = "holds ids of the model's own vocabulary; only cl100k_base tokens are read, so send text"
        super().__init__(f"input[{index}] {told}.", param="input")
        self.index = index


class BadVector(ApiError):
    """The model makes a vector of a text that is zero or not finite."""

    status = 422
    code = "bad_vector"

    def __init__(self, index: int) -> None:
        super().__init__(f"input[{index}]: the model makes a vector of it that is zero or not finite.", param="input")
        self.index = index


class PayloadTooLarge(InvalidPayload):
    """The body is larger than the gateway takes."""

    status = 413


class UnsupportedMediaType(ApiError):
    """The body comes in a way that isn't read."""

    status = 415
    code = "unsupported_media_type"


class Unauthorized(ApiError):
    """The Authorization header is missing, or its scheme isn't Bearer."""

    status = 401
    code = "unauthorized"


class InvalidApiKey(ApiError):
    """The Bearer token isn't a live API key."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ApiError):
    """This needs an admin's key."""

    status = 403
    code = "forbidden"


class NotFound(ApiError):
    """There is nothing of this name."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """The model isn't enabled for this workspace."""

    code = "model_not_found"


class RateLimited(ApiError):
    """The workspace's limit is reached."""

    status = 429
    code = "rate_limited"
    retryable = True


class InternalError(ApiError):
    """The gateway failed; the request may be repeated."""

    retryable = True


class SubmissionUndone(ApiError):
    """The submission that this one attached to came to nothing."""

    status = 503
    code = "submission_undone"
    retryable = True


class Busy(ApiError):
    """The gateway has as much under way as it takes."""

    status = 503
    code = "busy"
    retryable = True


class RequestStalled(ApiError):
    """The rest of a body didn't come."""

    status = 408
    code = "request_stalled"
    retryable = True


class UpstreamUnavailable(ApiError):
    """What embeds for the gateway can't be reached for now."""

    status = 503
    code = "upstream_unavailable"
    retryable = True
