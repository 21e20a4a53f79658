"""Every metric of every process, in one list: its name, its unit, what it means, and the values of its labels.

A process shows its own, `vectormill_worker_…` and so on, and no other's. Labels have few values: models, queues and
devices are the operator's, the rest are ours. None is a text, a key, a job or a workspace. Nothing is counted item by
item: a batch, a commit or a request is the least that counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics

from pipeline.core.chunks import RejectCode
from pipeline.core.jobs import JobState, Reason

#: Whose values a label has, where they aren't ours.
MODEL = "a model's name in the catalogue"
QUEUE = "a model's queue"
DEVICE = "a device of the machine"
ROUTE = "a route's template; `unknown`: there is no such route"
STATUS = "a status of HTTP; `none`: the client left before"

Series = TypeVar("Series", Counter, Summary, Histogram)

disable_created_metrics()


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One of the list."""

    process: str
    #: Of a histogram and a summary: without `_bucket`, `_sum` and `_count`.
    name: str
    kind: str
    unit: str
    meaning: str
    #: The values of each label, or whose they are.
    labels: Mapping[str, Sequence[str] | str]


#: The list, in the order of this file.
EVERY: list[Metric] = []


class Process:
    """The metrics of one kind of process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = CollectorRegistry()

    def counter(self, name: str, unit: str, meaning: str, **labels: Iterable[str] | str) -> Counter:
        """What only grows."""
        noted = self._note(f"{name}_total", "counter", unit, meaning, labels)
        return _born(Counter(noted.name, meaning, list(labels), registry=self.registry), noted)

    def gauge(self, name: str, unit: str, meaning: str, **labels: Iterable[str] | str) -> Gauge:
        """What there is now; of a worker, in its living processes together."""
        noted = self._note(name, "gauge", unit, meaning, labels)
        return Gauge(noted.name, meaning, list(labels), registry=self.registry, multiprocess_mode="livesum")

    def seconds(self, name: str, meaning: str, **labels: Iterable[str] | str) -> Summary:
        """How often, and for how long together."""
        noted = self._note(f"{name}_seconds", "summary", "seconds", meaning, labels)
        return _born(Summary(noted.name, meaning, list(labels), registry=self.registry), noted)

    def histogram(self, name: str, bounds: Sequence[float], meaning: str, **labels: Iterable[str] | str) -> Histogram:
        """How often it took up to so many seconds."""
        noted = self._note(f"{name}_seconds", "histogram", "seconds", meaning, labels)
        return _born(Histogram(noted.name, meaning, list(labels), registry=self.registry, buckets=bounds), noted)

    def _note(self, name: str, kind: str, unit: str, meaning: str, labels: Mapping[str, Iterable[str] | str]) -> Metric:
        values = {label: given if isinstance(given, str) else tuple(given) for label, given in labels.items()}
        whole = f"vectormill_{self.name}_{name}"
        EVERY.append(Metric(process=self.name, name=whole, kind=kind, unit=unit, meaning=meaning, labels=values))
        return EVERY[-1]


def _born(series: Series, noted: Metric) -> Series:
    """With a series for each value that its labels may have, where all are ours: the first time counts then too."""
    values = [given for given in noted.labels.values() if not isinstance(given, str)]
    if values and len(values) == len(noted.labels):
        for each in product(*values):
            series.labels(*each)
    return series


#: What comes of a claim, and of an item that a worker commits.
CLAIM_OUTCOMES = ("done", "missed", "held", "busy", "refused", "lost", "unusable", "given_back", "away", "crashed")
ITEM_OUTCOMES = ("embedded", "rejected")

#: A worker: its parent and its children together.
WORKER = Process("worker")

WORKER_CLAIMS = WORKER.counter(
    "claims",
    "claims",
    "Messages taken, by what came of them. done: all was done that could be. missed: the chunk was another's, or over. "
    "held, busy, refused: its gateway lets nothing through for now, let nothing more through, needs a person. "
    "lost: another claim has the chunk. unusable: the model can't be used here. given_back: for another reason. "
    "away: the database. crashed: the child ended itself",
    model=MODEL,
    outcome=CLAIM_OUTCOMES,
)
WORKER_CHUNK_SECONDS = WORKER.histogram(
    "chunk", (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320), "From a claim to its end", model=MODEL
)
WORKER_ITEMS = WORKER.counter(
    "items", "items", "Items committed, by what has become of them", model=MODEL, outcome=ITEM_OUTCOMES
)
WORKER_REJECTS = WORKER.counter(
    "rejects", "items", "Items that it rejected, by code; a submission's own are the dispatcher's", code=RejectCode
)
WORKER_BATCHES = WORKER.counter("batches", "batches", "Forward passes, or answers of a gateway", model=MODEL)
WORKER_TOKENS = WORKER.counter("tokens", "tokens", "Tokens of the texts in batches", model=MODEL)
WORKER_PADDED_TOKENS = WORKER.counter(
    "padded_tokens",
    "tokens",
    "Those tokens, and what shorter texts of a batch are filled up with. A gateway's are its own affair",
    model=MODEL,
)
WORKER_STEP_SECONDS = WORKER.seconds(
    "step", "Time of slots, by step of a chunk", model=MODEL, step=("read", "tokenise", "embed", "write")
)
WORKER_LEASES_LOST = WORKER.counter(
    "leases_lost",
    "leases",
    "Leases that ended before the claim. overtaken: another claim had the chunk. child_died: the process did. "
    "time_limit: it was ended for taking too long",
    cause=("overtaken", "child_died", "time_limit"),
)
WORKER_THROTTLE_WAIT_SECONDS = WORKER.counter(
    "throttle_wait_seconds", "seconds", "Time that requests waited for a gateway's limits", model=MODEL
)
WORKER_GATEWAY_REQUESTS = WORKER.counter(
    "gateway_requests",
    "requests",
    "Requests to a gateway, by the class of the answer's status. none: no answer came",
    model=MODEL,
    status=("2xx", "3xx", "4xx", "429", "5xx", "none"),
)
WORKER_GATEWAY_SECONDS = WORKER.seconds("gateway_request", "Time until a gateway's answer", model=MODEL)
WORKER_DEVICE_MEMORY_BYTES = WORKER.gauge(
    "device_memory_bytes", "bytes", "Memory that children hold: the GPU's, or on a CPU their own", device=DEVICE
)

#: A dispatcher. How things stand is shown by the one that leads.
DISPATCHER = Process("dispatcher")

DISPATCHER_LEADS = DISPATCHER.gauge("leads", "1 or 0", "Whether it works; else it stands by")
DISPATCHER_JOBS = DISPATCHER.gauge("jobs", "jobs", "Jobs that haven't ended", state=JobState)
DISPATCHER_JOBS_PAUSED = DISPATCHER.gauge("jobs_paused", "jobs", "Paused jobs, by reason", reason=Reason)
DISPATCHER_JOBS_ENDED = DISPATCHER.counter(
    "jobs_ended",
    "jobs",
    "Jobs that ended, by how; and requests in SQL that failed before",
    state=[state for state in JobState if state.ended],
)
DISPATCHER_ITEMS = DISPATCHER.counter(
    "items",
    "items",
    "Items of jobs that ended, as their receipts have them; of a job that is retried at each of its ends",
    outcome=("embedded", "reused", "rejected", "cancelled"),
)
DISPATCHER_REJECTS = DISPATCHER.counter(
    "rejects", "items", "Rejects of jobs that ended, by code: workers' and those of the submission", code=RejectCode
)
DISPATCHER_CHUNKS = DISPATCHER.gauge(
    "chunks", "chunks", "Open chunks of queued and running jobs", model=MODEL, state=("pending", "running")
)
DISPATCHER_QUEUE_MESSAGES = DISPATCHER.gauge(
    "queue_messages", "messages", "Messages that wait in Redis; a few are enough", queue=QUEUE
)
DISPATCHER_SLOTS = DISPATCHER.gauge("slots", "slots", "Slots of living workers that serve the model", model=MODEL)
DISPATCHER_WORKERS = DISPATCHER.gauge(
    "workers", "workers", "Workers seen lately. resting: they lost chunk after chunk", state=("serving", "resting")
)
DISPATCHER_MESSAGES_PUBLISHED = DISPATCHER.counter("messages_published", "messages", "Messages sent", queue=QUEUE)
DISPATCHER_LEASES_EXPIRED = DISPATCHER.counter("leases_expired", "leases", "Leases that ran out: a worker is gone")
DISPATCHER_BACKENDS_ENDED = DISPATCHER.counter(
    "backends_ended", "backends", "Postgres backends ended that had frozen while they held a chunk"
)
DISPATCHER_DUTY_SECONDS = DISPATCHER.seconds(
    "duty", "Time of duties, by their names in pipeline/dispatch/dispatcher.py", duty="a duty's name"
)
DISPATCHER_FAILURES = DISPATCHER.counter(
    "failures", "duties", "Duties that failed, by what failed", cause=("redis", "database", "other")
)
DISPATCHER_WEBHOOK_TRIES = DISPATCHER.counter(
    "webhook_tries",
    "tries",
    "Tries to tell a webhook of an event, by what came of them. failed: it will be tried again",
    outcome=("delivered", "failed", "given_up"),
)

#: Why a connection is closed that isn't at its end.
CLOSED_REASONS = ("slow_head", "head_too_large", "slow_reader", "full")
_CLOSED_MEANING = (
    "Connections closed for a bound. slow_head: a request's head wasn't whole in time. head_too_large: it never ended. "
    "slow_reader: an answer wasn't read. full: as many were open as may be"
)

#: An api.
API = Process("api")

API_REQUESTS = API.counter(
    "requests",
    "requests",
    "Requests answered",
    route=ROUTE,
    method="a method of HTTP; `other`: none that is known",
    status=STATUS,
)
API_REQUEST_SECONDS = API.histogram(
    "request",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    "From a request to the end of its answer",
    route=ROUTE,
)
API_TOKENS = API.counter("tokens", "tokens", "Tokens metered", model=MODEL)
API_REFUSALS = API.counter(
    "refusals",
    "requests",
    "Requests that a workspace's limits refused",
    limit=("requests_per_minute", "tokens_per_minute", "monthly_tokens", "monthly_cost"),
)
API_USAGE_ROWS_WAITING = API.gauge("usage_rows_waiting", "rows", "Usage that isn't written yet")
API_DATABASE_FAILURES = API.counter("database_failures", "questions", "Times that the database didn't answer in time")

API_UNKNOWN_KEYS = API.counter("unknown_keys", "requests", "Requests whose key isn't known, or no longer")
API_QUESTIONS_LATE = API.counter(
    "questions_late",
    "questions",
    "Questions that waited too long for their turn, or took too long, while others were answered",
)
API_CONNECTIONS_CLOSED = API.counter("connections_closed", "connections", _CLOSED_MEANING, reason=CLOSED_REASONS)

#: An engine.
ENGINE = Process("engine")

ENGINE_BATCHES = ENGINE.counter("batches", "batches", "Forward passes", model=MODEL)
ENGINE_ITEMS = ENGINE.counter("items", "texts", "Texts in batches", model=MODEL)
ENGINE_TOKENS = ENGINE.counter("tokens", "tokens", "Tokens of the texts in batches", model=MODEL)
ENGINE_PADDED_TOKENS = ENGINE.counter(
    "padded_tokens", "tokens", "Those tokens, and what shorter texts of a batch are filled up with", model=MODEL
)
ENGINE_BATCH_SECONDS = ENGINE.seconds("batch", "Time of forward passes", model=MODEL)
ENGINE_WAITING_SECONDS = ENGINE.gauge(
    "waiting_seconds", "seconds", "Work that waits or is under way, at the rates that the models have there"
)
ENGINE_REFUSED = ENGINE.counter("refused", "requests", "Requests refused since too much work waited")
ENGINE_CONNECTIONS_CLOSED = ENGINE.counter("connections_closed", "connections", _CLOSED_MEANING, reason=CLOSED_REASONS)
ENGINE_MODELS_LOADED = ENGINE.gauge("models_loaded", "models", "Models in memory")
ENGINE_DEVICE_MEMORY_BYTES = ENGINE.gauge(
    "device_memory_bytes", "bytes", "Memory that it holds: the GPU's, or on a CPU its own", device=DEVICE
)

#: All kinds of processes that show metrics.
PROCESSES = (WORKER, DISPATCHER, API, ENGINE)
