"""Reuse of vectors: each text of a workspace and vector space is embedded once, and copied to all items that have it.

Within a block one item of each text is embedded. Between blocks, chunks and jobs, the table `known_texts` says which
item is the first. A text that another running chunk embeds is left for the end, and then to the chunk's next claim:
that finds its vector, or that nobody makes it any more. No chunk waits with texts of its own in hand, so none can wait
for each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, Engine, text

from pipeline.chunk_io.commit import Commit, while_database_is_away
from pipeline.core.chunks import Claim, Item
from pipeline.core.text_identity import TextIdentity
from pipeline.db import embeddings, known_texts
from pipeline.db.embeddings import NO_ROWS
from pipeline.db.known_texts import KnownText

#: Vectors that are read from Postgres at once.
_PAGE = 10_000
#: Time for which a claim of texts waits for another one of the same texts, whose worker may be frozen.
_LOCK_TIMEOUT = text("set local lock_timeout = '10s'")


@dataclass(slots=True)
class SortedItems:
    """Items of a block, by what becomes of them."""

    #: To be embedded.
    items: list[Item] = field(default_factory=list)
    #: Others with the same text, by the index of the one that is embedded.
    followers: dict[int, list[Item]] = field(default_factory=dict)
    #: Texts whose vector is in Postgres, each with the items that get it.
    known: list[tuple[KnownText, list[Item]]] = field(default_factory=list)
    #: Items whose texts another running chunk embeds, or an earlier block of this one.
    deferred: list[Item] = field(default_factory=list)

    def embed(self, group: Sequence[Item], first: Item | None = None) -> None:
        """Add items of equal text, of which `first` is embedded."""
        first = first or group[0]
        self.items.append(first)
        if len(group) > 1:
            self.followers[first.index] = [item for item in group if item is not first]


def sort_out(engine: Engine, claim: Claim, items: Sequence[Item]) -> SortedItems:
    """Return which items of a block are to be embedded, and where the others' vectors come from."""
    # In a search for an item that kills, each is seen alone, and none moves ahead of it because another chunk let go of
    # its text. A single loss is rarely a text's fault.
    if not claim.options.reuse or claim.isolation > 1:
        return SortedItems(items=list(items))
    identity, groups = TextIdentity(claim.options), dict[bytes, list[Item]]()
    for item in items:
        groups.setdefault(identity.of(item.title.encode(), item.text.encode()), []).append(item)
    found = SortedItems()
    # Vectors in files are found by nobody, so such a job is never the first.
    in_postgres = claim.options.output is None
    for attempt in while_database_is_away("reuse_retried"):
        with attempt, engine.begin() as connection:
            connection.execute(_LOCK_TIMEOUT)
            known, taken, confirmed = _known(connection, claim, groups, in_postgres=in_postgres)
    for hashed, group in groups.items():
        before = known.get(hashed)
        if before is None or hashed in taken:
            found.embed(group)
        elif before.is_embedded:
            found.known.append((before, group))
        elif hashed in confirmed:
            found.embed(group, _item_of(claim, before, group))
        elif in_postgres:
            found.deferred += group
        else:
            found.embed(group)
    found.items.sort(key=lambda item: item.index)
    return found


def _known(
    connection: Connection, claim: Claim, groups: Mapping[bytes, Sequence[Item]], *, in_postgres: bool
) -> tuple[dict[bytes, KnownText], set[bytes], set[bytes]]:
    """Return what is known of texts that had been claimed before; those of them that are taken over from others; and
    those that this chunk had first in an earlier claim. The rest is this claim's, if its vectors go to Postgres."""
    firsts = [group[0].index for group in groups.values()]
    new = known_texts.claim(connection, claim, list(groups), firsts) if in_postgres else set[bytes]()
    others = [each for each in groups if each not in new]
    known = {each.hash: each for each in known_texts.look_up(connection, claim, others)} if others else {}
    own = [each for each in known.values() if not each.is_embedded and _item_of(claim, each, groups[each.hash])]
    confirmed = known_texts.confirm(connection, claim, own) if own else set[bytes]()
    left = [
        each
        for each in known.values()
        if in_postgres and not (each.is_embedded or each.is_under_way or each.hash in confirmed)
    ]
    heirs = [groups[each.hash][0].index for each in left]
    return known, known_texts.take_over(connection, claim, left, heirs) if left else set[bytes](), confirmed


def _item_of(claim: Claim, known: KnownText, group: Sequence[Item]) -> Item | None:
    """Return the item that this job made the first of its text, in an earlier claim; None if it is another chunk's."""
    return next((item for item in group if known.job_id == claim.job_id and known.index == item.index), None)


def known_vectors(engine: Engine, claim: Claim, found: SortedItems) -> Iterator[Commit]:
    """Yield commits with copies of the vectors that are in Postgres. Items whose vector is gone are deferred."""
    for start in range(0, len(found.known), _PAGE):
        part = found.known[start : start + _PAGE]
        places = [(each.job_id, each.index) for each, _ in part]
        for attempt in while_database_is_away("reuse_retried"):
            with attempt, engine.begin() as connection:
                rows = embeddings.of_items(connection, places, passages=claim.options.splits)
        there = set(rows.indexes.tolist())
        found.deferred += [item for at, (_, items) in enumerate(part) if at not in there for item in items]
        if there:
            copies = rows.copied({at: part[at][1] for at in there}, carried=claim.carries)
            yield Commit(rows=NO_ROWS, copies=copies)


def with_followers(commit: Commit, followers: Mapping[int, Sequence[Item]], claim: Claim) -> Commit:
    """Return a commit in which items of equal text have the same vector, or the same reject."""
    if not followers:
        return commit
    rejects = [
        replace(reject, index=item.index, key=item.key)
        for reject in commit.rejects
        for item in followers.get(reject.index, ())
    ]
    copies = commit.rows.copied(followers, carried=claim.carries)
    return replace(commit, copies=copies, rejects=[*commit.rejects, *rejects])
