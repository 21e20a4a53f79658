-- The texts to embed. When the table stands, a job over it is asked for; both are committed together.
-- The day in the key makes a run that is repeated attach.
{{ config(post_hook="{{ submit_to_vectormill(this, 'id', 'text') }}") }}

select id, title || '. ' || body as text
from {{ source('raw', 'articles') }}
where body <> ''
