"""A client of gateways: texts of a chunk go out in requests, several at a time; vectors come back in their order.

The loop of `_run` is the one place that waits, writes attempts down and decides what an answer means; threads only
post a body and read the reply. There is one layer of retries: a request that may succeed later goes back in line, at
the pace of the throttle. What a person must mend, or what takes longer than a worker waits, ends the loop with an
error, after all that was under way has been yielded.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Self

import httpx2 as httpx
import numpy as np
import numpy.typing as npt
import orjson
import structlog
from sqlalchemy import Engine

from pipeline.errors import BadReply, GatewayBusy, GatewayRefused, ModelError
from pipeline.jobs import Claim, Model, Reason, RejectCode, Upstream
from pipeline.settings import read_secret
from pipeline.store import attempts
from pipeline.wire import Reply, endpoint_of, make_request, most_reply_bytes, parse_reply, told_wait_seconds
from pipeline.writeback import while_database_is_away
from workers.batching import Batch, Tokenised, request_batches, share_out
from workers.canary import CANARY, is_canary
from workers.throttle import Leave, Throttle

log = structlog.get_logger()

#: When nothing comes through for so long, or wouldn't, the chunk is given back.
PATIENCE_SECONDS = 30.0
#: So many failures of a request, and the canary is asked whether the gateway or the texts are to blame.
_MOST_FAILURES = 3
#: Before a request goes out again; doubled with each failure.
_REST_SECONDS = 0.5
_MOST_REST_SECONDS = 8.0
_CONNECT_SECONDS = 5.0
_CHARACTERS_PER_TOKEN = 4.0
_DESCRIBE_SECONDS = 60.0
_USUAL_TEXT = "A sentence of a usual length, as it stands in the documents that people embed. " * 4
_USUAL_TEXTS = 32
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_TEXTS_FAULT = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY})
_TRY_AGAIN = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY})


@dataclass(frozen=True, slots=True)
class Attempts:
    """Writes down what a claim asks of a gateway, each request on disk before it is sent. What has been paid for isn't
    let go because the database is away for a while."""

    engine: Engine
    claim: Claim
    model: str

    def begin(self, items: int, estimated_tokens: int) -> int:
        """A request is about to be made. Returns the attempt's id."""
        for again in while_database_is_away("attempt_retried"):
            with again, self.engine.begin() as connection:
                attempt_id = attempts.begin(
                    connection, self.claim, self.model, items=items, estimated_tokens=estimated_tokens
                )
        return attempt_id

    def end(self, attempt_id: int, status: str, billed_tokens: int | None) -> None:
        """How it went."""
        for again in while_database_is_away("attempt_retried"):
            with again, self.engine.begin() as connection:
                attempts.end(connection, attempt_id, status, billed_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a request."""

    #: 0: none came.
    status: int
    seconds: float
    #: Why there is no reply, for a person; never a text.
    trouble: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    reply: Reply | None = None
    #: The gateway's own word for an error.
    code: str = ""
    #: It may have been carried out, though no answer tells.
    unknown: bool = False


class Connection:
    """Kept-alive connections to a gateway's model; any number of threads may post."""

    def __init__(self, upstream: Upstream, *, seconds: float, in_flight: int) -> None:
        self.upstream = upstream
        #: Learned from what replies meter.
        self.characters_per_token = _CHARACTERS_PER_TOKEN
        self._seconds = seconds
        self._client = httpx.Client(
            timeout=httpx.Timeout(seconds, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight, keepalive_expiry=30),
            # A redirection would take the key elsewhere.
            follow_redirects=False,
            trust_env=False,
        )

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def learn(self, characters: int, tokens: int) -> None:
        """So many characters were so many tokens."""
        if tokens and characters:
            self.characters_per_token = max(0.25, 0.8 * self.characters_per_token + 0.2 * characters / tokens)

    def post(self, key: str | None, texts: Sequence[str], dimensions: int | None) -> Answer:
        """Ask for the vectors of texts. Whatever happens is an answer."""
        begin = time.monotonic()

        def answer(status: int = 0, **what: object) -> Answer:
            return Answer(status=status, seconds=time.monotonic() - begin, **what)  # type: ignore[arg-type]

        headers = {"content-type": "application/json", "accept-encoding": "gzip"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        url = endpoint_of(self.upstream.url)
        most_bytes = most_reply_bytes(len(texts), dimensions or 65_536)
        try:
            with self._client.stream(
                "POST", url, content=make_request(self.upstream, texts), headers=headers
            ) as response:
                body = self._read(response, begin + self._seconds, most_bytes)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            return answer(trouble=f"can't be reached ({type(error).__name__})")
        except (httpx.TimeoutException, TimeoutError):
            return answer(trouble=f"doesn't answer within {self._seconds:g} s", unknown=True)
        except httpx.HTTPError as error:
            return answer(trouble=f"broke the connection ({type(error).__name__})", unknown=True)
        except BadReply as error:
            return answer(HTTPStatus.OK, trouble=str(error), unknown=True)
        if response.status_code != HTTPStatus.OK:
            code = _code_of(body)
            named = f" {code}" if code else ""
            trouble = f"answers {response.status_code}{named}"
            return answer(response.status_code, trouble=trouble, headers=response.headers, code=code)
        try:
            reply = parse_reply(body, len(texts), dimensions)
        except BadReply as error:
            return answer(HTTPStatus.OK, trouble=str(error), headers=response.headers, unknown=True)
        return answer(HTTPStatus.OK, headers=response.headers, reply=reply)

    @staticmethod
    def _read(response: httpx.Response, deadline: float, most_bytes: int) -> bytes:
        pieces, size = [], 0
        for piece in response.iter_bytes():
            size += len(piece)
            if size > most_bytes:
                raise BadReply("it is longer than any list of these embeddings")
            if time.monotonic() > deadline:
                raise TimeoutError
            pieces.append(piece)
        return b"".join(pieces)


def _code_of(body: bytes) -> str:
    """An error's code in OpenAI's envelope. Messages may quote texts, so they are left."""
    try:
        error = orjson.loads(body)["error"]
        code = error.get("code") or error.get("type") or ""
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return ""
    fit = isinstance(code, str) and len(code) <= 64 and code.replace("_", "").isalnum() and code.isascii()
    return code if fit else ""


@dataclass(eq=False, slots=True)
class _Request:
    """Texts that go out together."""

    at: npt.NDArray[np.int64]
    #: The canary's request has no texts of the chunk. What comes of it settles this one, which has failed.
    judges: "_Request | None" = None
    canary: bool = False
    failures: int = 0
    #: Before which moment it isn't sent again, by the monotonic clock.
    rests_until: float = 0.0
    trouble: str = ""


class GatewayEncoder:
    """A model behind a gateway, for one claim."""

    def __init__(
        self,
        model: Model,
        connection: Connection,
        throttle: Throttle,
        written: Attempts,
        *,
        in_flight: int,
        proven: set[str],
    ) -> None:
        """`proven`: weights whose canary this process has seen come out right; kept from claim to claim.

        Raises:
            GatewayRefused: the key isn't here.
        """
        assert model.upstream
        self.dimensions = model.dimensions
        self._model, self._upstream = model, model.upstream
        self._connection, self._throttle, self._attempts = connection, throttle, written
        self._in_flight, self._proven = in_flight, proven
        self._key = key_of(model.upstream)
        self._texts: Sequence[str] = ()
        self._lengths = np.zeros(0, np.int32)
        self._pending: deque[_Request] = deque()
        self._ends_with: GatewayBusy | GatewayRefused | ModelError | None = None
        #: When it last let something through.
        self._answered_at = 0.0
        #: Whether the canary has come through within this claim.
        self._vouched = False

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokenised:
        """Estimate lengths; the gateway reads for itself, and says what it has read afterwards."""
        prompt = self._model.document_prompt
        whole = [prompt + text for text in texts] if prompt else list(texts)
        longest = max_tokens or self._model.max_item_tokens or 2**31 - 1
        size = self._connection.characters_per_token
        lengths = [min(longest, int(len(text) / size) + 1) for text in whole]
        return Tokenised(whole, np.array(lengths, np.int32), np.zeros(len(whole), np.bool_))

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Send every text, and yield what comes back; what is under way when `stop` says so is still awaited.

        Raises:
            GatewayBusy: it takes longer than a worker waits. All that came back was yielded before, here and below.
            GatewayRefused: a person must mend something.
            ModelError: the canary's vector is another one by now.
        """
        if self._model.weights_sha256 not in self._proven:
            yield from self._run([_Request(np.zeros(0, np.int64), canary=True)], stop)
        self._texts, self._lengths = tokenised.ids, tokenised.lengths
        most_tokens = int(min(self._upstream.request_tokens, self._throttle.most_request_tokens))
        cut = request_batches(self._lengths, max(1, most_tokens), self._upstream.request_inputs)
        yield from self._run([_Request(at) for at in cut], stop)

    def prove_again(self) -> None:
        """Ask for the canary's vector. Raises as `batches`."""
        for _ in self._run([_Request(np.zeros(0, np.int64), canary=True)], lambda: False):
            pass

    def _run(self, requests: Sequence[_Request], stop: Callable[[], bool]) -> Iterator[Batch]:
        self._pending = deque(requests)
        self._answered_at = time.monotonic()
        flying: dict[Future[Answer], tuple[_Request, Leave, int]] = {}
        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="gateway") as threads:
            while True:
                while len(flying) < self._in_flight and self._pending and not self._over(stop):
                    request = self._pending.popleft()
                    leave = self._await_leave(request, stop)
                    if leave is None:
                        self._pending.appendleft(request)
                        break
                    attempt = self._attempts.begin(max(1, len(request.at)), self._tokens(request))
                    posted = threads.submit(self._connection.post, self._key, self._texts_of(request), self.dimensions)
                    flying[posted] = (request, leave, attempt)
                if not flying:
                    break
                for answered in wait(flying, return_when=FIRST_COMPLETED).done:
                    yield from self._settle(*flying.pop(answered), answered.result())
        if self._ends_with:
            raise self._ends_with

    def _over(self, stop: Callable[[], bool]) -> bool:
        return self._ends_with is not None or stop()

    def _texts_of(self, request: _Request) -> list[str]:
        return [CANARY] if request.canary else [self._texts[at] for at in request.at.tolist()]

    def _tokens(self, request: _Request) -> int:
        return len(CANARY) if request.canary else int(self._lengths[request.at].sum())

    def _await_leave(self, request: _Request, stop: Callable[[], bool]) -> Leave | None:
        """Wait until the request may go out. None: it may not."""
        self._sleep(request.rests_until - time.monotonic(), stop)
        while not self._over(stop):
            left = self._answered_at + PATIENCE_SECONDS - time.monotonic()
            leave = self._throttle.reserve(self._tokens(request), max(0.0, left))
            if leave.wait_seconds > left:
                trouble = request.trouble or "lets no more through for now"
                self._ends_with = GatewayBusy(f"the gateway {trouble}", leave.wait_seconds)
                return None
            waits = leave.wait_seconds
            self._sleep(waits if leave.granted else waits * random.uniform(1.0, 1.2) + 0.01, stop)  # noqa: S311
            # Meanwhile somebody may have been refused.
            if leave.granted and not (waits > 0 and self._throttle.held_seconds(told=True)):
                return leave
        return None

    def _sleep(self, seconds: float, stop: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not stop():
            time.sleep(min(left, 0.5))

    def _settle(self, request: _Request, leave: Leave, attempt: int, answer: Answer) -> Iterator[Batch]:
        estimate = self._tokens(request)
        told = told_wait_seconds(answer.headers, time.time())
        if reply := answer.reply:
            yield from self._take(request, reply, attempt, answer)
            return
        request.trouble = answer.trouble
        log.info("gateway_request_failed", status=answer.status, trouble=answer.trouble, inputs=len(request.at))
        self._attempts.end(attempt, str(answer.status or "no answer"), None if answer.unknown else 0)
        match answer.status:
            case HTTPStatus.TOO_MANY_REQUESTS if answer.code in _SPENT:
                self._refuse(Reason.BUDGET_SPENT, answer)
            case HTTPStatus.TOO_MANY_REQUESTS:
                self._throttle.refused(leave, answer.headers, estimate, told)
                self._pending.append(request)
            case status if status in _TEXTS_FAULT:
                self._throttle.passed(answer.headers, estimate, 0)
                self._answered_at = time.monotonic()
                yield from self._blame_texts(request, answer)
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                self._refuse(Reason.KEY_REFUSED, answer)
            case HTTPStatus.PAYMENT_REQUIRED:
                self._refuse(Reason.BUDGET_SPENT, answer)
            case status if 300 <= status < 500 and status not in _TRY_AGAIN:
                self._refuse(Reason.GATEWAY_REFUSED, answer)
            case status:
                if status != HTTPStatus.OK:  # one that answers isn't dead
                    self._throttle.failed(leave, told)
                self._try_again(request, answer)

    def _take(self, request: _Request, reply: Reply, attempt: int, answer: Answer) -> Iterator[Batch]:
        estimate = self._tokens(request)
        tokens = estimate if reply.prompt_tokens is None else reply.prompt_tokens
        self._throttle.passed(answer.headers, estimate, tokens)
        self._answered_at = time.monotonic()
        if reply.model not in (None, self._upstream.model, self._upstream.reply_model):
            self._attempts.end(attempt, "another model", tokens)
            message = f"{self._upstream.url} answers for another model than {self._upstream.model}"
            self._ends_with = self._ends_with or GatewayRefused(message, Reason.GATEWAY_REFUSED)
            return
        self._attempts.end(attempt, "ok", tokens)
        if request.canary:
            yield from self._judge(request, reply)
            return
        self._connection.learn(sum(len(text) for text in self._texts_of(request)), tokens)
        yield self._batch(request, reply, tokens, answer.seconds)

    def _batch(self, request: _Request, reply: Reply, tokens: int, seconds: float) -> Batch:
        return Batch(
            request.at,
            share_out(tokens, self._lengths[request.at]),
            # Of the slot's time; the other requests under way take the rest.
            seconds / self._in_flight,
            reply.vectors,
            truncated=request.at[list(reply.truncated)].tolist() if reply.truncated else (),
        )

    def _try_again(self, request: _Request, answer: Answer) -> None:
        """Back in line; but when it fails again and again, is it the gateway or the texts?"""
        request.failures += 1
        rest = min(_MOST_REST_SECONDS, _REST_SECONDS * 2**request.failures)
        request.rests_until = time.monotonic() + rest * random.uniform(0.5, 1.0)  # noqa: S311
        unavailable = answer.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.BAD_GATEWAY) or not (
            answer.status or answer.unknown
        )
        if request.failures < _MOST_FAILURES or unavailable:
            self._pending.append(request)
        elif not request.canary:
            self._pending.appendleft(_Request(request.at[:0], canary=True, judges=request))
        elif answer.status == HTTPStatus.OK:  # replies that can't be used, whatever is asked
            self._refuse(Reason.GATEWAY_REFUSED, answer)
        else:
            self._ends_with = self._ends_with or GatewayBusy(f"the gateway {request.trouble}", PATIENCE_SECONDS)

    def _blame_texts(self, request: _Request, answer: Answer) -> Iterator[Batch]:
        """Find the text for which a request is refused; but not if every text is."""
        if request.canary:
            self._refuse(Reason.GATEWAY_REFUSED, answer)
        elif len(request.at) > 1:
            self._split(request)
        elif self._vouched:
            yield self._failed(request, RejectCode.GATEWAY_REFUSED)
        else:
            request.failures = 0
            self._pending.appendleft(_Request(request.at[:0], canary=True, judges=request))

    def _judge(self, request: _Request, reply: Reply) -> Iterator[Batch]:
        """The canary has come through: the gateway works."""
        if not is_canary(reply.vectors[0], self._model.canary):
            message = "the gateway's vector of the canary text differs from the catalogue's: it is another model by now"
            self._ends_with = ModelError(message)
            return
        self._proven.add(self._model.weights_sha256)
        self._vouched = True
        judged = request.judges
        if judged is None:
            return
        if len(judged.at) > 1:
            self._split(judged)
        else:
            code = RejectCode.GATEWAY_FAILED if judged.failures else RejectCode.GATEWAY_REFUSED
            yield self._failed(judged, code)

    def _split(self, request: _Request) -> None:
        half = len(request.at) // 2
        self._pending.extendleft((_Request(request.at[half:]), _Request(request.at[:half])))

    def _failed(self, request: _Request, code: RejectCode) -> Batch:
        return Batch(request.at, self._lengths[request.at], 0.0, failure=(code, f"the gateway {request.trouble}"))

    def _refuse(self, reason: Reason, answer: Answer) -> None:
        message = f"{self._upstream.url} {answer.trouble}"
        if answer.status == HTTPStatus.OK:
            message = f"{self._upstream.url} gives replies that can't be used: {answer.trouble}"
        elif reason is Reason.KEY_REFUSED:
            message += f"; mend the key in {self._upstream.key_env or '--key-env'}, and resume"
        self._ends_with = self._ends_with or GatewayRefused(message, reason)


def key_of(upstream: Upstream) -> str | None:
    """A gateway's key, if it asks for one.

    Raises:
        GatewayRefused: it isn't here.
    """
    if upstream.key_env is None:
        return None
    key = read_secret(upstream.key_env)
    if key is None or not key.isascii() or not key.isprintable():
        where = f"set {upstream.key_env}, or {upstream.key_env}_FILE to the path of a file that holds it"
        raise GatewayRefused(f"there is no key for {upstream.url}: {where}", Reason.KEY_REFUSED)
    return key


def describe(upstream: Upstream) -> dict[str, object]:
    """What the catalogue records of a gateway's model, by two requests.

    Raises:
        ModelError: it can't be asked, or answers with something else than embeddings.
    """
    answer = _ask_now(upstream, [CANARY])
    if answer.status in _TEXTS_FAULT:
        upstream = replace(upstream, base64=False)
        answer = _ask_now(upstream, [CANARY])
    reply = _reply_of(upstream, answer)
    canary = reply.vectors[0]
    if not is_canary(canary, canary.tobytes()):
        raise ModelError(f"{upstream.url}: the canary text's vector is zero or not finite.")
    many = _ask_now(upstream, [_USUAL_TEXT] * _USUAL_TEXTS)
    tokens = _reply_of(upstream, many).prompt_tokens or len(_USUAL_TEXT) * _USUAL_TEXTS // 4
    return {
        "reply_model": reply.model,
        "base64": upstream.base64,
        "dimensions": len(canary),
        "normalised": bool(abs(float(np.linalg.norm(canary)) - 1) < 1e-3),
        "canary": canary.astype("<f4").tobytes().hex(),
        "tokens_per_second": round(tokens / many.seconds, 1),
    }


def embed_now(upstream: Upstream, texts: Sequence[str]) -> list[list[float]]:
    """Vectors of a few texts, by one request.

    Raises:
        ModelError: it gives none.
    """
    vectors: list[list[float]] = _reply_of(upstream, _ask_now(upstream, texts)).vectors.tolist()
    return vectors


def _ask_now(upstream: Upstream, texts: Sequence[str]) -> Answer:
    with Connection(upstream, seconds=_DESCRIBE_SECONDS, in_flight=1) as connection:
        return connection.post(key_of(upstream), texts, None)


def _reply_of(upstream: Upstream, answer: Answer) -> Reply:
    if answer.reply is None:
        raise ModelError(f"{upstream.url} {answer.trouble or 'gives no embeddings'}.")
    return answer.reply
