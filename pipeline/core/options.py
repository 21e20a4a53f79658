"""Job options: the one list for the CLI, the API and SQL, and the form that a job's row keeps."""

import enum
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Self, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator

from pipeline.core import template
from pipeline.core.collections import SyncOptions

#: Type of names, columns and labels. Postgres accepts no NUL in a text.
Word = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern="^[^\0]*$")]
Address = Annotated[str, StringConstraints(min_length=1, max_length=2_000, pattern="^[^\0]*$")]
Template = Annotated[str, StringConstraints(min_length=1, max_length=10_000, pattern="^[^\0]*$")]
#: Columns of every file with vectors; carried columns come after them.
OUR_COLUMNS = ("index", "key", "embedding", "tokens", "truncated")
#: Columns of a file with the vectors of passages, besides.
PASSAGE_COLUMNS = ("passage", "start", "stop")
MOST_COLUMNS = 100
LEAST_PASSAGE_TOKENS = 16
#: Times that a template may repeat a column.
_MOST_TIMES = 2
#: Typeable words for the tab, and for no sign at all.
_SIGNS = {"tab": "\t", "\\t": "\t", "none": ""}

#: Integer types that a key may have, with their size in bits.
INTEGER_BITS = {"smallint": 16, "integer": 32, "bigint": 64}
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}")


Kept = TypeVar("Kept")


class VectorType(enum.StrEnum):
    """Element type of a job's stored vectors; the values are numpy's names of the types."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"

    @property
    def element_bytes(self) -> int:
        """Size of an element in bytes."""
        return {VectorType.FLOAT32: 4, VectorType.FLOAT16: 2}[self]

    @property
    def sql_type(self) -> str:
        """Type of such a vector in Postgres."""
        return {VectorType.FLOAT32: "vector", VectorType.FLOAT16: "halfvec"}[self]

    @property
    def column(self) -> str:
        """Column of `embeddings` that holds such vectors."""
        return {VectorType.FLOAT32: "vector", VectorType.FLOAT16: "half"}[self]


class Precision(enum.StrEnum):
    """Precision in which local models embed a job's texts."""

    #: As each worker is set up.
    AUTO = "auto"
    FLOAT32 = "float32"


class OnLong(enum.StrEnum):
    """Treatment of a text that is longer than the limit."""

    TRUNCATE = "truncate"
    REJECT = "reject"
    SPLIT = "split"


class SplitBy(enum.StrEnum):
    """Largest unit of a text that passages keep whole where it fits; a larger one is split by the next."""

    PARAGRAPH = "paragraph"
    SENTENCE = "sentence"
    TOKEN = "token"  # noqa: S105  # nosec B105 - a unit of text


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Columns that a job reads."""

    text: str = "text"
    #: Templates of the text, instead of one column, and of the title before each passage.
    template: str | None = None
    title: str | None = None
    key: str = "id"
    #: True if a corpus without the key column is refused: the user named it, or another option needs keys.
    key_required: bool = False
    #: Columns that go into the results unchanged.
    carry: tuple[str, ...] = ()
    #: Sign between the fields of CSV and TSV; `None`: the default for the file's name.
    delimiter: str | None = None
    #: Sign around fields of CSV and TSV; empty: no quoting; `None`: the default for the file's name.
    quote: str | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """Values that determine the rows of a corpus, for its fingerprint."""
        dialect, composed = (self.delimiter, self.quote), (self.template, self.title)
        rest = dialect if composed == (None, None) else (*dialect, *composed)
        return (self.text, self.key, self.carry, *(() if set(rest) == {None} else rest))

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """Columns of which texts and titles are made, each as (option that names it, column)."""
        texts = template.parse(self.template).columns if self.template else ()
        titles = template.parse(self.title).columns if self.title else ()
        named = [("text", column) for column in texts] if self.template else [("text_column", self.text)]
        return (*named, *(("title", column) for column in titles if column not in texts))

    @property
    def composed(self) -> tuple[str, ...]:
        """Columns of which templates make texts and titles."""
        return tuple(column for option, column in self.texts if option != "text_column")

    @property
    def required(self) -> tuple[tuple[str, str], ...]:
        """Columns that must exist, each as (option that names it, column)."""
        key = (("key_column", self.key),) if self.key_required else ()
        return (*self.texts, *key, *(("carry", column) for column in self.carry))

    @property
    def names(self) -> tuple[str, ...]:
        """Columns that are read where they exist, each once."""
        return tuple(dict.fromkeys((*(column for _, column in self.texts), self.key, *self.carry)))


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTable:
    """Table of the user's own that also gets each vector, by key. It has been checked already."""

    schema: str
    table: str
    key_column: str
    #: Type of the key: a string, an integer or a uuid.
    key_type: str
    vector_column: str
    #: `vector` or `halfvec`.
    vector_type: str
    #: Its columns for the passage and its characters, where items have several vectors; the first is `passage`.
    passage_columns: tuple[str, ...] = ()

    def key_fault(self, key: str | None) -> str | None:
        """Return the reason why a key can't go into the table, as a reject's message; `None` if it can."""
        if key is None:
            return f"key is missing; {self.schema}.{self.table} needs one"
        if not _fits(key, self.key_type):
            return f"key is no {self.key_type}, as {self.schema}.{self.table} needs"
        return None

    def own_key_fault(self, key: str | None) -> str | None:
        """Return the reason why a key isn't written as the table writes it, so that its row couldn't be told from that
        of another key; `None` if it is."""
        if fault := self.key_fault(key):
            return fault
        assert key is not None
        written = key
        if self.key_type == "uuid":
            written = str(UUID(key))
        elif self.key_type in INTEGER_BITS:
            written = str(int(key))
        if written != key:
            return f'key is written otherwise than "{written}", as {self.schema}.{self.table} writes it'
        return None


