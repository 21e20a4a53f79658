"""Allowlist of webhook addresses, by `VECTORMILL_WEBHOOKS`."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from pipeline.core.errors import UserError

_PORTS = {"http": 80, "https": 443}
#: Percent-encoded dots, slashes and backslashes, which a receiver may decode into another path.
_PACKED = ("%2e", "%2f", "%5c")


def check(url: str, allowed: Sequence[str]) -> None:
    """Refuse an address that isn't below one of `allowed`.

    Raises:
        UserError: it isn't. The message leaves out the path, which may be secret.
    """
    if not is_allowed(url, allowed):
        raise UserError(
            f"{shown(url)} isn't below an address that the operator allows; VECTORMILL_WEBHOOKS lists them.",
            field="webhook",
        )


def is_allowed(url: str, allowed: Sequence[str]) -> bool:
    """Return True if an address has the scheme, host and port of an allowed one, and its path begins with that one's,
    segment by segment."""
    asked = _parts(url)
    if asked is None:
        return False
    known = [parts for parts in map(_parts, allowed) if parts]
    return any(asked[0] == place and asked[1][: len(path)] == path for place, path in known)


def _parts(url: str) -> tuple[tuple[str, str, int], list[str]] | None:
    """Return (scheme, host, port) and the path's segments; None if the address is invalid, or two parsers could read it
    differently."""
    try:
        parts = urlsplit(url)
        port = _PORTS[parts.scheme] if parts.port is None else parts.port
    except (ValueError, KeyError):
        return None
    plain = url.isascii() and url.isprintable() and not set(url) & set(' \\#"<>')
    if not plain or not parts.hostname or "@" in parts.netloc or not port:
        return None
    segments = [segment for segment in parts.path.split("/") if segment]
    if {".", ".."} & set(segments) or any(packed in parts.path.lower() for packed in _PACKED):
        return None
    return (parts.scheme, parts.hostname, port), segments


def shown(url: str) -> str:
    """Return an address without its path, which may hold a token."""
    parts = _parts(url)
    return "it" if parts is None else f"{parts[0][0]}://{parts[0][1]}"
