"""Tombstones of forgotten keys: keyed hashes, from which nobody learns the key."""

import hashlib

_DIGEST_BYTES = 16


def digest(secret: bytes, key: str, collection_id: int | None = None) -> bytes:
    """Return the hash of a key that is forgotten in a workspace, or in one of its collections: 16 bytes."""
    scope = "" if collection_id is None else str(collection_id)
    return hashlib.blake2b(f"{scope}\0{key}".encode(), key=secret, digest_size=_DIGEST_BYTES).digest()