def _fits(key: str, kind: str) -> bool:
    """Return True if Postgres can cast a key to a column's type."""
    if kind == "uuid":
        return bool(_UUID.fullmatch(key))
    if bits := INTEGER_BITS.get(kind):
        return bool(_INTEGER.fullmatch(key)) and -(2 ** (bits - 1)) <= int(key) < 2 ** (bits - 1)
    return True


class JobOptions(BaseModel):
    """Options of a job. A field's title is its label on web pages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_column: Word = Field(default="text", description="The column or field that holds the texts.")
    text: Template | None = Field(
        default=None,
        description="A template that makes the texts of several columns, such as `{subject}\\n\\n{body}`.",
    )
    key_column: Word | None = Field(default=None, description="The column that holds your keys. Default: id.")
    carry: list[Word] = Field(default=[], max_length=MOST_COLUMNS, description="Columns to carry into results.")
    quote: str | None = Field(
        default=None, description='Quote character of .csv and .tsv, or `none`. Default: ", and none.'
    )
    delimiter: str | None = Field(
        default=None, description="Delimiter of .csv and .tsv fields, or `tab`. Default: comma, and tab."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=16_000, title="dimensions", description="Size of the vectors."
    )
    dtype: VectorType = Field(
        default=VectorType.FLOAT32, title="kept as", description="Element type of the stored vectors."
    )
    precision: Precision = Field(
        default=Precision.AUTO,
        title="computed in",
        description="Precision of the model: auto, in which GPUs may compute in bfloat16, or float32 on all devices.",
    )
    max_item_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        title="longest text, tokens",
        description="The most tokens of a text to read.",
    )
    on_long: OnLong = Field(
        default=OnLong.TRUNCATE,
        title="longer texts",
        description="Treatment of a longer text: truncate, reject, or split into passages.",
    )
    split: int | None = Field(
        default=None,
        ge=LEAST_PASSAGE_TOKENS,
        le=1_000_000,
        title="passages of, tokens",
        description="Split texts into passages of at most so many tokens, each with a vector of its own.",
    )
    overlap: int = Field(
        default=0,
        ge=0,
        title="overlap, tokens",
        description="Most tokens of a passage that repeat the one before.",
    )
    split_by: SplitBy = Field(
        default=SplitBy.PARAGRAPH,
        title="split by",
        description="The largest unit that stays whole where it fits: paragraph, sentence or token.",
    )
    title: Template | None = Field(
        default=None,
        description="A template of a title that the model reads before each passage; its tokens count.",
    )
    max_rejects: str = Field(
        default="",
        max_length=30,
        title="rejects allowed",
        description="Fail if more items than this are rejected, such as `50` or `2.5%`. "
        "Default: 10 % from 100 items on.",
    )
    unique_keys: bool = Field(
        default=False, title="unique keys", description="Refuse a corpus with a duplicate or missing key."
    )
    by_reference: bool = Field(
        default=False, title="read by workers from the source", description="Workers read the sources themselves."
    )
    output: Address | None = Field(
        default=None,
        title="vectors go to",
        description="An empty folder or URI for Parquet files; the operator must allow it.",
    )
    reuse: bool = Field(
        default=True,
        description="Copy the vector of a text that the workspace has embedded already, instead of embedding it again.",
    )
    webhook: Address | None = Field(
        default=None, description="URL to notify when the job ends; the operator must allow it."
    )
    into: str | None = Field(
        default=None, description="Your own table into which each vector is also upserted, by key."
    )
    hnsw: bool = Field(default=False, title="index on the table", description="Index that table's vectors at the end.")

    @field_validator("delimiter", "quote")
    @classmethod
    def _read_sign(cls, given: str | None) -> str | None:
        sign = _SIGNS.get(given or "", given)
        if sign and (len(sign) > 1 or not sign.isascii() or sign.isalnum() or sign in "\0\r\n"):
            raise ValueError("give one ASCII character, or tab; as quote also none")
        return sign

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, delimiter: str | None, info: ValidationInfo) -> str | None:
        if delimiter == "":
            raise ValueError("give one ASCII character, or tab")
        quote = info.data.get("quote")  # validated already, since it is declared earlier
        if delimiter is not None and delimiter == ('"' if quote is None else quote):
            raise ValueError("it can't be the quote character as well")
        return delimiter

    @field_validator("carry")
    @classmethod
    def _check_carry(cls, carry: list[str]) -> list[str]:
        if twice := next((name for name in carry if carry.count(name) > 1), None):
            raise ValueError(f'"{twice}" is given twice')
        if taken := sorted(set(carry) & set(OUR_COLUMNS)):
            raise ValueError(f'results have a column "{taken[0]}" already')
        return carry

    # Of two options that exclude each other, the one that is declared later is validated with the other at hand.
    @field_validator("text", "title")
    @classmethod
    def _check_template(cls, written: str | None) -> str | None:
        fields = template.parse(written).fields if written is not None else ()
        if len(fields) > MOST_COLUMNS:
            raise ValueError(f"it has more than {MOST_COLUMNS} columns")
        # Or else a short row could become a text of any length.
        if often := next((name for name in fields if fields.count(name) > _MOST_TIMES), None):
            raise ValueError(f'"{often}" stands in it more than {_MOST_TIMES} times')
        return written

    @field_validator("text")
    @classmethod
    def _check_one_text(cls, written: str | None, info: ValidationInfo) -> str | None:
        if written is not None and info.data.get("text_column") != "text":
            raise ValueError("texts come of a template or from text_column; leave one of them out")
        return written

    @field_validator("on_long", "split")
    @classmethod
    def _check_split(cls, given: OnLong | int | None, info: ValidationInfo) -> OnLong | int | None:
        if given in (None, OnLong.TRUNCATE, OnLong.REJECT):
            return given
        if info.data.get("on_long") is OnLong.REJECT:
            raise ValueError("a text that is split is never too long, to be rejected by on_long; leave one of them out")
        if taken := sorted(set(info.data.get("carry", ())) & set(PASSAGE_COLUMNS)):
            raise ValueError(f'passages have a column "{taken[0]}" already, so it can\'t be carried; rename it')
        return given

    @field_validator("overlap", "split_by", "title")
    @classmethod
    def _check_passages(cls, given: int | SplitBy | str | None, info: ValidationInfo) -> int | SplitBy | str | None:
        splits = info.data.get("split") or info.data.get("on_long") is OnLong.SPLIT
        if given not in (None, 0, SplitBy.PARAGRAPH) and not splits:
            raise ValueError("it is for passages; set split too, or leave it out")
        return given

    @property
    def splits(self) -> bool:
        """True if texts are split into passages."""
        return self.split is not None or self.on_long is OnLong.SPLIT

    @property
    def columns(self) -> Columns:
        """Columns to read of each row."""
        return Columns(
            text=self.text_column,
            template=self.text,
            title=self.title,
            key=self.key_column or "id",
            key_required=self.key_column is not None or self.unique_keys or self.into is not None,
            carry=tuple(self.carry),
            delimiter=self.delimiter,
            quote=self.quote,
        )

    def decisive(self) -> dict[str, Any]:
        """Return the options that determine the result, except the columns, which the corpus's fingerprint covers."""
        names = {"dimensions", "dtype", "max_item_tokens", "on_long", "max_rejects", "unique_keys", "by_reference"}
        # A job that was made before there was this option has the same payload as one that leaves it out.
        names |= set() if self.precision is Precision.AUTO else {"precision"}
        names |= {"split", "overlap", "split_by"} if self.splits else set()
        return self.model_dump(mode="json", include=names | {"output", "into", "hnsw"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptOptions:
    """Options as a job's row keeps them, with the values found when the job was made."""

    columns: Columns = Columns()
    #: Longest text in bytes; a longer one is rejected.
    item_bytes: int = 0
    dimensions: int | None = None
    dtype: VectorType = VectorType.FLOAT32
    precision: Precision = Precision.AUTO
    max_item_tokens: int | None = None
    on_long: OnLong = OnLong.TRUNCATE
    #: Most tokens of a passage; `None`: as the model reads.
    split: int | None = None
    overlap: int = 0
    split_by: SplitBy = SplitBy.PARAGRAPH
    max_rejects: str = ""
    unique_keys: bool = False
    #: Workers read the files themselves; Postgres gets no texts.
    by_reference: bool = False
    #: Folder or URI of the Parquet files that vectors go to, instead of Postgres.
    output: str | None = None
    #: Vectors of equal texts are copied. Rows older than this option don't have it.
    reuse: bool = False
    #: URL to notify of the job's end, instead of the workspace's.
    webhook: str | None = None
    table: UserTable | None = None
    #: True if that table gets an HNSW index at the job's end.
    hnsw: bool = False
    #: The job brings a collection up to its source.
    sync: SyncOptions | None = None

    @property
    def splits(self) -> bool:
        """True if texts are split into passages."""
        return self.split is not None or self.on_long is OnLong.SPLIT

    @classmethod
    def of(
        cls,
        chosen: JobOptions,
        columns: Columns,
        item_bytes: int,
        table: UserTable | None,
        sync: SyncOptions | None = None,
    ) -> Self:
        """Return the chosen options in their kept form, for a corpus with these columns; `into` names the `table`."""
        same = {each.name for each in fields(cls)} & JobOptions.model_fields.keys()
        found = {name: getattr(chosen, name) for name in same}
        return cls(**found, columns=columns, item_bytes=item_bytes, table=table, sync=sync)

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON for the job's row."""
        kept = asdict(self)
        kept["into"] = kept.pop("table")
        return kept

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """Return the options from a job's row, also from one that another version has written."""
        found = {each.name: kept[each.name] for each in fields(cls) if each.name in kept}
        if columns := found.pop("columns", None):
            # Rows older than this option have no quote: TSV was read with quotes then.
            found["columns"] = _known(Columns, {"quote": '"', **columns, "carry": tuple(columns.get("carry", ()))})
        if table := kept.get("into"):
            found["table"] = _known(UserTable, {**table, "passage_columns": tuple(table.get("passage_columns", ()))})
        if sync := kept.get("sync"):
            found["sync"] = SyncOptions.from_json(sync)
        for name, kind in (
            ("dtype", VectorType),
            ("precision", Precision),
            ("on_long", OnLong),
            ("split_by", SplitBy),
        ):
            if name in found:
                found[name] = kind(found[name])
        return cls(**found)


def _known(kind: type[Kept], kept: Mapping[str, Any]) -> Kept:
    """Build a `kind` from the kept fields, ignoring those that a newer version has added."""
    return kind(**{each.name: kept[each.name] for each in fields(kind) if each.name in kept})  # type: ignore[arg-type]
