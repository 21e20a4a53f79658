"""Collections and syncs: their options, and the identity of a row."""

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

#: Bytes of each of the two hashes in an identity.
HASH_BYTES = 16


class VersionState(enum.StrEnum):
    """State of a collection's version. Syncs go to all but those that are gone."""

    #: The one that readers see.
    CURRENT = "current"
    #: It is being filled beside the current one.
    NEXT = "next"
    #: Readers saw it before, and may go back to it for some time.
    PREVIOUS = "previous"
    #: It waits for its tables to be dropped.
    GONE = "gone"


class OnDuplicateKey(enum.StrEnum):
    """Row of a sync that counts, of several with the same key."""

    LAST = "last"
    FIRST = "first"
    #: The first; the others are rejected.
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """Options of a sync, as its job's row keeps them."""

    version_id: int
    #: The source names all keys that there are; False: only those that changed.
    whole: bool = True
    #: Keys that a whole sync may remove, as `N`, `P%` or "" for the default.
    max_removed: str = ""
    #: A key whose row is rejected keeps its old vectors.
    keep_rejected: bool = False
    #: Readers see nothing of the sync before its end.
    atomic: bool = False
    on_duplicate_key: OnDuplicateKey = OnDuplicateKey.LAST
    #: Column that is true in rows whose key goes.
    removed_column: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON for the job's row."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """Return the options from a job's row, also from one that a newer version has written."""
        found = {each.name: kept[each.name] for each in fields(cls) if each.name in kept}
        return cls(**{**found, "on_duplicate_key": OnDuplicateKey(found.get("on_duplicate_key", OnDuplicateKey.LAST))})


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncCounts:
    """Counts of a sync beyond those of its chunks."""

    #: Rows whose text the collection had already, and those of them with other carried columns.
    unchanged: int = 0
    updated: int = 0
    #: Rows that another row of the same key replaces.
    repeated: int = 0
    #: Tokens of the unchanged texts.
    tokens_saved: int = 0
    #: Keys that it removed, added and changed; known at its end.
    removed: int = 0
    added: int = 0
    changed: int = 0


NO_SYNC = SyncCounts()


def carried_hash(carried: bytes) -> bytes:
    """Return the hash of a row's carried columns, given as JSON: 16 bytes."""
    return hashlib.blake2b(carried, digest_size=HASH_BYTES).digest()
