"""Prometheus metrics of every process, in one list: name, unit, meaning, and the values of the labels.

A process only serves its own metrics, `vectormill_worker_…` and so on. Labels have few values: models, queues and
devices are named by the operator, collections are bounded in number, and all other values are listed here. No label
holds a text, a key or a job.
Metrics are updated per batch, commit or request, never per item.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics

from pipeline.core.chunks import RejectCode
from pipeline.core.jobs import JobState, Reason

#: Descriptions of labels whose values aren't listed here.
MODEL = "a model's name in the catalogue"
QUEUE = "a model's queue"
DEVICE = "a device of the machine"
COLLECTION = "a collection's view, of at most a thousand with an expected time between syncs"
ROUTE = "a route's template; `unknown`: there is no such route"
STATUS = "an HTTP status; `none`: the client disconnected before the response"

Series = TypeVar("Series", Counter, Summary, Histogram)

disable_created_metrics()


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Description of one metric."""

    process: str
    #: Without `_bucket`, `_sum` and `_count` for a histogram or a summary.
    name: str
    kind: str
    unit: str
    meaning: str
    #: The values of each label, or their description.
    labels: Mapping[str, Sequence[str] | str]


#: All metrics, in the order of this file.
EVERY: list[Metric] = []


class Process:
    """The metrics of one kind of process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = CollectorRegistry()

    def counter(self, name: str, unit: str, meaning: str, **labels: Iterable[str] | str) -> Counter:
        """Add a counter."""
        noted = self._note(f"{name}_total", "counter", unit, meaning, labels)
        return _born(Counter(noted.name, meaning, list(labels), registry=self.registry), noted)

    def gauge(self, name: str, unit: str, meaning: str, **labels: Iterable[str] | str) -> Gauge:
        """Add a gauge. A worker's gauge is the sum over its living processes."""
        noted = self._note(name, "gauge", unit, meaning, labels)
        return Gauge(noted.name, meaning, list(labels), registry=self.registry, multiprocess_mode="livesum")

    def seconds(self, name: str, meaning: str, **labels: Iterable[str] | str) -> Summary:
        """Add a summary of durations: their number, and their sum in seconds."""
        noted = self._note(f"{name}_seconds", "summary", "seconds", meaning, labels)
        return _born(Summary(noted.name, meaning, list(labels), registry=self.registry), noted)

    def histogram(self, name: str, bounds: Sequence[float], meaning: str, **labels: Iterable[str] | str) -> Histogram:
        """Add a histogram of durations in seconds, with `bounds` as the upper limits of its buckets."""
        noted = self._note(f"{name}_seconds", "histogram", "seconds", meaning, labels)
        return _born(Histogram(noted.name, meaning, list(labels), registry=self.registry, buckets=bounds), noted)

    def _note(self, name: str, kind: str, unit: str, meaning: str, labels: Mapping[str, Iterable[str] | str]) -> Metric:
        values = {label: given if isinstance(given, str) else tuple(given) for label, given in labels.items()}
        whole = f"vectormill_{self.name}_{name}"
        EVERY.append(Metric(process=self.name, name=whole, kind=kind, unit=unit, meaning=meaning, labels=values))
        return EVERY[-1]


def _born(series: Series, noted: Metric) -> Series:
    """Create the series of every combination of label values up front, if all values are listed here.

    Prometheus would otherwise miss a counter's first increase.
    """
    values = [given for given in noted.labels.values() if not isinstance(given, str)]
    if values and len(values) == len(noted.labels):
        for each in product(*values):
            series.labels(*each)
    return series


#: Outcomes of a claim, and of an item that a worker commits.
CLAIM_OUTCOMES = ("done", "missed", "held", "busy", "refused", "lost", "unusable", "given_back", "away", "crashed")
ITEM_OUTCOMES = ("embedded", "reused", "rejected")

#: A worker: its parent and its children together.
WORKER = Process("worker")

