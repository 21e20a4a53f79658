"""API keys of workspaces: `vm_<id>_<secret>`. The id finds the row; of the secret only the SHA-256 is kept.

A secret is 256 random bits, so a plain hash of it can't be guessed back.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection, RowMapping

from pipeline.core.errors import UserError
from pipeline.db import keys

_FORM = re.compile(r"vm_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that its token is known."""

    id: str
    token: str

    def __repr__(self) -> str:
        return f"NewKey({self.id})"


def create(
    connection: Connection, workspace_id: int, name: str, *, admin: bool = False, lives: timedelta | None = None
) -> NewKey:
    """Make a key that ends after `lives`, or never."""
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    values = {
        "id": key_id,
        "workspace_id": workspace_id,
        "name": name,
        "secret_sha256": _hash(secret),
        "admin": admin,
    }
    keys.add(connection, values, lives)
    return NewKey(key_id, f"vm_{key_id}_{secret}")


def rotate(connection: Connection, workspace_id: int, key_id: str, overlap: timedelta) -> NewKey:
    """Make a key in place of another one, which stays valid for `overlap`. It may do the same, and lives as long as
    the other one was made to.

    Raises:
        UserError: the workspace has no such live key.
    """
    old = keys.expire(connection, workspace_id, key_id, overlap)
    if old is None:
        raise UserError(f'no live key "{key_id}"; vectormill keys list shows them.')
    return create(connection, workspace_id, **old)


def revoke(connection: Connection, workspace_id: int, key_id: str) -> None:
    """End a key now; gateways learn it within two seconds.

    Raises:
        UserError: the workspace has no such key that isn't revoked.
    """
    if not keys.revoke(connection, workspace_id, key_id):
        raise UserError(f'no key "{key_id}" to revoke; vectormill keys list shows them.')


def id_of(token: str) -> str | None:
    """The public part of a token; None if it doesn't look like one of ours."""
    found = _FORM.fullmatch(token)
    return found[1] if found else None


def matches(row: RowMapping, token: str) -> bool:
    """Whether a token is the key of this row; takes the same time whatever differs."""
    secret = token.split("_", 2)[-1]
    return secrets.compare_digest(bytes(row["secret_sha256"]), _hash(secret))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
