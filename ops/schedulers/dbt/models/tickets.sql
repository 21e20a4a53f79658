-- A table that changes. When it stands, a sync of the collection `tickets` is asked for: only new and changed rows are
-- embedded. The collection is made once, by: vectormill collections create tickets
{{ config(post_hook="{{ sync_to_vectormill(this, var('collection', 'tickets'), ['id', 'subject', 'body']) }}", enabled=var("tickets", false)) }}

select id, subject, body
from {{ source('raw', 'tickets') }}
