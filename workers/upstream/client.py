"""HTTP client of an upstream, with one total deadline per request. Failures are returned as answers, not raised."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

import httpcore2 as httpcore
import orjson

from pipeline.core.errors import BadReply, GatewayRefused
from pipeline.core.jobs import Reason
from pipeline.core.models import Upstream
from pipeline.core.openai_client import CONNECT_SECONDS, Reply, endpoint_of, make_request, most_reply_bytes, parse_reply
from pipeline.infra.http import Deadlines
from pipeline.infra.settings import read_key

#: Limit of an error's page; the rest isn't read.
_MOST_ERROR_BYTES = 65_536
_KEEP_ALIVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Outcome of one HTTP request to an upstream."""

    #: HTTP status; 0 if no answer came.
    status: int
    seconds: float
    #: Reason for a missing reply, for a person; never quotes a text.
    trouble: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    reply: Reply | None = None
    #: The upstream's own error code.
    code: str = ""
    #: The upstream says that it never takes a request this large.
    too_large: bool = False
    #: The request may have been carried out, although no usable answer came.
    unknown: bool = False


class UpstreamClient:
    """Pool of kept-alive connections to an upstream's model. Any number of threads may post."""

    def __init__(self, upstream: Upstream, *, seconds: float, in_flight: int) -> None:
        self.upstream = upstream
        self._seconds = seconds
        self._deadlines = Deadlines()
        # No proxy and no redirects: they would send the key elsewhere.
        self._pool = httpcore.ConnectionPool(
            max_connections=in_flight, keepalive_expiry=_KEEP_ALIVE_SECONDS, network_backend=self._deadlines
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, key: str | None, texts: Sequence[str], dimensions: int | None) -> Answer:
        """Request the vectors of texts. Failures are returned as answers."""
        begin = time.monotonic()
        self._deadlines.end_at(begin + self._seconds)

        def answer(status: int = 0, **what: object) -> Answer:
            return Answer(status=status, seconds=time.monotonic() - begin, **what)  # type: ignore[arg-type]

        url, body = endpoint_of(self.upstream.url), make_request(self.upstream, texts)
        try:
            with self._pool.stream(
                "POST",
                url,
                headers=_headers(url, key),
                content=body,
                extensions={"timeout": {"connect": CONNECT_SECONDS, "pool": CONNECT_SECONDS}},
            ) as response:
                headers = _Headers(response.headers)
                if response.status != HTTPStatus.OK:
                    return answer(response.status, headers=headers, **_refusal(response))
                found = _read(response, most_reply_bytes(len(texts), dimensions or 65_536))
            reply = parse_reply(found, len(texts), dimensions, asked_bytes=len(body))
            return answer(HTTPStatus.OK, headers=headers, reply=reply)
        except (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.PoolTimeout) as error:
            return answer(trouble=f"can't be reached ({type(error).__name__})")
        except httpcore.TimeoutException:
            return answer(trouble=f"doesn't answer within {self._seconds:g} s", unknown=True)
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            return answer(trouble=f"broke the connection ({type(error).__name__})", unknown=True)
        except BadReply as error:
            return answer(HTTPStatus.OK, trouble=str(error), headers=headers, unknown=True)


class _Headers(dict[str, str]):
    """Headers of a reply, by lower-case name."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        super().__init__((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in pairs)


def _headers(url: str, key: str | None) -> list[tuple[str, str]]:
    # Vectors hardly compress, and a compressed reply may decompress to any size.
    headers = [("content-type", "application/json"), ("accept-encoding", "identity"), ("user-agent", "vectormill")]
    authorization = [("authorization", f"Bearer {key}")] if key else []
    return [("host", urlsplit(url).netloc), *headers, *authorization]


def _read(response: httpcore.Response, most_bytes: int) -> bytes:
    pieces, size = [], 0
    for piece in response.iter_stream():
        size += len(piece)
        if size > most_bytes:
            raise BadReply("it is longer than any list of these embeddings")
        pieces.append(piece)
    return b"".join(pieces)


def _refusal(response: httpcore.Response) -> dict[str, Any]:
    """Return the error fields of an answer without vectors. Its status counts even if its page breaks off."""
    page = bytearray()
    try:
        for piece in response.iter_stream():
            page += piece
            if len(page) > _MOST_ERROR_BYTES:
                break
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
        pass
    code, message = _error_in(bytes(page))
    named = f" {code}" if code else ""
    too_large = "too large" in message.lower()
    return {"trouble": f"answers {response.status}{named}", "code": code, "too_large": too_large}


def _error_in(page: bytes) -> tuple[str, str]:
    """Return an error's code and message in OpenAI's envelope. The message may quote texts, so never show or log it."""
    try:
        error = orjson.loads(page)["error"]
        code, message = error.get("code") or error.get("type") or "", error.get("message")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "", ""
    fit = isinstance(code, str) and len(code) <= 64 and code.replace("_", "").isalnum() and code.isascii()
    return code if fit else "", message if isinstance(message, str) else ""


def key_of(upstream: Upstream) -> str | None:
    """Return an upstream's key, or None if it asks for none.

    Raises:
        GatewayRefused: the key isn't set here.
    """
    if upstream.key_env is None:
        return None
    key = read_key(upstream.key_env)
    if key is None:
        where = f"set {upstream.key_env}, or {upstream.key_env}_FILE to the path of a file that holds it"
        raise GatewayRefused(f"there is no key for {upstream.url}: {where}", Reason.KEY_REFUSED)
    return key
