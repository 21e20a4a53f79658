"""Changes between a source and a collection: of all rows that a sync reads, only those that differ are staged.

A row's identity is the hash of what the model reads, then that of its carried columns. Which keys the source has named
is kept as bits, one for each slot of the collection, so memory stays small whatever the corpus.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from pipeline.core import exact_json
from pipeline.core.chunks import RejectCode
from pipeline.core.collections import OnDuplicateKey, SyncCounts, SyncOptions, carried_hash
from pipeline.core.options import KeptOptions
from pipeline.core.text_identity import TextIdentity
from pipeline.db import collection_keys, syncs
from pipeline.db.collection_keys import OTHER_COLUMNS, OTHER_TEXT, SAME, Numbers
from pipeline.db.syncs import PAGE_SLOTS
from pipeline.sources import Rows

#: Identity of a row whose key goes.
_GOES = b""
#: Values of the column that says which keys go.
_TRUE, _FALSE = (True, 1, "true", "1"), (None, False, 0, "false", "0", "")

_Mask = npt.NDArray[np.bool_]


class SlotSet:
    """Set of slots, as bits of pages that are made when they are needed: the lowest slot is the lowest bit."""

    def __init__(self) -> None:
        self._pages: dict[int, npt.NDArray[np.uint8]] = {}

    def contains(self, slots: Numbers) -> _Mask:
        """Return for each slot if it is in the set."""
        found = np.zeros(len(slots), np.bool_)
        for page, at in _by_page(slots):
            if page in self._pages:
                place, bit = _bits(slots[at])
                found[at] = self._pages[page][place] & bit != 0
        return found

    def add(self, slots: Numbers) -> None:
        """Add slots to the set."""
        for page, at in _by_page(slots):
            if page not in self._pages:
                self._pages[page] = np.zeros(PAGE_SLOTS // 8, np.uint8)
            place, bit = _bits(slots[at])
            np.bitwise_or.at(self._pages[page], place, bit)

    def discard(self, slots: Numbers) -> None:
        """Discard slots of the set."""
        for page, at in _by_page(slots):
            place, bit = _bits(slots[at])
            np.bitwise_and.at(self._pages[page], place, ~bit)

    def __len__(self) -> int:
        return sum(int(np.bitwise_count(page).sum()) for page in self._pages.values())

    def pages(self) -> dict[int, bytes]:
        """Return the bits of each page."""
        return {page: bits.tobytes() for page, bits in self._pages.items()}


def _bits(slots: Numbers) -> tuple[Numbers, npt.NDArray[np.uint8]]:
    """Return the byte and the bit of each slot in its page."""
    return slots % PAGE_SLOTS // 8, np.left_shift(1, slots % 8).astype(np.uint8)


def _by_page(slots: Numbers) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each page of these slots, with their positions."""
    pages = slots // PAGE_SLOTS
    order = np.argsort(pages, kind="stable")
    found, starts = np.unique(pages[order], return_index=True)
    for page, start, stop in zip(found.tolist(), starts.tolist(), [*starts.tolist()[1:], len(order)], strict=False):
        yield page, order[start:stop]


@dataclass(frozen=True, slots=True)
class ChangedRows(Rows):
    """Rows to be staged: new or changed ones, rejects, and, with an empty identity, rows whose key goes."""

    identities: list[bytes | None] = field(default_factory=list)
    #: Positions of these rows among the `compared` ones.
    places: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    compared: int = 0

    def blank(self, at: int) -> None:
        """Empty a row, its identity too."""
        Rows.blank(self, at)
        self.identities[at] = None


@dataclass(frozen=True, slots=True)
class _Compared:
    """Those of some rows whose keys the collection has: shape (known,) each."""

    rows: ChangedRows
    #: Their positions in `rows`.
    places: Numbers
    slots: Numbers
    tokens: Numbers
    relations: Numbers


