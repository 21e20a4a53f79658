"""API keys of workspaces: `vm_<id>_<secret>`. The id finds the row; only the secret's SHA-256 is stored.

A secret is 256 random bits, so it can't be guessed from a plain hash.
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
    """Key that was just created, the only moment at which its token is known."""

    id: str
    token: str

    def __repr__(self) -> str:
        return f"NewKey({self.id})"


def create(
    connection: Connection, workspace_id: int, name: str, *, admin: bool = False, lives: timedelta | None = None
) -> NewKey:
    """Create a key that expires after `lives`, or never."""
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
    """Create a key in place of another one, which stays valid for `overlap`. The new key keeps the old key's rights and
    lifetime.

    Raises:
        UserError: the workspace has no such live key.
    """
    old = keys.expire(connection, workspace_id, key_id, overlap)
    if old is None:
        raise UserError(f'no live key "{key_id}"; vectormill keys list shows them.')
    return create(connection, workspace_id, **old)


def revoke(connection: Connection, workspace_id: int, key_id: str) -> None:
    """Revoke a key. It stops working within two seconds, when gateways have learnt of it.

    Raises:
        UserError: the workspace has no such key that isn't revoked.
    """
    if not keys.revoke(connection, workspace_id, key_id):
        raise UserError(f'no key "{key_id}" to revoke; vectormill keys list shows them.')


def id_of(token: str) -> str | None:
    """Return the public id in a token; None if it doesn't look like one of ours."""
    found = _FORM.fullmatch(token)
    return found[1] if found else None


def matches(row: RowMapping, token: str) -> bool:
    """Return True if a token is the key of this row. The comparison takes constant time."""
    secret = token.split("_", 2)[-1]
    return secrets.compare_digest(bytes(row["secret_sha256"]), _hash(secret))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
