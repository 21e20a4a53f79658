"""Tables of the Postgres schema `vectormill`. Column names are a contract for readers of the database.

`items`, `embeddings`, `passages` and `rejects` are range-partitioned by job id, a UUIDv7, one partition a month. They
have no foreign keys, so that dropping their partitions is enough to delete a month.
"""

from collections.abc import Iterator
from enum import StrEnum

from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.schema import SchemaItem

from pipeline.core.chunks import ChunkState
from pipeline.core.jobs import JobState
from pipeline.core.requests import BatchState, EventState, RequestState

SCHEMA = "vectormill"

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    },
)

#: Tables with monthly partitions, made by `pipeline.db.partitions`.
PARTITIONED = ("items", "embeddings", "passages", "rejects")
_BY_JOB = "RANGE (job_id)"


def _moment(name: str, *, now: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=not now, server_default=func.now() if now else None)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default="0")


def _state(states: type[StrEnum]) -> CheckConstraint:
    return CheckConstraint("state in ({})".format(", ".join(f"'{state}'" for state in states)), name="state")


workspaces = Table(
    "workspaces",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", Double, nullable=False, server_default="1"),
    # Limits on its use of the gateway; NULL: no limit.
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("monthly_tokens", BigInteger),
    Column("monthly_cost", Numeric),
    # URL of the webhook notified when its jobs end, unless a job names another.
    Column("webhook", Text),
    # Postgres roles that may submit jobs in SQL. Empty: in `default` any that may execute the function, else none.
    Column("sql_roles", ARRAY(Text), nullable=False, server_default="{}"),
    # Secret with which tombstones are hashed.
    Column(
        "tombstone_key",
        LargeBinary,
        nullable=False,
        server_default=text("uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())"),
    ),
    _moment("created_at", now=True),
    CheckConstraint("weight > 0", name="weight"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("admin", Boolean, nullable=False, server_default=text("false")),
    # Lifetime from creation, as it was asked for; NULL: no expiry. A rotated key expires sooner.
    Column("lives", Interval),
    _moment("created_at", now=True),
    _moment("expires_at"),
    _moment("revoked_at"),
)

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("slug", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("aliases", ARRAY(Text), nullable=False, server_default="{}"),
    Column("path", Text),
    Column("hub_id", Text),
    Column("revision", Text),
    # Pooling of a bare transformer's token vectors; NULL: as the model's folder says.
    Column("pooling", Text),
    Column("gateway_url", Text),
    Column("upstream_model", Text),
    # Variable that holds the upstream's key, or with _FILE after it the path of a file; never the key itself.
    Column("key_env", Text),
    # Name of the model in the upstream's replies, where that is another name.
    Column("reply_model", Text),
    Column("base64", Boolean),
    # Most inputs and tokens in a request to the upstream.
    Column("request_inputs", Integer),
    Column("request_tokens", Integer),
    Column("weights_sha256", Text, nullable=False),
    Column("weights_bytes", BigInteger, nullable=False),
    Column("dimensions", Integer, nullable=False),
    Column("max_item_tokens", Integer),
    Column("document_prompt", Text, nullable=False, server_default=""),
    Column("query_prompt", Text, nullable=False, server_default=""),
    Column("normalised", Boolean, nullable=False),
    Column("canary", LargeBinary, nullable=False),
    Column("tokens_per_second", Double, nullable=False),
    # Dimensions to which its vectors may be shortened, as it was trained for.
    Column("matryoshka", ARRAY(Integer), nullable=False, server_default="{}"),
    # Price in the operator's currency; NULL: no price.
    Column("price_per_million", Numeric),
    _moment("added_at", now=True),
    # When clients should have left it, and for which model.
    Column("deprecated_at", Date),
    Column("replaced_by", Text),
    CheckConstraint("kind in ('local', 'gateway')", name="kind"),
    CheckConstraint(
        "kind <> 'gateway' or (gateway_url is not null and upstream_model is not null and request_inputs > 0 "
        "and request_tokens > 0)",
        name="upstream",
    ),
    CheckConstraint("dimensions > 0 and tokens_per_second > 0", name="positive"),
)

#: Tokens per second of a model on one slot, by kind of device and precision, as measured last.
model_rates = Table(
    "model_rates",
    metadata,
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    Column("device", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("tokens_per_second", Double, nullable=False),
    _moment("measured_at", now=True),
    CheckConstraint("tokens_per_second > 0", name="positive"),
    PrimaryKeyConstraint("model", "device", "precision"),
)

workspace_models = Table(
    "workspace_models",
    metadata,
    Column("workspace_id", ForeignKey("workspaces.id", ondelete="CASCADE"), nullable=False),
    Column("model_name", ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    PrimaryKeyConstraint("workspace_id", "model_name"),
)

vector_spaces = Table(
    "vector_spaces",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("fingerprint", Text, nullable=False, unique=True),
    Column("weights", Text, nullable=False),
    Column("dimensions", Integer, nullable=False),
    Column("document_prompt", Text, nullable=False),
    Column("max_item_tokens", Integer),
    Column("normalised", Boolean, nullable=False),
    _moment("created_at", now=True),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    Column("name", Text, nullable=False),
    # No foreign key: a model may be removed while its jobs stay.
    Column("model_name", Text, nullable=False),
    Column("vector_space_id", ForeignKey("vector_spaces.id"), nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("message", Text),
    # State of a cancelling job once its last running chunk has ended.
    Column("ends_as", Text),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("labels", JSONB, nullable=False, server_default="{}"),
    Column("options", JSONB, nullable=False, server_default="{}"),
    Column("idempotency_key", Text),
    Column("payload_sha256", Text),
    # The producer's lease while staging; see `db.staging`.
    Column("fence", BigInteger, nullable=False, server_default="1"),
    Column("token", Uuid),
    _moment("lease_until"),
    _count("items_total"),
    Column("max_rejects", BigInteger),
    Column("progress", JSONB),
    Column("receipt", JSONB),
    _moment("created_at", now=True),
    _moment("queued_at"),
    _moment("started_at"),
    # Last resume or retry: claims lost before it don't count against the model.
    _moment("resumed_at"),
    _moment("finished_at"),
    _moment("texts_removed_at"),
    # Notices about its rows for the submitter, a line each.
    Column("notices", JSONB, nullable=False, server_default="[]"),
    # Texts of items below this index aren't kept: removed, or never stored (by reference).
    _count("texts_kept_from"),
    # Version of a collection that it syncs.
    Column("version_id", BigInteger),
    _state(JobState),
    CheckConstraint("ends_as in ('cancelled', 'failed')", name="ends_as"),
    UniqueConstraint("workspace_id", "idempotency_key"),
    Index(
        "jobs_active_idx",
        "id",
        postgresql_where=text("state not in ('completed', 'failed', 'cancelled')"),
    ),
    Index("jobs_texts_idx", "finished_at", postgresql_where=text("texts_kept_from < items_total")),
    Index("jobs_newest_idx", "workspace_id", text("id desc")),
    Index("jobs_ended_idx", "finished_at", postgresql_where=text("state in ('completed', 'failed', 'cancelled')")),
    Index("jobs_named_idx", "name", text("id desc")),
    # Two syncs of one version never run at once.
    Index(
        "jobs_syncing_idx",
        "version_id",
        unique=True,
        postgresql_where=text("version_id is not null and state not in ('completed', 'failed', 'cancelled')"),
    ),
)

#: Requests made by the SQL function `vectormill.submit`. Each becomes a job over its query's rows.
requests = Table(
    "requests",
    metadata,
    # Id of the job that it becomes.
    Column("job_id", Uuid, primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    # Login role of the session.
    Column("requested_by", Text, nullable=False),
    # NULL: erased after the retention time, like its job's texts.
    Column("query", Text),
    Column("model", Text, nullable=False),
    # Of a sync; its options are those of `SyncRequest`.
    Column("collection", Text),
    Column("name", Text),
    Column("text_column", Text, nullable=False),
    Column("key_column", Text),
    Column("options", JSONB, nullable=False),
    Column("idempotency_key", Text),
    # Checksum of all that decides the result, as the function sees it.
    Column("payload_sha256", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="requested"),
    Column("reason", Text),
    Column("message", Text),
    # Time of the last request, where it was repeated.
    Column("requested_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # Time from which the query's database has been unreachable.
    _moment("unreachable_since"),
    _moment("finished_at"),
    _state(RequestState),
    UniqueConstraint("workspace_id", "idempotency_key"),
    Index("requests_due_idx", "requested_at", postgresql_where=text("state = 'requested'")),
    Index("requests_no_job_idx", "job_id", postgresql_where=text("state <> 'submitted'")),
    Index("requests_queries_idx", "finished_at", postgresql_where=text("query is not null")),
)

inputs = Table(
    "inputs",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("uri", Text, nullable=False),
    Column("etag", Text),
    Column("bytes", BigInteger),
    Column("rows", BigInteger),
    PrimaryKeyConstraint("job_id", "ordinal"),
)

#: Who submitted a job, and each change of its state and priority since, written by a trigger of `jobs`.
job_history = Table(
    "job_history",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("changed_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("message", Text),
    Column("priority", SmallInteger, nullable=False),
    # Of the first row, for people. The query is forgotten when the job's texts are.
    Column("submitted_by", Text),
    Column("query", Text),
    Index("job_history_job_idx", "job_id", "id"),
    Index("job_history_query_idx", "job_id", postgresql_where=text("query is not null")),
)

chunks = Table(
    "chunks",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("first_index", BigInteger, nullable=False),
    Column("items", Integer, nullable=False),
    Column("estimated_tokens", BigInteger, nullable=False),
    Column("input_ordinal", Integer),
    Column("row_group", Integer),
    # Start of the rows: rows into the row group, or uncompressed bytes into a text file, with the length in bytes.
    Column("input_offset", BigInteger),
    Column("input_bytes", BigInteger),
    Column("input_line", BigInteger),
    Column("state", Text, nullable=False, server_default=ChunkState.PENDING.value),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    # Token of the claim with this fence, and the number of its commits.
    Column("token", Uuid),
    Column("parts", Integer, nullable=False, server_default="0"),
    _moment("lease_until"),
    _moment("not_before"),
    Column("backend_pid", Integer),
    Column("worker_id", Uuid),
    Column("task_id", Text),
    # Claims lost since the last progress.
    Column("crashes", SmallInteger, nullable=False, server_default="0"),
    # Level of the search for an item that kills its process; see workers/encoders/batching.py.
    Column("isolation", SmallInteger, nullable=False, server_default="0"),
    Column("last_error", Text),
    _count("embedded"),
    _count("reused"),
    _count("rejected"),
    _count("cancelled"),
    _count("truncated"),
    _count("prompt_tokens"),
    _count("reused_tokens"),
    Column("output_uri", Text),
    # Vectors, where items have several; 0 where each has one.
    _count("passages"),
    # Tokens that truncation left out, and the items that lost the most: index, key and lost tokens of each.
    _count("lost_tokens"),
    Column("most_truncated", JSONB, nullable=False, server_default="[]"),
    # Indexes without an item: rows of a sync that removed a key, or that another row of the same key replaces.
    _count("vacant"),
    # Items whose key was forgotten: their rows are gone, while the counts above stay; of these items, the vectors,
    # rejects and passages that they count.
    _count("forgotten"),
    _count("forgotten_vectors"),
    _count("forgotten_rejects"),
    _count("forgotten_passages"),
    _moment("started_at"),
    _moment("finished_at"),
    _state(ChunkState),
    # Also the index by which an item's chunk is found.
    UniqueConstraint("job_id", "first_index"),
    Index("chunks_open_idx", "job_id", "id", postgresql_where=text("state in ('pending', 'running')")),
    Index("chunks_lost_idx", "id", postgresql_where=text("state = 'pending' and crashes > 0")),
    Index("chunks_lease_idx", "lease_until", postgresql_where=text("state = 'running'")),
)

#: Recorded files of a job's Parquet output. Any others in its folder were written by lost claims.
outputs = Table(
    "outputs",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("chunk_id", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("part", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("chunk_id", "fence", "part"),
    Index("outputs_job_idx", "job_id", "chunk_id"),
)

items = Table(
    "items",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("index", BigInteger, nullable=False),
    Column("key", Text),
    # NULL: rejected when it was read, removed after the retention time, or kept in a file that workers read.
    Column("text", Text),
    Column("carried", JSONB),
    # Title that the model reads before each passage.
    Column("title", Text),
    # Of a sync's item: hash of the text, then of the carried columns, as `collection_keys` keeps it.
    Column("identity", LargeBinary),
    PrimaryKeyConstraint("job_id", "index"),
    postgresql_partition_by=_BY_JOB,
)


def _of_a_vector() -> Iterator[SchemaItem]:
    yield Column("key", Text)
    yield Column("vector_space_id", BigInteger, nullable=False)
    yield Column("tokens", Integer, nullable=False)
    yield Column("truncated", Boolean, nullable=False)
    yield Column("vector", VECTOR())
    yield Column("half", HALFVEC())
    yield CheckConstraint("(vector is null) <> (half is null)", name="one_vector")


embeddings = Table(
    "embeddings",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("index", BigInteger, nullable=False),
    *_of_a_vector(),
    PrimaryKeyConstraint("job_id", "index"),
    postgresql_partition_by=_BY_JOB,
)

#: Vectors of jobs that split. Apart, so that other jobs' rows stay as small: at 384 dimensions five fit on a page, and
#: with these columns four would.
passages = Table(
    "passages",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("index", BigInteger, nullable=False),
    # Zero-based number of the passage in its item, and the characters of the item's text that it is.
    Column("passage", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("stop", Integer, nullable=False),
    *_of_a_vector(),
    PrimaryKeyConstraint("job_id", "index", "passage"),
    postgresql_partition_by=_BY_JOB,
)

rejects = Table(
    "rejects",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("index", BigInteger, nullable=False),
    Column("key", Text),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    PrimaryKeyConstraint("job_id", "index"),
    postgresql_partition_by=_BY_JOB,
)

#: Item that each text of a workspace and vector space was first given to; others copy its vector.
known_texts = Table(
    "known_texts",
    metadata,
    Column("workspace_id", BigInteger, nullable=False),
    Column("vector_space_id", BigInteger, nullable=False),
    # See core/text_identity.py.
    Column("hash", LargeBinary, nullable=False),
    Column("job_id", Uuid, nullable=False),
    Column("index", BigInteger, nullable=False),
    PrimaryKeyConstraint("workspace_id", "vector_space_id", "hash"),
    # Only a purge reads it; ids of jobs grow, so a summary of places is enough.
    Index("known_texts_job_idx", "job_id", postgresql_using="brin"),
)

collections = Table(
    "collections",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    Column("name", Text, nullable=False),
    # Name of the view that readers use, in this schema.
    Column("view", Text, nullable=False, unique=True),
    Column("is_shown", Boolean, nullable=False, server_default=text("false")),
    # Longest time between two completed syncs that is no cause for alarm.
    Column("expect_every", Interval),
    _moment("created_at", now=True),
    UniqueConstraint("workspace_id", "name"),
)

#: Vector spaces of a collection, each with its options, keys and vectors.
collection_versions = Table(
    "collection_versions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("collection_id", ForeignKey("collections.id", ondelete="CASCADE"), nullable=False),
    # No foreign key: a model may be removed while its vectors stay.
    Column("model_name", Text, nullable=False),
    Column("vector_space_id", ForeignKey("vector_spaces.id"), nullable=False),
    # As `JobOptions` writes them.
    Column("options", JSONB, nullable=False),
    Column("state", Text, nullable=False),
    # End of the time in which readers may go back to it.
    _moment("kept_until"),
    # Folder or URI of its Parquet files, the number of their newest set and of the one that readers see, and when that
    # was written.
    Column("output", Text),
    Column("output_number", Integer, nullable=False, server_default="0"),
    Column("output_shown", Integer, nullable=False, server_default="0"),
    _moment("output_at"),
    # Why they can't be written; NULL: they can.
    Column("output_problem", Text),
    # They are to be written anew as one full set.
    Column("compacts", Boolean, nullable=False, server_default="false"),
    _moment("created_at", now=True),
    CheckConstraint("state in ('next', 'current', 'previous', 'gone')", name="state"),
    Index(
        "collection_versions_state_idx",
        "collection_id",
        "state",
        unique=True,
        postgresql_where=text("state <> 'gone'"),
    ),
)

#: Keys of each version, narrow, so that a sync compares millions without reading a vector.
collection_keys = Table(
    "collection_keys",
    metadata,
    Column("version_id", BigInteger, nullable=False),
    Column("key", Text(collation="C"), nullable=False),
    # Number of the key, never given twice.
    Column("slot", BigInteger, nullable=False, server_default=text("nextval('vectormill.collection_slots')")),
    # Hash of the text that its vectors were made of, then of its carried columns.
    Column("identity", LargeBinary, nullable=False),
    Column("carried", JSONB),
    Column("tokens", Integer, nullable=False),
    # Job that wrote the vectors last.
    Column("job_id", Uuid, nullable=False),
    PrimaryKeyConstraint("version_id", "key"),
    UniqueConstraint("version_id", "slot"),
    postgresql_partition_by="LIST (version_id)",
)

collection_vectors = Table(
    "collection_vectors",
    metadata,
    Column("version_id", BigInteger, nullable=False),
    Column("slot", BigInteger, nullable=False),
    # As in `passages`; 0 and nulls where each key has one vector.
    Column("passage", Integer, nullable=False),
    Column("start", Integer),
    Column("stop", Integer),
    Column("vector", VECTOR()),
    Column("half", HALFVEC()),
    PrimaryKeyConstraint("version_id", "slot", "passage"),
    CheckConstraint("(vector is null) <> (half is null)", name="one_vector"),
    postgresql_partition_by="LIST (version_id)",
)

#: Keys that changed since a version's files were written, each once or more often.
collection_changes = Table(
    "collection_changes",
    metadata,
    Column("version_id", BigInteger, nullable=False),
    Column("key", Text(collation="C"), nullable=False),
    Index("collection_changes_version_idx", "version_id"),
)

#: Parquet files of versions that count.
collection_files = Table(
    "collection_files",
    metadata,
    Column("version_id", ForeignKey("collection_versions.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    # Of the set that it came with.
    Column("number", Integer, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("version_id", "name"),
)

#: Syncs, kept while their collection is, also after their jobs are purged.
syncs = Table(
    "syncs",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("collection_id", BigInteger, nullable=False),
    Column("version_id", BigInteger, nullable=False),
    # It named all keys that there are; False: only those that changed.
    Column("is_whole", Boolean, nullable=False),
    # Keys with a higher slot came after it began.
    Column("last_slot", BigInteger, nullable=False),
    # Keys of the collection that it has named: the bits in `sync_seen`.
    _count("named"),
    # Rows whose text the collection had already, and those of them with other carried columns.
    _count("unchanged"),
    _count("updated"),
    # Rows that another row of the same key replaces.
    _count("repeated"),
    # Tokens of the unchanged texts.
    _count("tokens_saved"),
    # Keys that it removed, added and changed.
    _count("removed"),
    _count("added"),
    _count("changed"),
    # End of the sync, with its removals.
    _moment("settled_at"),
    # Job that brought the current version up to the same source; NULL: this is that job.
    Column("beside", Uuid),
    _moment("created_at", now=True),
    Index("syncs_version_idx", "version_id", text("job_id desc")),
    Index("syncs_settled_idx", "version_id", "settled_at"),
)

#: Requests to forget keys.
forgets = Table(
    "forgets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    # NULL: keys of all jobs and collections of the workspace.
    Column("collection_id", BigInteger),
    Column("requested_by", Text, nullable=False),
    # Keys that were asked for, and items and collections' keys that were erased so far.
    _count("keys"),
    _count("items"),
    _count("collected"),
    # Jobs up to this one are looked through, but for those that hadn't ended.
    Column("after_job", Uuid),
    Column("waits_for", ARRAY(Uuid), nullable=False, server_default="{}"),
    # Why a table of the user or a storage can't be changed; NULL: there is no such.
    Column("problem", Text),
    # Places of jobs' files that couldn't be found.
    Column("unseen", ARRAY(Text), nullable=False, server_default="{}"),
    _moment("created_at", now=True),
    _moment("finished_at"),
    Index("forgets_unfinished_idx", "id", postgresql_where=text("finished_at is null")),
)

#: Keys of a request until it is finished.
forget_keys = Table(
    "forget_keys",
    metadata,
    Column("forget_id", ForeignKey("forgets.id", ondelete="CASCADE"), nullable=False),
    Column("key", Text(collation="C"), nullable=False),
    PrimaryKeyConstraint("forget_id", "key"),
)

#: Keyed hashes of forgotten keys, which don't come in again.
tombstones = Table(
    "tombstones",
    metadata,
    Column("workspace_id", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("forgotten_by", Text, nullable=False),
    _moment("forgotten_at", now=True),
    PrimaryKeyConstraint("workspace_id", "digest"),
)

#: Slots that a whole sync has named, as bits: page p holds those from p × 8,192 on.
sync_seen = Table(
    "sync_seen",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("page", BigInteger, nullable=False),
    Column("bits", LargeBinary, nullable=False),
    PrimaryKeyConstraint("job_id", "page"),
)

#: Changes for a sync's end: new carried columns of a key; NULL identity: the key goes.
sync_changes = Table(
    "sync_changes",
    metadata,
    Column("job_id", Uuid, nullable=False),
    Column("slot", BigInteger, nullable=False),
    Column("identity", LargeBinary),
    Column("carried", JSONB),
    PrimaryKeyConstraint("job_id", "slot"),
)

usage = Table(
    "usage",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("workspace_id", BigInteger, nullable=False),
    Column("key_id", Text),
    Column("job_id", Uuid),
    Column("request_id", Text),
    Column("chunk_id", BigInteger),
    Column("fence", BigInteger),
    Column("token", Uuid),
    Column("part", Integer),
    Column("model", Text, nullable=False),
    _count("items"),
    _count("prompt_tokens"),
    _count("total_tokens"),
    _count("reused_items"),
    _count("reused_tokens"),
    _count("truncated"),
    Column("device_seconds", Double, nullable=False, server_default="0"),
    # Kind of the device that embedded, and its precision; NULL for requests and for models of upstreams.
    Column("device", Text),
    Column("precision", Text),
    # Time of the same tokens at the device's rate of matrix products; NULL also for models that multiply nothing.
    Column("roofline_seconds", Double),
    Column("cost", Numeric),
    # End user that a request's caller named.
    Column("end_user", Text),
    Column("labels", JSONB, nullable=False, server_default="{}"),
    _moment("created_at", now=True),
    UniqueConstraint("chunk_id", "fence", "part"),
    Index("usage_job_idx", "job_id", "created_at"),
    # Covers all columns that a month's sum reads.
    Index("usage_workspace_idx", "workspace_id", "created_at", postgresql_include=["total_tokens", "cost"]),
    Index("usage_model_idx", "model", "created_at"),
    # A request is counted once, however often its row is sent.
    Index("usage_request_idx", "request_id", unique=True, postgresql_where=text("request_id is not null")),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("chunk_id", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("items", Integer, nullable=False),
    Column("estimated_tokens", BigInteger, nullable=False),
    Column("billed_tokens", BigInteger),
    Column("status", Text),
    _moment("started_at", now=True),
    _moment("finished_at"),
    Index("attempts_chunk_idx", "chunk_id"),
)

#: Lost claims: the worker died, froze or lost the database, or the model stopped working.
claim_losses = Table(
    "claim_losses",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("model", Text, nullable=False),
    Column("job_id", Uuid, nullable=False),
    Column("chunk_id", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("worker_id", Uuid),
    Column("task_id", Text),
    Column("cause", Text, nullable=False),
    _moment("lost_at", now=True),
    Index("claim_losses_model_idx", "model", "lost_at"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("host", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("models", ARRAY(Text), nullable=False),
    # Models that this worker has dropped, each with its reason.
    Column("dropped", JSONB, nullable=False, server_default="{}"),
    Column("slots", Integer, nullable=False),
    # Kind of each of its devices: cpu, mps, or a GPU's name.
    Column("device_kinds", ARRAY(Text), nullable=False, server_default="{}"),
    # Reason for taking no chunks for now; NULL: it takes them.
    Column("resting", Text),
    # Celery's name of it, which begins with its devices and ends with its host.
    Column("name", Text),
    _moment("started_at", now=True),
    _moment("seen_at", now=True),
)

#: Processes that serve local models to the api.
engines = Table(
    "engines",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("url", Text, nullable=False),
    # Models that it serves now.
    Column("models", ARRAY(Text), nullable=False),
    Column("device", Text, nullable=False),
    _moment("started_at", now=True),
    _moment("seen_at", now=True),
)

#: Events for webhooks.
events = Table(
    "events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    # May hold a secret token of the receiver.
    Column("url", Text, nullable=False),
    # As it is sent and signed, the same at each try.
    Column("body", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="waiting"),
    Column("tries", SmallInteger, nullable=False, server_default="0"),
    Column("next_try_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    # Outcome of the last try.
    Column("answer", Text),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    _moment("finished_at"),
    _state(EventState),
    # By receiver: host and port.
    Index("events_due_idx", text("split_part(url, '/', 3)"), "next_try_at", postgresql_where=text("state = 'waiting'")),
    Index("events_ended_idx", "state", "finished_at", postgresql_where=text("state <> 'waiting'")),
)

#: One row per role that only one process may hold at a time, such as the leading dispatcher.
leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    _moment("lease_until", now=True),
)

#: Files of the Files API; their bytes are stored where VECTORMILL_FILES says.
files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("uri", Text, nullable=False),
    Column("etag", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    _moment("created_at", now=True),
    _moment("expires_at"),
    CheckConstraint("purpose in ('batch', 'batch_output')", name="purpose"),
    Index("files_workspace_idx", "workspace_id", "id"),
    Index("files_expiry_idx", "expires_at", postgresql_where=text("expires_at is not null")),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", ForeignKey("workspaces.id"), nullable=False),
    Column("state", Text, nullable=False, server_default=BatchState.VALIDATING.value),
    # Final state of one that was cancelled or expired before its job ended; NULL: the job's end decides.
    Column("ends_as", Text),
    Column("endpoint", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    # No foreign key: files may be deleted while batch requests stay.
    Column("input_file_id", Text, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    # Job that batch requests of the same content share; it may be purged.
    Column("job_id", Uuid),
    Column("model", Text),
    Column("metadata", JSONB),
    Column("max_rejects", Text, nullable=False, server_default=""),
    Column("output_seconds", BigInteger),
    Column("errors", JSONB),
    # Counts, frozen at its end.
    Column("counts", JSONB),
    _moment("created_at", now=True),
    _moment("expires_at"),
    _moment("in_progress_at"),
    _moment("finalizing_at"),
    _moment("cancelling_at"),
    # Time of completion, failure, expiry or cancellation.
    _moment("ended_at"),
    CheckConstraint("state in ({})".format(", ".join(f"'{state}'" for state in BatchState)), name="state"),
    CheckConstraint("ends_as in ('cancelled', 'expired')", name="ends_as"),
    Index("batches_workspace_idx", "workspace_id", "id"),
    Index("batches_open_idx", "id", postgresql_where=text("ended_at is null")),
)
