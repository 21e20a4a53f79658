"""States of requests in SQL, of batch requests and of webhook events."""

import enum


class RequestState(enum.StrEnum):
    """State of a request in SQL. `FAILED` carries a reason, and returns to `REQUESTED` when the request is made again.
    `CANCELLED` is final: a person has decided it."""

    REQUESTED = "requested"
    #: The request has become a job.
    SUBMITTED = "submitted"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestReason(enum.StrEnum):
    """Reason why a request in SQL failed before it became a job."""

    EMPTY_SOURCE = "empty_source"
    #: The database refuses the query, or its columns can't be used.
    QUERY_REFUSED = "query_refused"
    #: The query ran past its time limit, or was ended in its database.
    QUERY_STOPPED = "query_stopped"
    SOURCE_UNREACHABLE = "source_unreachable"
    #: An option, the model or the idempotency key doesn't fit.
    REQUEST_REFUSED = "request_refused"


class EventState(enum.StrEnum):
    """State of a webhook event."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class BatchState(enum.StrEnum):
    """State of a batch request, in the words of OpenAI's API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
