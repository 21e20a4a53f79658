"""A table of support tickets that changes every night, and an oracle of the collection that follows it.

The oracle shares no code with the product: it counts by sets of texts, and embeds by the library.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
from sqlalchemy import Engine, text

Row = dict[str, Any]

_WORDS = ("mill", "sack", "grain", "wheel", "river", "flour", "stone", "sail", "late", "refund", "broken", "lost")


@dataclass
class Tickets:
    """The table, and what is known of its past."""

    rows: dict[str, Row]
    random: random.Random
    #: Texts that were ever embedded: each is embedded once.
    embedded: set[str] = field(default_factory=set)
    #: What the collection had after the last night: text and language by key.
    before: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: Keys that had another text before.
    changed: set[str] = field(default_factory=set)

    @property
    def _some(self) -> list[str]:
        """Some of the keys, since to list all for each new row would take too long."""
        return list(islice(self.rows, 50))

    @classmethod
    def new(cls, seed: int, count: int) -> "Tickets":
        """Return a table of which a quarter repeats another text, and some have no text at all."""
        made = cls({}, random.Random(seed))
        for number in range(count):
            made._add(f"t{number}")
        return made

    def _add(self, key: str) -> None:
        chance = self.random.random()
        if self.rows and chance < 0.25:
            other = self.rows[self.random.choice(self._some)]
            subject, body = other["subject"], other["body"]
        else:
            subject = " ".join(self.random.choices(_WORDS, k=3))
            body = f"<p>{' '.join(self.random.choices(_WORDS, k=12))} {key}</p>"
        if chance > 0.995:
            subject = body = None
        elif chance > 0.98:
            body = None
        self.rows[key] = {"id": key, "subject": subject, "body": body, "lang": self.random.choice(("en", "de", None))}

    def change(self, night: int) -> None:
        """Change 1 % of the rows, remove 0.5 %, add 0.5 %, and give 0.5 % another language only."""
        few, half = max(1, len(self.rows) // 100), max(1, len(self.rows) // 200)
        for key in self.random.sample(sorted(self.rows), few):
            self.changed.add(key)
            self.rows[key]["body"] = f"{' '.join(self.random.choices(_WORDS, k=12))}, night {night} of {key}"
        for key in self.random.sample(sorted(self.rows), half):
            del self.rows[key]
        for key in self.random.sample(sorted(self.rows), half):
            self.rows[key]["lang"] = "fr"
        for number in range(half):
            self._add(f"n{night}-{number}")

    def forget(self) -> str:
        """Take out a key, as one that is forgotten, of which no text is another one's. Return it."""
        given = Counter(text for text, _ in self.before.values())
        alone = {key for key, (text, _) in self.before.items() if given[text] == 1}
        key = self.random.choice(sorted(alone - self.changed))
        text, _ = self.before.pop(key)
        self.embedded.discard(text)
        self.rows.pop(key, None)
        return key

    def text(self, row: Row) -> str | None:
        """Return what the model reads of a row; None if there is nothing."""
        if row["subject"] is None and row["body"] is None:
            return None
        return f"{row['subject'] or ''}\n\n{row['body'] or ''}"

    def expected(self) -> dict[str, int]:
        """Return the counts of a whole sync of the table as it is now, and take it for the state after it."""
        texts = {key: self.text(row) for key, row in self.rows.items()}
        good = {key: given for key, given in texts.items() if given is not None}
        unchanged = {key for key, given in good.items() if key in self.before and self.before[key][0] == given}
        changed = [given for key, given in good.items() if key not in unchanged]
        fresh = set(changed) - self.embedded
        removed = len(self.before.keys() - good.keys())
        self.embedded |= fresh
        self.before = {key: (given, str(self.rows[key]["lang"])) for key, given in good.items()}
        return {
            "in": len(texts),
            "embedded": len(fresh),
            "reused": len(changed) - len(fresh),
            "unchanged": len(unchanged),
            "rejected": len(texts) - len(good),
            "cancelled": 0,
            "removed": removed,
        }

    def write(self, path: Path) -> Path:
        """Write the table as JSON lines, or as Parquet of many row groups."""
        if path.suffix == ".parquet":
            columns = pa.schema([(name, pa.string()) for name in ("id", "subject", "body", "lang")])
            pq.write_table(pa.Table.from_pylist(list(self.rows.values()), columns), path, row_group_size=1_000)
            return path
        with path.open("w") as file:
            for row in self.rows.values():
                file.write(json.dumps(row) + "\n")
        return path

    def load(self, engine: Engine) -> None:
        """Bring the table of the warehouse up to date."""
        with engine.begin() as connection:
            connection.execute(
                text("create table if not exists public.shop (id text, subject text, body text, lang text)")
            )
            connection.execute(text("truncate public.shop"))
            insert = text("insert into public.shop values (:id, :subject, :body, :lang)")
            connection.execute(insert, list(self.rows.values()))


def differences(tickets: Tickets, engine: Engine, library: SentenceTransformer, view: str) -> Iterator[str]:
    """Yield how the collection's view differs from a fresh embedding of the whole table."""
    return _differences(tickets, dict(_read(engine, view)), library)


def file_differences(tickets: Tickets, folder: Path, library: SentenceTransformer) -> Iterator[str]:
    """Yield how a version's Parquet files differ from a fresh embedding of the whole table."""
    rows = duckdb.sql(f"""
        select key, lang, embedding from read_parquet('{folder}/*.parquet')
        qualify _version = max(_version) over (partition by key) and not _deleted
    """).fetchall()
    seen = {key: (lang, np.array(vector, np.float32)) for key, lang, vector in rows}
    if len(seen) < len(rows):
        yield "keys are there twice"
    yield from _differences(tickets, seen, library)


def _differences(
    tickets: Tickets, seen: dict[str, tuple[Any, npt.NDArray[np.float32]]], library: SentenceTransformer
) -> Iterator[str]:
    wanted = tickets.before
    if missing := wanted.keys() - seen.keys():
        yield f"{len(missing):,} keys are missing, such as {min(missing)}"
    if strays := seen.keys() - wanted.keys():
        yield f"{len(strays):,} keys shouldn't be there, such as {min(strays)}"
    both = sorted(wanted.keys() & seen.keys())
    texts = sorted({wanted[key][0] for key in both})
    places = {given: at for at, given in enumerate(texts)}
    vectors = library.encode(texts, batch_size=512, show_progress_bar=False) if texts else np.zeros((0, 1))
    fresh = np.array([vectors[places[wanted[key][0]]] for key in both])
    found = np.array([seen[key][1] for key in both])
    if both and (far := np.flatnonzero(np.abs(fresh - found).max(axis=1) > 1e-4)).size:
        yield f"{far.size:,} vectors aren't those of the texts, such as that of {both[far[0]]}"
    if wrong := [key for key in both if str(seen[key][0]) != wanted[key][1]]:
        yield f"{len(wrong):,} languages are old, such as that of {wrong[0]}"


def _read(engine: Engine, view: str) -> Iterator[tuple[str, tuple[Any, npt.NDArray[np.float32]]]]:
    with engine.connect() as connection:
        rows = connection.execution_options(yield_per=5_000).execute(
            text(f"select key, lang, vector::text from {view}")
        )
        for key, language, vector in rows:
            yield key, (language, np.fromstring(vector[1:-1], np.float32, sep=","))