WORKER_CLAIMS = WORKER.counter(
    "claims",
    "claims",
    "Messages taken, by outcome. done: the worker did all that it could. missed: the chunk couldn't be claimed. held: "
    "the upstream let nothing through, so the chunk wasn't claimed. busy: it let nothing more through after the claim. "
    "refused: the upstream needs a person. lost: another claim has the chunk. unusable: the model can't be used here. "
    "given_back: given back for another reason. away: the database was unreachable. crashed: the child ended itself",
    model=MODEL,
    outcome=CLAIM_OUTCOMES,
)
WORKER_CHUNK_SECONDS = WORKER.histogram(
    "chunk", (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320), "From a claim to its end", model=MODEL
)
WORKER_ITEMS = WORKER.counter("items", "items", "Items committed, by outcome", model=MODEL, outcome=ITEM_OUTCOMES)
WORKER_REJECTS = WORKER.counter(
    "rejects", "items", "Items rejected by workers, by code; rejects of the submission aren't included", code=RejectCode
)
WORKER_BATCHES = WORKER.counter("batches", "batches", "Forward passes, or answers of an upstream", model=MODEL)
WORKER_TOKENS = WORKER.counter("tokens", "tokens", "Tokens of the texts in batches", model=MODEL)
WORKER_PADDED_TOKENS = WORKER.counter(
    "padded_tokens",
    "tokens",
    "Tokens of the texts in batches, with the padding of shorter texts. Batches of an upstream aren't included",
    model=MODEL,
)
WORKER_ROOFLINE_SECONDS = WORKER.counter(
    "roofline_seconds",
    "seconds",
    "Time that the tokens in batches would take at the device's rate of matrix products. Static models and upstreams "
    "have none",
    model=MODEL,
)
WORKER_STEP_SECONDS = WORKER.seconds(
    "step", "Time that slots spent, by step of a chunk", model=MODEL, step=("read", "tokenise", "embed", "write")
)
WORKER_LEASES_LOST = WORKER.counter(
    "leases_lost",
    "leases",
    "Leases lost before the end of their claim. overtaken: another claim had the chunk. child_died: the process died. "
    "time_limit: the process was killed for taking too long",
    cause=("overtaken", "child_died", "time_limit"),
)
WORKER_THROTTLE_WAIT_SECONDS = WORKER.counter(
    "throttle_wait_seconds", "seconds", "Time that requests waited for an upstream's rate limits", model=MODEL
)
WORKER_GATEWAY_REQUESTS = WORKER.counter(
    "gateway_requests",
    "requests",
    "Requests to an upstream, by class of the answer's status. none: no answer came",
    model=MODEL,
    status=("2xx", "3xx", "4xx", "429", "5xx", "none"),
)
WORKER_GATEWAY_SECONDS = WORKER.seconds("gateway_request", "Time until an upstream's answer", model=MODEL)
WORKER_DEVICE_MEMORY_BYTES = WORKER.gauge(
    "device_memory_bytes", "bytes", "Memory used by children: on a GPU the GPU's, on a CPU their own", device=DEVICE
)

#: A dispatcher. Gauges of the whole system are shown by the leader only.
DISPATCHER = Process("dispatcher")

DISPATCHER_LEADS = DISPATCHER.gauge("leads", "1 or 0", "1: this dispatcher is the leader; 0: it stands by")
DISPATCHER_JOBS = DISPATCHER.gauge("jobs", "jobs", "Jobs that haven't ended", state=JobState)
DISPATCHER_JOBS_PAUSED = DISPATCHER.gauge("jobs_paused", "jobs", "Paused jobs, by reason", reason=Reason)
DISPATCHER_JOBS_ENDED = DISPATCHER.counter(
    "jobs_ended",
    "jobs",
    "Jobs that ended, by final state; also requests made in SQL that failed before they became a job",
    state=[state for state in JobState if state.ended],
)
DISPATCHER_ITEMS = DISPATCHER.counter(
    "items",
    "items",
    "Items of jobs that ended, as in their receipts; a retried job is counted each time it ends",
    outcome=("embedded", "reused", "rejected", "cancelled"),
)
DISPATCHER_REJECTS = DISPATCHER.counter(
    "rejects", "items", "Rejects of jobs that ended, by code: those of workers and of the submission", code=RejectCode
)
DISPATCHER_CHUNKS = DISPATCHER.gauge(
    "chunks", "chunks", "Open chunks of queued and running jobs", model=MODEL, state=("pending", "running")
)
DISPATCHER_QUEUE_MESSAGES = DISPATCHER.gauge(
    "queue_messages", "messages", "Messages waiting in Redis; a few are enough", queue=QUEUE
)
DISPATCHER_SLOTS = DISPATCHER.gauge("slots", "slots", "Slots of live workers that serve the model", model=MODEL)
DISPATCHER_WORKERS = DISPATCHER.gauge(
    "workers",
    "workers",
    "Workers seen lately. resting: they lost chunk after chunk, and claim none for now",
    state=("serving", "resting"),
)
DISPATCHER_COLLECTION_KEYS = DISPATCHER.gauge(
    "collection_keys", "keys", "Keys of a collection; of very many an estimate", collection=COLLECTION
)
DISPATCHER_COLLECTION_OVERDUE = DISPATCHER.gauge(
    "collection_overdue_seconds",
    "seconds",
    "Time since a collection's last completed sync, or its creation, beyond that in which one is expected; 0: in time",
    collection=COLLECTION,
)
DISPATCHER_MESSAGES_PUBLISHED = DISPATCHER.counter("messages_published", "messages", "Messages sent", queue=QUEUE)
DISPATCHER_LEASES_EXPIRED = DISPATCHER.counter(
    "leases_expired", "leases", "Leases that expired: their worker died, froze or lost the database"
)
DISPATCHER_BACKENDS_ENDED = DISPATCHER.counter(
    "backends_ended", "backends", "Postgres backends terminated because they froze while they held a chunk"
)
DISPATCHER_DUTY_SECONDS = DISPATCHER.seconds(
    "duty", "Time spent on duties, by their names in pipeline/dispatch/dispatcher.py", duty="a duty's name"
)
DISPATCHER_FAILURES = DISPATCHER.counter(
    "failures", "duties", "Duties and background tasks that failed, by cause", cause=("redis", "database", "other")
)
DISPATCHER_WEBHOOK_TRIES = DISPATCHER.counter(
    "webhook_tries",
    "tries",
    "Tries to deliver an event to a webhook, by outcome. failed: there will be another try",
    outcome=("delivered", "failed", "given_up"),
)

