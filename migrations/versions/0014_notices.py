"""Notices to a job's sender about its rows, shown by `job_status`; truncated texts, counted by `receipts`."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

# As before, plus `notices`.
JOB_STATUS = """
create or replace view vectormill.job_status as
select j.id, w.name as workspace, j.name,
       case when again then 'requested' when stopped then r.state else j.state end as state,
       case when again then null when refused or stopped then r.reason else j.reason end as reason,
       case when again or refused or stopped then r.message else j.message end as message,
       j.model_name as model, j.items_total, embedded, reused, rejected, cancelled,
       greatest(0, j.items_total - embedded - reused - rejected - cancelled) as pending,
       r.requested_by, j.created_at, j.started_at,
       case when again then null when stopped then r.finished_at else j.finished_at end as finished_at,
       j.notices
from vectormill.jobs j
join vectormill.workspaces w on w.id = j.workspace_id
left join vectormill.requests r on r.job_id = j.id
cross join lateral (
  select coalesce(j.state = 'failed' and r.state = 'requested', false) as again,
         coalesce(j.state = 'failed' and r.state = 'failed', false) as refused,
         coalesce(j.state = 'staging' and r.state = 'cancelled', false) as stopped,
         coalesce(j.receipt, j.progress)->'items' as items
) s
cross join lateral (
  select coalesce((items->>'embedded')::bigint, 0) as embedded, coalesce((items->>'reused')::bigint, 0) as reused,
         coalesce((items->>'rejected')::bigint, 0) as rejected, coalesce((items->>'cancelled')::bigint, 0) as cancelled
) c
union all
select r.job_id, w.name, coalesce(r.name, 'query'), r.state, r.reason, r.message, r.model, 0, 0, 0, 0, 0, 0,
       r.requested_by, r.requested_at, null, r.finished_at, '[]'
from vectormill.requests r
join vectormill.workspaces w on w.id = r.workspace_id
where r.state <> 'submitted' and not exists (select from vectormill.jobs j where j.id = r.job_id)
"""

# As before, plus `truncated`.
RECEIPTS = """
create or replace view vectormill.receipts as
select j.id as job_id, j.name, j.state, j.items_total as items_in,
       c.embedded, c.reused, c.rejected, c.cancelled, c.prompt_tokens, c.reused_tokens,
       j.items_total = c.embedded + c.reused + c.rejected + c.cancelled as balanced, c.truncated
from vectormill.jobs j
cross join lateral (
  select coalesce(sum(embedded), 0)::bigint as embedded, coalesce(sum(reused), 0)::bigint as reused,
         coalesce(sum(rejected), 0)::bigint as rejected, coalesce(sum(cancelled), 0)::bigint as cancelled,
         coalesce(sum(prompt_tokens), 0)::bigint as prompt_tokens,
         coalesce(sum(reused_tokens), 0)::bigint as reused_tokens,
         coalesce(sum(truncated), 0)::bigint as truncated
  from vectormill.chunks where job_id = j.id
) c
"""


def upgrade() -> None:
    """Add a column, and replace the views."""
    op.add_column("jobs", sa.Column("notices", JSONB(), nullable=False, server_default="[]"), schema="vectormill")
    op.execute(JOB_STATUS)
    op.execute(RECEIPTS)
