"""States of what is asked for: requests in SQL, batch requests, and events that are told."""

import enum


class RequestState(enum.StrEnum):
    """Where a request in SQL stands. `FAILED` carries a reason; asked for again, it is `REQUESTED` again. `CANCELLED`
    it stays: a person has said so."""

    REQUESTED = "requested"
    #: It is a job by now.
    SUBMITTED = "submitted"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestReason(enum.StrEnum):
    """Why a request in SQL has failed before it was a job."""

    EMPTY_SOURCE = "empty_source"
    #: The database refuses the query, or its columns don't serve.
    QUERY_REFUSED = "query_refused"
    #: The query took longer than it may, or somebody ended it in its database.
    QUERY_STOPPED = "query_stopped"
    SOURCE_UNREACHABLE = "source_unreachable"
    #: An option, the model or the idempotency key doesn't fit.
    REQUEST_REFUSED = "request_refused"


class EventState(enum.StrEnum):
    """Where an event for a webhook stands."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class BatchState(enum.StrEnum):
    """Where a batch request stands, in the words of OpenAI's API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