class Changes:
    """Comparison of all rows of a sync, in order, with the collection's keys."""

    def __init__(self, sync: SyncOptions, options: KeptOptions) -> None:
        self._sync = sync
        self._identity = TextIdentity(options)
        #: Columns are carried beside the one that says which keys go.
        self._carries = any(column != sync.removed_column for column in options.columns.carry)
        #: Keys of the collection that were named, and those of them whose row is the same so far.
        self._seen, self._unchanged = SlotSet(), SlotSet()
        #: Rows read, unchanged rows, those of them with other columns, and rows that another one replaces.
        self.rows = self._same = self._updated = self.repeated = self._tokens = 0

    @property
    def counts(self) -> SyncCounts:
        """Counts of the rows that aren't staged."""
        return SyncCounts(
            unchanged=self._same, updated=self._updated, repeated=self.repeated, tokens_saved=self._tokens
        )

    @property
    def named(self) -> int:
        """Number of the collection's keys that the source has named."""
        return len(self._seen)

    def seen_pages(self) -> dict[int, bytes]:
        """Return the collection's keys that the source has named, as `db.syncs.save_seen` takes them."""
        return self._seen.pages()

    def of(self, connection: Connection, job_id: UUID, rows: ChangedRows) -> ChangedRows:
        """Return those of rows that `identified` has made that are to be staged. New columns of unchanged texts are
        saved."""
        self.rows += len(rows.keys)
        found = self._compare(connection, rows)
        first = self._first_of_each(found.slots) & ~self._seen.contains(found.slots)
        kept = first & (found.relations != OTHER_TEXT)
        staged = np.ones(len(rows.keys), np.bool_)
        staged[found.places[kept]] = False
        self._keep(connection, job_id, found, kept)
        self._settle_again(connection, job_id, found, ~first, staged)
        self._seen.add(found.slots)
        return _picked(rows, staged)

    def _compare(self, connection: Connection, rows: ChangedRows) -> _Compared:
        asked = [at for at, key in enumerate(rows.keys) if key is not None]
        known = collection_keys.compare(
            connection,
            self._sync.version_id,
            [rows.keys[at] or "" for at in asked],
            [rows.identities[at] or _GOES for at in asked],
        )
        places = np.array(asked, np.int64)[known.at] if len(known.at) else known.at
        # Rejects and rows whose key goes have no text.
        differs = np.array([rows.texts[at] is None for at in places.tolist()], np.bool_)
        return _Compared(rows, places, known.slots, known.tokens, np.where(differs, OTHER_TEXT, known.relations))

    @staticmethod
    def _first_of_each(slots: Numbers) -> _Mask:
        first = np.zeros(len(slots), np.bool_)
        first[np.unique(slots, return_index=True)[1]] = True
        return first

    def _keep(self, connection: Connection, job_id: UUID, found: _Compared, kept: _Mask) -> None:
        """Count unchanged rows, and save their columns where these differ."""
        self._unchanged.add(found.slots[kept])
        self._same += int(kept.sum())
        self._tokens += int(found.tokens[kept].sum())
        updated = kept & (found.relations == OTHER_COLUMNS)
        if updated.any():
            self._updated += int(updated.sum())
            at = found.places[updated].tolist()
            syncs.save_columns(
                connection,
                job_id,
                found.slots[updated].tolist(),
                [found.rows.identities[each] or _GOES for each in at],
                [found.rows.carried[each] if found.rows.carried else b"null" for each in at],
            )

    def _settle_again(
        self, connection: Connection, job_id: UUID, found: _Compared, again: _Mask, staged: _Mask
    ) -> None:
        """Settle rows whose key the source has named before, where the collection has that key."""
        if not again.any():
            return
        if self._sync.on_duplicate_key is OnDuplicateKey.LAST:
            # While all rows of a key say what the collection has, there is nothing to do.
            idle = again & (found.relations == SAME) & self._unchanged.contains(found.slots)
            idle &= ~np.isin(found.slots, found.slots[again & ~idle])
            staged[found.places[idle]] = False
            self.repeated += int(idle.sum())
            if self._updated and idle.any():
                self._updated -= syncs.drop_columns(connection, job_id, found.slots[idle].tolist())
            # Any other row is staged, whatever it says: an earlier one may be staged too.
            again &= ~idle
            slots, where = np.unique(found.slots[again], return_index=True)
            was_same = self._unchanged.contains(slots)
            self._unchanged.discard(slots[was_same])
            self._same -= int(was_same.sum())
            self.repeated += int(was_same.sum())
            self._tokens -= int(found.tokens[again][where][was_same].sum())
            if self._updated:
                self._updated -= syncs.drop_columns(connection, job_id, slots.tolist())
        elif self._sync.on_duplicate_key is OnDuplicateKey.FIRST:
            staged[found.places[again]] = False
            self.repeated += int(again.sum())
        else:
            doubles = {}
            for at in found.places[again].tolist():
                if found.rows.identities[at] == _GOES:
                    staged[at] = False
                    self.repeated += 1
                else:
                    found.rows.texts[at] = found.rows.identities[at] = None
                    doubles[at] = (at, RejectCode.DUPLICATE_KEY, "an earlier row has the same key")
            kept = [problem for problem in found.rows.problems if problem[0] not in doubles]
            found.rows.problems[:] = sorted([*kept, *doubles.values()], key=lambda problem: problem[0])

    def identified(self, block: Rows) -> ChangedRows:
        """Return rows with their identities. A row without a key becomes a reject, one whose key goes has no text."""
        texts, problems = list(block.texts), list(block.problems)
        carried, titles = block.carried, block.titles
        goes: Sequence[bool] = ()
        if column := self._sync.removed_column:
            goes, carried = self._read_removed(column, block, texts, problems, carries=self._carries)
        identities: list[bytes | None] = []
        no_columns = carried_hash(b"")
        for at, text in enumerate(texts):
            if goes and goes[at] and block.keys[at] is not None:
                texts[at] = None
                identities.append(_GOES)
            elif text is not None and block.keys[at] is None:
                texts[at] = None
                problems.append((at, RejectCode.BAD_KEY, "key is missing; a collection needs one"))
                identities.append(None)
            elif text is None:
                identities.append(None)
            else:
                of_columns = carried_hash(carried[at]) if carried else no_columns
                identities.append(self._identity.of(titles[at] if titles else b"", text) + of_columns)
        problems = [each for each in problems if identities[each[0]] != _GOES]
        problems.sort(key=lambda problem: problem[0])
        return ChangedRows(block.keys, texts, problems, carried, titles, identities)

    @staticmethod
    def _read_removed(
        column: str,
        block: Rows,
        texts: list[bytes | None],
        problems: list[tuple[int, RejectCode, str]],
        *,
        carries: bool,
    ) -> tuple[list[bool], list[bytes] | None]:
        """Return which rows' keys go, and the carried columns without the one that says so."""
        assert block.carried is not None
        goes, carried = [], []
        for at, row in enumerate(block.carried):
            columns = exact_json.loads(row)
            value = columns.pop(column, None)
            word = value.strip().lower() if isinstance(value, str) else value
            goes.append(word in _TRUE)
            carried.append(exact_json.dumps(columns))
            if word not in (*_TRUE, *_FALSE) and texts[at] is not None:
                texts[at] = None
                message = f'column "{column}" is neither true nor false'
                problems.append((at, RejectCode.BAD_ROW, message))
        return goes, carried if carries else None


