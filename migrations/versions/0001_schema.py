"""Initial schema."""

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None


def upgrade() -> None:
    # In `public`, so that every role finds its types. By default a user named like our schema would create it in there.
    op.execute("create extension if not exists vector schema public")
    op.create_table(
        "attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("chunk_id", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("estimated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("billed_tokens", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("attempts_pkey")),
        schema="vectormill",
    )
    op.create_index("attempts_chunk_idx", "attempts", ["chunk_id"], unique=False, schema="vectormill")
    op.create_table(
        "claim_losses",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("chunk_id", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("lost_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("claim_losses_pkey")),
        schema="vectormill",
    )
    op.create_index("claim_losses_model_idx", "claim_losses", ["model", "lost_at"], unique=False, schema="vectormill")
    op.create_table(
        "embeddings",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("vector_space_id", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("vector", VECTOR(), nullable=True),
        sa.Column("half", HALFVEC(), nullable=True),
        sa.CheckConstraint("(vector is null) <> (half is null)", name=op.f("embeddings_one_vector_check")),
        sa.PrimaryKeyConstraint("job_id", "index", name=op.f("embeddings_pkey")),
        schema="vectormill",
        postgresql_partition_by="RANGE (job_id)",
    )
    op.create_table(
        "items",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("carried", JSONB(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "index", name=op.f("items_pkey")),
        schema="vectormill",
        postgresql_partition_by="RANGE (job_id)",
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("leases_pkey")),
        schema="vectormill",
    )
    op.create_table(
        "models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("slug", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("aliases", sa.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("hub_id", sa.Text(), nullable=True),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("gateway_url", sa.Text(), nullable=True),
        sa.Column("upstream_model", sa.Text(), nullable=True),
        sa.Column("key_env", sa.Text(), nullable=True),
        sa.Column("weights_sha256", sa.Text(), nullable=False),
        sa.Column("weights_bytes", sa.BigInteger(), nullable=False),
        sa.Column("dimensions", sa.Integer(), nullable=False),
        sa.Column("max_item_tokens", sa.Integer(), nullable=True),
        sa.Column("document_prompt", sa.Text(), server_default="", nullable=False),
        sa.Column("query_prompt", sa.Text(), server_default="", nullable=False),
        sa.Column("normalised", sa.Boolean(), nullable=False),
        sa.Column("canary", sa.LargeBinary(), nullable=False),
        sa.Column("tokens_per_second", sa.Double(), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind in ('local', 'gateway')", name=op.f("models_kind_check")),
        sa.CheckConstraint("dimensions > 0 and tokens_per_second > 0", name=op.f("models_positive_check")),
        sa.PrimaryKeyConstraint("name", name=op.f("models_pkey")),
        sa.UniqueConstraint("slug", name=op.f("models_slug_key")),
        schema="vectormill",
    )
    op.create_table(
        "rejects",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "index", name=op.f("rejects_pkey")),
        schema="vectormill",
        postgresql_partition_by="RANGE (job_id)",
    )
    op.create_table(
        "usage",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("chunk_id", sa.BigInteger(), nullable=True),
        sa.Column("fence", sa.BigInteger(), nullable=True),
        sa.Column("part", sa.Integer(), nullable=True),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("items", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("total_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("device_seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("cost", sa.Numeric(), nullable=True),
        sa.Column("labels", JSONB(), server_default="{}", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("usage_pkey")),
        sa.UniqueConstraint("chunk_id", "fence", "part", name=op.f("usage_chunk_id_fence_part_key")),
        schema="vectormill",
    )
    op.create_index("usage_job_idx", "usage", ["job_id", "created_at"], unique=False, schema="vectormill")
    op.create_index("usage_model_idx", "usage", ["model", "created_at"], unique=False, schema="vectormill")
    op.create_index("usage_workspace_idx", "usage", ["workspace_id", "created_at"], unique=False, schema="vectormill")
    op.create_table(
        "vector_spaces",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("weights", sa.Text(), nullable=False),
        sa.Column("dimensions", sa.Integer(), nullable=False),
        sa.Column("document_prompt", sa.Text(), nullable=False),
        sa.Column("max_item_tokens", sa.Integer(), nullable=True),
        sa.Column("normalised", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("vector_spaces_pkey")),
        sa.UniqueConstraint("fingerprint", name=op.f("vector_spaces_fingerprint_key")),
        schema="vectormill",
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("models", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("dropped", JSONB(), server_default="{}", nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("resting", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
        schema="vectormill",
    )
    op.create_table(
        "workspaces",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("weight > 0", name=op.f("workspaces_weight_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("workspaces_pkey")),
        sa.UniqueConstraint("name", name=op.f("workspaces_name_key")),
        schema="vectormill",
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("admin", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["workspace_id"], ["vectormill.workspaces.id"], name=op.f("api_keys_workspace_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        schema="vectormill",
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("vector_space_id", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("ends_as", sa.Text(), nullable=True),
        sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("labels", JSONB(), server_default="{}", nullable=False),
        sa.Column("options", JSONB(), server_default="{}", nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("payload_sha256", sa.Text(), nullable=True),
        sa.Column("fence", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("items_total", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("max_rejects", sa.BigInteger(), nullable=True),
        sa.Column("progress", JSONB(), nullable=True),
        sa.Column("receipt", JSONB(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("resumed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("texts_removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("texts_kept_from", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("ends_as in ('cancelled', 'failed')", name=op.f("jobs_ends_as_check")),
        sa.CheckConstraint(
            "state in ('staging', 'queued', 'running', 'paused', 'cancelling', 'completed', 'failed', 'cancelled')",
            name=op.f("jobs_state_check"),
        ),
        sa.ForeignKeyConstraint(
            ["vector_space_id"], ["vectormill.vector_spaces.id"], name=op.f("jobs_vector_space_id_fkey")
        ),
        sa.ForeignKeyConstraint(["workspace_id"], ["vectormill.workspaces.id"], name=op.f("jobs_workspace_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
        sa.UniqueConstraint("workspace_id", "idempotency_key", name=op.f("jobs_workspace_id_idempotency_key_key")),
        schema="vectormill",
    )
    op.create_index(
        "jobs_active_idx",
        "jobs",
        ["id"],
        unique=False,
        schema="vectormill",
        postgresql_where=sa.text("state not in ('completed', 'failed', 'cancelled')"),
    )
    op.create_index(
        "jobs_newest_idx", "jobs", ["workspace_id", sa.literal_column("id desc")], unique=False, schema="vectormill"
    )
    op.create_index(
        "jobs_texts_idx",
        "jobs",
        ["finished_at"],
        unique=False,
        schema="vectormill",
        postgresql_where=sa.text("texts_kept_from < items_total"),
    )
    op.create_table(
        "workspace_models",
        sa.Column("workspace_id", sa.BigInteger(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_name"],
            ["vectormill.models.name"],
            name=op.f("workspace_models_model_name_fkey"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["workspace_id"],
            ["vectormill.workspaces.id"],
            name=op.f("workspace_models_workspace_id_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("workspace_id", "model_name", name=op.f("workspace_models_pkey")),
        schema="vectormill",
    )
    op.create_table(
        "chunks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("first_index", sa.BigInteger(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("estimated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("input_ordinal", sa.Integer(), nullable=True),
        sa.Column("row_group", sa.Integer(), nullable=True),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("backend_pid", sa.Integer(), nullable=True),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("task_id", sa.Text(), nullable=True),
        sa.Column("crashes", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("isolation", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("embedded", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("rejected", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cancelled", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("truncated", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_uri", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state in ('pending', 'running', 'done', 'cancelled')", name=op.f("chunks_state_check")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["vectormill.jobs.id"], name=op.f("chunks_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("chunks_pkey")),
        sa.UniqueConstraint("job_id", "ordinal", name=op.f("chunks_job_id_ordinal_key")),
        schema="vectormill",
    )
    op.create_index(
        "chunks_finished_idx",
        "chunks",
        ["worker_id", "finished_at"],
        unique=False,
        schema="vectormill",
        postgresql_where=sa.text("finished_at is not null"),
    )
    op.create_index(
        "chunks_lease_idx",
        "chunks",
        ["lease_until"],
        unique=False,
        schema="vectormill",
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "chunks_open_idx",
        "chunks",
        ["job_id", "id"],
        unique=False,
        schema="vectormill",
        postgresql_where=sa.text("state in ('pending', 'running')"),
    )
    op.create_table(
        "inputs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("rows", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["vectormill.jobs.id"], name=op.f("inputs_job_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "ordinal", name=op.f("inputs_pkey")),
        schema="vectormill",
    )
    op.execute("insert into vectormill.workspaces (name) values ('default')")
    op.execute(RECEIPTS)


RECEIPTS = """
create view vectormill.receipts as
select j.id as job_id, j.name, j.state, j.items_total as items_in,
       c.embedded, c.reused, c.rejected, c.cancelled, c.prompt_tokens, c.reused_tokens,
       j.items_total = c.embedded + c.reused + c.rejected + c.cancelled as balanced
from vectormill.jobs j
cross join lateral (
  select coalesce(sum(embedded), 0)::bigint as embedded, coalesce(sum(reused), 0)::bigint as reused,
         coalesce(sum(rejected), 0)::bigint as rejected, coalesce(sum(cancelled), 0)::bigint as cancelled,
         coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
         coalesce(sum(reused_tokens), 0)::bigint as reused_tokens
  from vectormill.chunks where job_id = j.id
) c
"""
