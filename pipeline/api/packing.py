"""Decompression of request bodies by their content coding, and the check of their charset."""

import asyncio
import gzip
import zlib
from collections.abc import Callable
from io import BytesIO

import zstandard
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.errors import InvalidPayload, PayloadTooLarge, UnsupportedMediaType

#: Window that every decoder should support, by RFC 8878.
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024
_UTF_8 = frozenset({"", "utf-8", "utf8", "us-ascii", "ascii"})


def _gunzip(packed: bytes, most: int) -> bytes:
    with gzip.open(BytesIO(packed)) as file:
        return file.read(most)


def _inflate(packed: bytes, most: int) -> bytes:
    # Some clients send raw deflate, without the zlib header that the coding requires.
    has_header = len(packed) > 1 and packed[0] & 0x0F == zlib.DEFLATED and not (packed[0] << 8 | packed[1]) % 31
    reader = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
    body = reader.decompress(packed, most)
    if len(body) < most and not reader.eof:
        raise EOFError
    return body


def _unzstd(packed: bytes, most: int) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).stream_reader(
        packed, read_across_frames=True
    )
    return reader.read(most)


#: Content coding → decompressor, which returns at most so many bytes.
_CODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _inflate,
    "zstd": _unzstd,
}
_ACCEPTED = "gzip, deflate, zstd"


class Unpacked:
    """Middleware that decompresses a body when it is first read.

    Unknown codings, and charsets other than UTF-8, are refused then. Readers see the body as if it had been sent
    uncompressed. The compressed size must be bounded already, by middleware outside this one.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        coding = headers.get("content-encoding", "").strip().lower()
        refusal = _refusal(coding, headers.get("content-type", ""))
        is_read = False

        async def receiving() -> Message:
            nonlocal is_read
            if refusal:
                raise refusal
            if is_read or coding not in _CODINGS:
                return await receive()
            packed = bytearray()
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                packed += message.get("body", b"")
                if not message.get("more_body"):
                    break
            is_read = True
            body = await asyncio.to_thread(_unpack, coding, bytes(packed), self._most_bytes)
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receiving, send)


def _refusal(coding: str, content_type: str) -> UnsupportedMediaType | None:
    kind, _, parameters = content_type.lower().partition(";")
    is_form = kind.strip() == "multipart/form-data"
    if coding not in ("", "identity") and (is_form or coding not in _CODINGS):
        told = "A form can't be compressed; the file in it may be." if is_form else f"It may be one of {_ACCEPTED}."
        error = UnsupportedMediaType(f'The content encoding "{coding[:40]}" isn\'t supported. {told}')
        error.headers["accept-encoding"] = "identity" if is_form else _ACCEPTED
        return error
    charset = next((each.partition("=")[2] for each in parameters.split(";") if each.strip().startswith("charset")), "")
    if not is_form and (named := charset.strip().strip('"')) not in _UTF_8:
        return UnsupportedMediaType(f'The body\'s charset is "{named[:40]}"; send UTF-8.')
    return None


def _unpack(coding: str, packed: bytes, most_bytes: int) -> bytes:
    try:
        body = _CODINGS[coding](packed, most_bytes + 1)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InvalidPayload(f"The body isn't the {coding} that its content-encoding says.") from error
    if len(body) > most_bytes:
        raise PayloadTooLarge(f"The decompressed body is larger than {most_bytes:,} bytes; send less in a request.")
    return body
