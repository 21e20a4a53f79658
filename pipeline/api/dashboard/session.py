"""Sessions of viewers: the cookie holds the API key itself, so nothing is stored here, and revoking the key ends it."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

from fastapi import Request, Response

from pipeline.api.dependencies import identify
from pipeline.api.gateway.cache import Caller
from pipeline.core.errors import Forbidden, InvalidPayload, PayloadTooLarge

_COOKIE = "vectormill_key"
_MOST_FORM_BYTES = 16 * 1024
_MOST_FIELDS = 20
#: Path on this server: not `//host` or `/\host`, which browsers take for another server's.
_LOCAL = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*")


@dataclass(frozen=True, slots=True)
class Viewer:
    """Viewer of the dashboard's pages."""

    caller: Caller

    @property
    def scope(self) -> int | None:
        """Workspace whose jobs the viewer sees; None, for an admin's key: all."""
        return None if self.caller.admin else self.caller.workspace_id

    def sees(self, workspace_id: int) -> bool:
        """Return True if the viewer may see a workspace's jobs."""
        return self.scope in (None, workspace_id)


async def viewer(request: Request, *, turns: int = 1) -> Viewer:
    """Return the viewer who sends a request, which costs so many turns.

    Raises:
        Unauthorized, InvalidApiKey: the viewer must log in.
        UpstreamUnavailable: the database is away.
    """
    found = Viewer(await holder_of(request, request.cookies.get(_COOKIE, ""), turns=turns))
    # The error page needs it, if something goes wrong afterwards.
    request.state.viewer = found
    return found


async def holder_of(request: Request, key: str, *, turns: int = 1) -> Caller:
    """Return the caller with this key; raises as `viewer` does."""
    return await identify(request, f"Bearer {key}", turns=turns)


def remember(request: Request, response: Response, key: str) -> None:
    """Set the cookie with a key, until the browser is closed and out of scripts' reach."""
    response.set_cookie(_COOKIE, key, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https")


def delete_cookie(request: Request, response: Response) -> None:
    """Delete the cookie with the key."""
    response.delete_cookie(_COOKIE, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https")


def must_be_ours(request: Request) -> None:
    """Check that a form was sent by one of our own pages.

    Raises:
        Forbidden: it wasn't, or no header says so.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        ours = site == "same-origin"
    else:
        # Browsers leave the header out on plain http, unless the server is on loopback.
        origin = urlsplit(request.headers.get("origin", "")).netloc
        ours = bool(origin) and origin == request.headers.get("host")
    if not ours:
        raise Forbidden("This form was sent from another site, so nothing was done. Go back and use the page itself.")


async def form(request: Request) -> dict[str, str]:
    """Return the fields of a form, without white space around them.

    Raises:
        Forbidden: it wasn't sent by a page of ours.
        InvalidPayload: it has too many fields.
        PayloadTooLarge: it is too large.
    """
    must_be_ours(request)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_FORM_BYTES:
            raise too_large(_MOST_FORM_BYTES)
    return {name: value.strip() for name, value in fields_of(bytes(body)).items()}


def fields_of(body: bytes) -> dict[str, str]:
    """Return the fields of a form's body as they were typed.

    Raises:
        InvalidPayload: they are too many.
    """
    try:
        pairs = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise InvalidPayload(f"The form has more than {_MOST_FIELDS} fields; use the page's own.") from None
    # Browsers send the lines of a text with CRLF at their ends.
    return {name: value.replace("\0", "").replace("\r\n", "\n") for name, value in pairs}


def too_large(most_bytes: int) -> PayloadTooLarge:
    """Return the error for a form that is larger than that."""
    return PayloadTooLarge(f"The form is larger than {most_bytes:,} bytes; send less.")


def local(path: str | None) -> str:
    """Return the path to go on to if it is on this server, else that of the first page."""
    return path if path and _LOCAL.fullmatch(path) else "/"


def log_in_path(request: Request) -> str:
    """Return the path of the log-in page, which leads back to the page that was asked for."""
    # As it was sent, since a name within it may be encoded.
    here = request.scope["raw_path"].decode("latin-1") + (f"?{request.url.query}" if request.url.query else "")
    return "/login" if request.method != "GET" or here == "/" else f"/login?next={quote(here, safe='/')}"