#: Reasons to close a connection early.
CLOSED_REASONS = ("slow_head", "head_too_large", "slow_reader", "full")
_CLOSED_MEANING = (
    "Connections closed because of a limit. slow_head: a request's head wasn't complete in time. head_too_large: the "
    "head was too long. slow_reader: the client didn't read the response. full: too many connections were open"
)

#: An api.
API = Process("api")

API_REQUESTS = API.counter(
    "requests",
    "requests",
    "Requests answered",
    route=ROUTE,
    method="an HTTP method; `other`: an unknown one",
    status=STATUS,
)
API_REQUEST_SECONDS = API.histogram(
    "request",
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    "From a request to the end of its response",
    route=ROUTE,
)
API_TOKENS = API.counter("tokens", "tokens", "Tokens metered", model=MODEL)
API_REFUSALS = API.counter(
    "refusals",
    "requests",
    "Requests refused because of a workspace's limits",
    limit=("requests_per_minute", "tokens_per_minute", "monthly_tokens", "monthly_cost"),
)
API_USAGE_ROWS_WAITING = API.gauge("usage_rows_waiting", "rows", "Rows of usage that aren't written yet")
API_DATABASE_FAILURES = API.counter(
    "database_failures", "queries", "Database queries that failed, or timed out while none was answered"
)

API_UNKNOWN_KEYS = API.counter("unknown_keys", "requests", "Requests with an unknown, revoked or expired API key")
API_QUESTIONS_LATE = API.counter(
    "questions_late",
    "queries",
    "Database queries that timed out, in the queue or running, while others were answered",
)
API_CONNECTIONS_CLOSED = API.counter("connections_closed", "connections", _CLOSED_MEANING, reason=CLOSED_REASONS)

#: An engine.
ENGINE = Process("engine")

ENGINE_BATCHES = ENGINE.counter("batches", "batches", "Forward passes", model=MODEL)
ENGINE_ITEMS = ENGINE.counter("items", "texts", "Texts in batches", model=MODEL)
ENGINE_TOKENS = ENGINE.counter("tokens", "tokens", "Tokens of the texts in batches", model=MODEL)
ENGINE_PADDED_TOKENS = ENGINE.counter(
    "padded_tokens", "tokens", "Tokens of the texts in batches, with the padding of shorter texts", model=MODEL
)
ENGINE_BATCH_SECONDS = ENGINE.seconds("batch", "Time of forward passes", model=MODEL)
ENGINE_WAITING_SECONDS = ENGINE.gauge(
    "waiting_seconds", "seconds", "Work that waits or is in progress, estimated from the models' rates there"
)
ENGINE_REFUSED = ENGINE.counter("refused", "requests", "Requests refused because too much work waited")
ENGINE_CONNECTIONS_CLOSED = ENGINE.counter("connections_closed", "connections", _CLOSED_MEANING, reason=CLOSED_REASONS)
ENGINE_MODELS_LOADED = ENGINE.gauge("models_loaded", "models", "Models in memory")
ENGINE_DEVICE_MEMORY_BYTES = ENGINE.gauge(
    "device_memory_bytes", "bytes", "Memory used by the engine: on a GPU the GPU's, on a CPU its own", device=DEVICE
)

#: All kinds of processes that show metrics.
PROCESSES = (WORKER, DISPATCHER, API, ENGINE)
