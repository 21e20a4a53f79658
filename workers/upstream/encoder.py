"""Encoder of a model behind an upstream: sends a chunk's texts in concurrent requests, and yields their vectors.

The loop of `_run` is the one place that waits, records attempts and decides what an answer means; threads only post a
body and read the reply. There is one layer of retries: a request that may succeed later goes back to the queue, and is
paced by the rate limiter. An error that a person must fix, or a wait longer than a worker's patience, ends the loop
after the results of all requests in flight have been yielded.

No text is blamed until the canary has come through after the text's failure. No text is sent until the canary's vector
has matched the catalogue's.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from http import HTTPStatus
from math import inf

import numpy as np
import numpy.typing as npt
import structlog

from pipeline.core.canary import CANARY, is_canary
from pipeline.core.chunks import RejectCode
from pipeline.core.errors import GatewayBusy, GatewayChanged, GatewayRefused
from pipeline.core.jobs import Reason
from pipeline.core.models import Model
from pipeline.core.openai_client import TEXTS_FAULT, Reply, told_wait_seconds
from pipeline.core.vectors import sound
from pipeline.ingest.chunking import request_batches
from workers import instrumentation
from workers.encoders.batching import Batch, Span, SplitRule, Tokenised, share_out
from workers.upstream.attempts import Attempts
from workers.upstream.client import Answer, UpstreamClient, key_of
from workers.upstream.rate_limiter import RateLimiter
from workers.upstream.requests import Sent, UpstreamRequest, canary_request
from workers.upstream.state import UpstreamState

log = structlog.get_logger()

#: The chunk is given back when nothing comes through for this long, or when the wait would be longer.
PATIENCE_SECONDS = 30.0
#: Failures of a request before the canary is sent, to tell whether the upstream or the texts are to blame.
_MOST_FAILURES = 3
#: Polling interval of `stop`.
_LOOK_SECONDS = 0.5
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_TRY_AGAIN = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY})
_AWAY = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE})


class UpstreamEncoder:
    """Encoder of a model behind an upstream, for one claim."""

    def __init__(
        self,
        model: Model,
        client: UpstreamClient,
        limiter: RateLimiter,
        attempts: Attempts,
        state: UpstreamState,
        *,
        in_flight: int,
    ) -> None:
        """Create an encoder. `client`, `limiter` and `state` are kept from claim to claim.

        Raises:
            GatewayRefused: the key isn't set here.
        """
        assert model.upstream
        self.dimensions = model.dimensions
        self.device_kind = self.precision = None
        self._model, self._upstream = model, model.upstream
        self._client, self._limiter, self._attempts, self._state = client, limiter, attempts, state
        self._in_flight = in_flight
        self._key = limiter.key = key_of(model.upstream)
        self._texts: Sequence[str] = ()
        self._lengths = np.zeros(0, np.int32)
        self._pending: deque[UpstreamRequest] = deque()
        self._next: Sent | None = None
        self._flying: dict[Future[Answer], Sent] = {}
        self._ends_with: GatewayBusy | GatewayRefused | None = None
        #: Time when the upstream last let a request through.
        self._answered_at = 0.0
        #: Time since which the next request has been waiting for the limits; infinite if it isn't.
        self._waits_since = inf
        #: Time up to which this slot has been metered.
        self._metered_at = 0.0

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokenised:
        """Estimate lengths. The upstream tokenises for itself, and reports its token count afterwards."""
        prompt = self._model.document_prompt
        whole = [prompt + text for text in texts] if prompt else list(texts)
        longest = max_tokens or self._model.max_item_tokens or 2**31 - 1
        size = self._state.characters_per_token
        lengths = [min(longest, int(len(text) / size) + 1) for text in whole]
        return Tokenised(whole, np.array(lengths, np.int32), np.zeros(len(whole), np.bool_))

    def split(
        self, texts: Sequence[str], titles: Sequence[str], rule: SplitRule, beat: Callable[[], None] = lambda: None
    ) -> list[list[Span]]:
        """Raise an error of ours: only the upstream can count tokens, so no job of its models is split."""
        raise NotImplementedError("a job of an upstream's model isn't split")

    def batches(self, tokenised: Tokenised, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Send every text and yield the results. Requests in flight when `stop` returns True are still awaited.

        Raises:
            GatewayBusy: the wait is longer than a worker's patience. All results have been yielded before.
            GatewayRefused: a person must fix something. All results have been yielded before.
            GatewayChanged: the canary's vector differs from the catalogue's.
        """
        self._texts, self._lengths = tokenised.ids, tokenised.lengths
        most_tokens = min(self._upstream.request_tokens, self._limiter.most_request_tokens)
        cut = request_batches(self._lengths, max(1, int(most_tokens)), self._upstream.request_inputs)
        yield from self._run([UpstreamRequest(at) for at in cut], stop)

    def prove_again(self) -> None:
        """Check the canary's vector. Raises as `batches`."""
        self._state.doubt()
        for _ in self._run([canary_request()], lambda: False):
            pass

    def _run(self, requests: Sequence[UpstreamRequest], stop: Callable[[], bool]) -> Iterator[Batch]:
        self._pending, self._next, self._ends_with = deque(requests), None, None
        self._answered_at = self._metered_at = time.monotonic()
        try:
            with ThreadPoolExecutor(self._in_flight, thread_name_prefix="gateway") as threads:
                while True:
                    moment = self._send(threads, lambda: self._ends_with is not None or stop())
                    if not self._flying and moment == inf:
                        break
                    for answered in self._arrived(min(moment, time.monotonic() + _LOOK_SECONDS)):
                        for batch in self._settle(self._flying.pop(answered), answered.result()):
                            yield batch
                            # The caller may have committed in between; that isn't metered.
                            self._metered_at = time.monotonic()
        finally:
            if self._next:
                self._limiter.give_back(self._next.leave)
        if self._ends_with:
            raise self._ends_with

    def _arrived(self, moment: float) -> set[Future[Answer]]:
        """Wait until a request is answered or until `moment`, and return the answered requests."""
        seconds = max(0.0, moment - time.monotonic())
        if self._flying:
            return wait(self._flying, timeout=seconds, return_when=FIRST_COMPLETED).done
        time.sleep(seconds)
        return set()

    def _send(self, threads: ThreadPoolExecutor, over: Callable[[], bool]) -> float:
        """Send the requests that may go now. Return when to check again; infinite: after the next answer, or never."""
        while not over() and len(self._flying) < self._in_flight:
            if self._next is None:
                moment = self._reserve()
                if moment is not None:
                    return moment
                continue
            if self._next.moment > time.monotonic():
                return self._next.moment
            sent, self._next = self._next, None
            if self._may_still_go(sent):
                self._post(threads, sent)
            else:
                self._limiter.give_back(sent.leave)
                self._pending.appendleft(sent.request)
        return inf

    def _reserve(self) -> float | None:
        """Reserve a leave for the next request. Return when to check again, or None if the leave is granted."""
        request = self._pick()
        if request is None:
            return min((each.rests_until for each in self._pending if self._may_go(each)), default=inf)
        now = time.monotonic()
        left = max(self._answered_at, request.since) + PATIENCE_SECONDS - now
        leave = self._limiter.reserve(self._tokens(request), max(0.0, left))
        if leave.wait_seconds > 0:
            self._waits_since = min(self._waits_since, now)
        if leave.granted:
            self._pending.remove(request)
            self._next = Sent(request, leave, now + leave.wait_seconds)
            return None
        if leave.wait_seconds > left and not self._flying:
            self._give_up(request.trouble or "is rate limited at the moment", leave.wait_seconds)
            return inf
        return now + leave.wait_seconds * random.uniform(1.0, 1.2) + 0.01  # noqa: S311  # nosec B311

    def _pick(self) -> UpstreamRequest | None:
        """Return the first request that may go now, cut to the size that the upstream takes."""
        if not self._is_proven() and not any(each.canary for each in self._all()):
            self._pending.appendleft(canary_request())
        now = time.monotonic()
        found = next((each for each in self._pending if each.rests_until <= now and self._may_go(each)), None)
        if found is None or len(pieces := self._fitting(found)) == 1:
            return found
        self._pending.remove(found)
        self._pending.extendleft(reversed(pieces))
        return pieces[0]

    def _all(self) -> Iterator[UpstreamRequest]:
        yield from self._pending
        yield from (sent.request for sent in self._flying.values())

    def _is_proven(self) -> bool:
        return self._state.proves(self._limiter.opened)

    def _may_go(self, request: UpstreamRequest) -> bool:
        return request.canary or self._is_proven()

    def _may_still_go(self, sent: Sent) -> bool:
        """Return True if a request may go after its wait. Meanwhile the upstream may have refused another sender, or
        the circuit breaker may have opened."""
        told = sent.leave.wait_seconds > 0 and self._limiter.held_seconds(told=True) > 0
        return not told and self._may_go(sent.request)

    def _fitting(self, request: UpstreamRequest) -> list[UpstreamRequest]:
        """Return the request, in pieces if it is now known to be larger than the upstream takes."""
        most_inputs = self._state.most_inputs
        most_tokens = max(1.0, min(self._state.most_tokens, self._limiter.minute_tokens))
        size = len(request.at)
        if size <= 1 or (size <= most_inputs and self._tokens(request) <= most_tokens):
            return [request]
        cut = request_batches(self._lengths[request.at], most_tokens, most_inputs)
        return [UpstreamRequest(request.at[piece]) for piece in cut]

    def _post(self, threads: ThreadPoolExecutor, sent: Sent) -> None:
        request = sent.request
        instrumentation.waited(self._model.name, time.monotonic() - self._waits_since)
        self._waits_since = inf
        attempt = self._attempts.begin(max(1, len(request.at)), self._tokens(request))
        posted = threads.submit(self._client.post, self._key, self._texts_of(request), self.dimensions)
        self._flying[posted] = Sent(request, sent.leave, attempt=attempt, key=self._key)

    def _texts_of(self, request: UpstreamRequest) -> list[str]:
        return [CANARY] if request.canary else [self._texts[at] for at in request.at.tolist()]

    def _tokens(self, request: UpstreamRequest) -> int:
        return len(CANARY) if request.canary else int(self._lengths[request.at].sum())

    def _settle(self, sent: Sent, answer: Answer) -> Iterator[Batch]:
        instrumentation.answered(self._model.name, answer.status, answer.seconds)
        if sent.request.canary and answer.reply and not sound(answer.reply.vectors).all():
            # An unusable reply, not a sign of another model: that would give other vectors, but valid ones.
            answer = replace(answer, reply=None, trouble="it holds a vector that is zero or not finite")
        if answer.reply:
            yield from self._take(sent, answer, answer.reply)
            return
        request, told = sent.request, told_wait_seconds(answer.headers, time.time())
        request.code, request.trouble = RejectCode.GATEWAY_FAILED, answer.trouble
        log.info("gateway_request_failed", status=answer.status, trouble=answer.trouble, inputs=len(request.at))
        self._attempts.end(sent.attempt, str(answer.status or "no answer"), None if answer.unknown else 0)
        too_large = self._tell_limiter(sent, answer, told)
        match answer.status:
            case HTTPStatus.TOO_MANY_REQUESTS if answer.code in _SPENT:
                self._refuse(Reason.BUDGET_SPENT, answer)
            case HTTPStatus.TOO_MANY_REQUESTS if not too_large:
                self._slow_down(request, told)
            case status if status in TEXTS_FAULT or status == HTTPStatus.TOO_MANY_REQUESTS:
                self._answered_at = time.monotonic()
                self._blame_texts(request, answer)
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN if self._has_new_key(sent):
                self._pending.appendleft(request)
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                self._refuse(Reason.KEY_REFUSED, answer)
            case HTTPStatus.PAYMENT_REQUIRED:
                self._refuse(Reason.BUDGET_SPENT, answer)
            case status if 300 <= status < 500 and status not in _TRY_AGAIN:
                self._refuse(Reason.GATEWAY_REFUSED, answer)
            case _:
                self._try_again(request, answer, told)

    def _tell_limiter(self, sent: Sent, answer: Answer, told: float | None) -> bool:
        """Report an answer to the limiter. Return True if the request is larger than the limits ever let through."""
        tokens, status = self._tokens(sent.request), answer.status
        if status == HTTPStatus.TOO_MANY_REQUESTS and answer.code not in _SPENT:
            too_large = self._limiter.refused(sent.leave, answer.headers, tokens, told)
            return answer.too_large or too_large
        if not status or status >= 500 or status in _TRY_AGAIN:
            self._limiter.failed(sent.leave, told)
        else:
            self._limiter.passed(answer.headers, tokens, tokens if status == HTTPStatus.OK else 0)
        return False

    def _take(self, sent: Sent, answer: Answer, reply: Reply) -> Iterator[Batch]:
        request, estimate = sent.request, self._tokens(sent.request)
        tokens = estimate if reply.prompt_tokens is None else reply.prompt_tokens
        self._limiter.passed(answer.headers, estimate, tokens)
        self._answered_at = time.monotonic()
        if reply.model not in (None, self._upstream.model, self._upstream.reply_model):
            self._attempts.end(sent.attempt, "another model", reply.prompt_tokens)
            message = f"{self._upstream.url} answers for another model than {self._upstream.model}"
            self._ends_with = self._ends_with or GatewayRefused(message, Reason.GATEWAY_REFUSED)
            return
        self._attempts.end(sent.attempt, "ok", reply.prompt_tokens)
        if request.canary:
            yield from self._judge(request, reply)
            return
        self._state.answered(sum(len(text) for text in self._texts_of(request)), reply.prompt_tokens)
        self._learn_size(request)
        good = sound(reply.vectors)
        if good.any():
            at, shares = request.at[good], share_out(tokens, self._lengths[request.at])
            # Waits for the limits count as the slot's time, since they decide its rate.
            seconds = time.monotonic() - self._metered_at
            truncated = np.intersect1d(request.at[list(reply.truncated)], at).tolist()
            yield Batch(at, shares[good], seconds, reply.vectors[good], truncated=truncated)
        if not good.all():
            self._doubt(request, np.flatnonzero(~good), answer)

    def _doubt(self, request: UpstreamRequest, bad: npt.NDArray[np.int64], answer: Answer) -> None:
        """Queue texts again if their vectors must not be written, as if their request had failed."""
        request.at, request.halves = request.at[bad], None
        request.code, request.trouble = RejectCode.BAD_VECTOR, "gives a vector that is zero or not finite"
        log.info("gateway_request_failed", status=answer.status, trouble=request.trouble, inputs=len(request.at))
        self._try_again(request, answer, None)

    def _slow_down(self, request: UpstreamRequest, told: float | None) -> None:
        """Queue a rate-limited request again, with a backoff however short the wait is that the upstream asks for."""
        request.refusals += 1
        request.rest(request.refusals)
        self._pending.append(request)
        if time.monotonic() - max(self._answered_at, request.since) > PATIENCE_SECONDS:
            self._give_up(request.trouble, told)

    def _has_new_key(self, sent: Sent) -> bool:
        """Return True if the key has changed since the refused request was sent."""
        try:
            self._key = self._limiter.key = key_of(self._upstream)
        except GatewayRefused:
            return False
        return self._key != sent.key

    def _try_again(self, request: UpstreamRequest, answer: Answer, told: float | None) -> None:
        """Queue a failed request again; after repeated failures, let the canary tell if the upstream is at fault."""
        is_gone = not (answer.status or answer.unknown)
        if is_gone:
            self._state.doubt()  # so that the canary goes first
        if is_gone and not request.canary:
            request.rest(1)
            self._pending.append(request)
            return
        request.failures, request.seconds = request.failures + 1, request.seconds + answer.seconds
        request.rest(request.failures)
        often = request.failures >= _MOST_FAILURES
        if request.canary:
            long = time.monotonic() - max(self._answered_at, request.since) > PATIENCE_SECONDS
            if often and answer.status == HTTPStatus.OK:  # even the canary's reply can't be used
                self._refuse(Reason.GATEWAY_REFUSED, answer)
            elif long or (often and not is_gone and answer.status not in _AWAY):
                self._state.doubt()
                self._give_up(request.trouble, told)
            else:
                self._pending.appendleft(request)
        elif often or request.seconds >= PATIENCE_SECONDS:
            self._pending.appendleft(canary_request(judges=request))
        else:
            self._pending.append(request)

    def _blame_texts(self, request: UpstreamRequest, answer: Answer) -> None:
        """Bisect a refused request to find the text at fault. If the canary is refused too, no text is blamed."""
        if request.canary:
            self._refuse(Reason.GATEWAY_REFUSED, answer)
        elif len(request.at) > 1:
            self._split(request, refused=True)
        else:
            request.failures = 0
            self._pending.appendleft(canary_request(judges=request))

    def _judge(self, request: UpstreamRequest, reply: Reply) -> Iterator[Batch]:
        """Check the canary's vector. If it is right, the upstream works: bisect, retry or reject the judged request."""
        if not is_canary(reply.vectors[0], self._model.canary):
            self._state.doubt()
            message = "the canary text's vector differs from the catalogue's: the upstream now serves another model"
            self._ends_with = GatewayChanged(f"{self._upstream.url}: {message}", Reason.GATEWAY_REFUSED)
            return
        self._state.prove(self._limiter.opened)
        judged = request.judges
        if judged is None:
            return
        if len(judged.at) > 1:
            self._split(judged, refused=False)
        elif judged.failures and not judged.judgements:  # the failure may have another cause: retry once
            judged.failures, judged.seconds, judged.judgements = 0, 0.0, 1
            self._pending.append(judged)
        else:
            code = judged.code if judged.failures else RejectCode.GATEWAY_REFUSED
            failure = (code, f"the upstream {judged.trouble}")
            yield Batch(judged.at, self._lengths[judged.at], 0.0, failure=failure)

    def _split(self, request: UpstreamRequest, *, refused: bool) -> None:
        halves = request.split(self._lengths, refused=refused)
        self._pending.extendleft(reversed(halves))

    def _learn_size(self, request: UpstreamRequest) -> None:
        """Learn a size limit if both halves of a refused request have come through."""
        if halves := request.halves:
            halves.passed += 1
            if halves.passed == 2:
                self._state.learn_size(refused_inputs=halves.refused_inputs, inputs=halves.inputs, tokens=halves.tokens)

    def _give_up(self, trouble: str, wait_seconds: float | None) -> None:
        wait = max(wait_seconds or 0.0, self._state.back_off_seconds())
        self._ends_with = self._ends_with or GatewayBusy(f"the upstream {trouble}", wait)

    def _refuse(self, reason: Reason, answer: Answer) -> None:
        message = f"{self._upstream.url} {answer.trouble}"
        if answer.status == HTTPStatus.OK:
            message = f"{self._upstream.url} gives replies that can't be used: {answer.trouble}"
        elif reason is Reason.KEY_REFUSED:
            message += f"; fix the key in {self._upstream.key_env or 'the variable that holds it'}, then resume the job"
        self._ends_with = self._ends_with or GatewayRefused(message, reason)
