"""Exception hierarchy. Each type says if a retry can help, and with which code a command exits.

The docstring of an error class is its default message."""

from typing import ClassVar
from uuid import UUID


class VectormillError(Exception):
    """Something went wrong inside vectormill."""

    #: True if the same call may succeed later without a change by a person.
    retryable: ClassVar[bool] = False
    #: Exit code of a command that ends with this error.
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class UserError(VectormillError):
    """The request can't be carried out as it was made."""

    exit_code = 2

    def __init__(self, message: str | None = None, *, field: str | None = None, given: str = "") -> None:
        super().__init__(message)
        #: Name of the wrong option in a request's JSON. The CLI and the API each spell it in their own way.
        self.field = field
        #: Value of the option, if the message begins with it.
        self.given = given

    def __str__(self) -> str:
        return self.spelled(self.field)

    def spelled(self, field: str | None) -> str:
        """Return the message, prefixed with the option's name as `field` spells it."""
        place = f"{field} {self.given}".rstrip() if field else self.given
        return f"{place}: {self.args[0]}" if place else self.args[0]


class SourceError(UserError):
    """A source can't be read. The message names the file, the row and the fix."""


class EmptySource(SourceError):
    """A source has no rows."""


class SourceStopped(SourceError):
    """A query was ended before its last row."""


class SourceChanged(SourceError):
    """The source has changed since the job was made."""


class StorageRefused(UserError):
    """The storage refuses access or is full. The message names the URI; credentials come from the environment."""


class UnknownModel(UserError):
    """The catalogue has no such model for this workspace."""


class UnknownJob(UserError):
    """There is no such job in this workspace."""


class UnknownCollection(UserError):
    """There is no such collection in this workspace."""


class UnknownForget(UserError):
    """There is no such request to forget keys in this workspace."""


class CollectionBusy(UserError):
    """Another sync of the collection hasn't ended."""

    retryable = True

    def __init__(self, collection: str, job_id: UUID) -> None:
        super().__init__(f"job {job_id} syncs the collection {collection} right now; sync again when it has ended.")
        self.job_id = job_id


class IllegalTransition(UserError):
    """The job's state doesn't allow this."""


class NotRetriable(UserError):
    """The job's texts or its model are gone. The same corpus may be submitted again."""

    def __init__(self, message: str, job_id: UUID) -> None:
        super().__init__(message)
        self.job_id = job_id


class IdempotencyConflict(UserError):
    """The idempotency key was used before with another payload."""


class ServiceUnreachable(VectormillError):
    """A server that vectormill needs can't be reached. Retrying is safe."""

    retryable = True
    exit_code = 6


class LoginRefused(ServiceUnreachable):
    """A server refuses the login in its URL. A person must fix the URL or the server."""

    exit_code = 2


class StorageUnreachable(ServiceUnreachable):
    """The storage doesn't answer, even after its client's own retries."""


class Waiting(VectormillError):
    """Something else must finish before this can be done. Nothing is wrong."""

    retryable = True

    def __init__(self, message: str | None = None, *, most_seconds: float | None = None) -> None:
        super().__init__(message)
        #: Longest delay of the next try; `None`: the usual one.
        self.most_seconds = most_seconds


class WaitTimedOut(VectormillError):
    """The wait timed out before the job ended; the job goes on."""

    retryable = True
    exit_code = 7


class ModelError(VectormillError):
    """A model can't be used on this machine."""


class ModelUnusable(ModelError):
    """The model can't be loaded here, or its canary vector is wrong. No text is at fault; another machine may work."""


class BadReply(VectormillError):
    """An upstream's reply can't be used: its content doesn't match the request."""

    retryable = True


class GatewayBusy(VectormillError):
    """The upstream, or the rate limits of its key, admitted no request for longer than a worker waits."""

    retryable = True

    def __init__(self, message: str, wait_seconds: float) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


class GatewayRefused(VectormillError):
    """The upstream refuses every text until a person has fixed what the message says."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        #: Reason of the pause, one of `jobs.Reason`.
        self.reason = reason


class GatewayChanged(GatewayRefused):
    """The upstream now returns another model's vectors; its latest ones aren't written."""


class LeaseLost(VectormillError):
    """The claim can't go on: another process has taken over, it was cancelled, or the database has lost some of its
    commits. Results since the last commit are discarded."""


class ServerFailed(VectormillError):
    """An embedded server didn't start. The message names its log."""


class ApiError(VectormillError):
    """Error reply of the gateway, in OpenAI's envelope."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        #: Additional headers of the reply.
        self.headers: dict[str, str] = {}

    @property
    def reply_headers(self) -> dict[str, str]:
        """Headers of the reply, with those that tell when to try again."""
        if self.retry_after_seconds is None:
            return self.headers
        seconds, milliseconds = round(self.retry_after_seconds + 0.49), round(self.retry_after_seconds * 1_000)
        return {**self.headers, "retry-after": str(max(1, seconds)), "retry-after-ms": str(max(1, milliseconds))}


class InvalidPayload(ApiError):
    """The request isn't valid."""

    status = 400
    code = "invalid_payload"


class ModelsOwnTokens(InvalidPayload):
    """Token ids are from the model's own vocabulary. Only OpenAI's are read; as those, they would be another text."""

    def __init__(self, index: int) -> None:
        told = "holds ids of the model's own vocabulary; only cl100k_base tokens are read, so send text"
        super().__init__(f"input[{index}] {told}.", param="input")
        self.index = index


class BadVector(ApiError):
    """The model's vector for a text is zero or not finite."""

    status = 422
    code = "bad_vector"

    def __init__(self, index: int) -> None:
        super().__init__(f"input[{index}]: the model makes a vector of it that is zero or not finite.", param="input")
        self.index = index


class PayloadTooLarge(InvalidPayload):
    """The body is larger than the gateway accepts."""

    status = 413


class UnsupportedMediaType(ApiError):
    """The body's compression or charset isn't supported."""

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
    """There is no such resource."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """The model isn't enabled for this workspace."""

    code = "model_not_found"


class RateLimited(ApiError):
    """A limit of the workspace is reached."""

    status = 429
    code = "rate_limited"
    retryable = True


class InternalError(ApiError):
    """The gateway failed; the request may be retried."""

    retryable = True


class SubmissionUndone(ApiError):
    """The submission that this one attached to was undone."""

    status = 503
    code = "submission_undone"
    retryable = True


class Busy(ApiError):
    """The gateway is at capacity."""

    status = 503
    code = "busy"
    retryable = True


class RequestStalled(ApiError):
    """The rest of the request's body didn't arrive."""

    status = 408
    code = "request_stalled"
    retryable = True


class UpstreamUnavailable(ApiError):
    """A service that the gateway depends on can't be reached for now."""

    status = 503
    code = "upstream_unavailable"
    retryable = True