def joined(blocks: Sequence[ChangedRows]) -> ChangedRows:
    """Return all rows of blocks of one corpus."""
    starts = np.cumsum([0, *(len(block.keys) for block in blocks)]).tolist()
    problems = [
        (start + at, code, message)
        for start, block in zip(starts, blocks, strict=False)
        for at, code, message in block.problems
    ]
    carried, titles = blocks[0].carried, blocks[0].titles
    return ChangedRows(
        [key for block in blocks for key in block.keys],
        [text for block in blocks for text in block.texts],
        problems,
        None if carried is None else [row for block in blocks for row in block.carried or ()],
        None if titles is None else [title for block in blocks for title in block.titles or ()],
        [identity for block in blocks for identity in block.identities],
    )


def _picked(rows: ChangedRows, staged: _Mask) -> ChangedRows:
    """Return the rows where `staged` is true."""
    if staged.all():
        return replace(rows, places=np.arange(len(staged)), compared=len(staged))
    at = np.flatnonzero(staged).tolist()
    place = {old: new for new, old in enumerate(at)}
    return ChangedRows(
        [rows.keys[each] for each in at],
        [rows.texts[each] for each in at],
        [(place[each], code, message) for each, code, message in rows.problems if each in place],
        [rows.carried[each] for each in at] if rows.carried is not None else None,
        [rows.titles[each] for each in at] if rows.titles is not None else None,
        [rows.identities[each] for each in at],
        np.array(at, np.int64),
        len(staged),
    )
