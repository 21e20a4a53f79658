{#- A job over a table, for a post-hook. Its name is the table's and the day. Its id is kept, for who waits for it. -#}
{% macro submit_to_vectormill(relation, key_column, text_column) %}
{% set name = relation.identifier ~ "-" ~ var("day", run_started_at.strftime("%Y-%m-%d")) %}
insert into {{ kept_jobs() }} as kept (table_name, job_id)
select '{{ relation.identifier }}', vectormill.submit(
    query => 'select {{ key_column }}, {{ text_column }} from {{ relation }}',
    model => '{{ var("model") }}',
    name => '{{ name }}',
    key_column => '{{ key_column }}',
    text_column => '{{ text_column }}',
    idempotency_key => 'dbt {{ relation.schema }}.{{ name }}'
)
on conflict (table_name) do update set job_id = excluded.job_id
{% endmacro %}

{#- A sync of a collection over a table, for a post-hook; its job is kept as that of `submit_to_vectormill` is. Rows that
    haven't changed cost no tokens, and keys that are gone from the table go from the collection. -#}
{% macro sync_to_vectormill(relation, collection, columns) %}
{% set name = relation.identifier ~ "-" ~ var("day", run_started_at.strftime("%Y-%m-%d")) %}
insert into {{ kept_jobs() }} as kept (table_name, job_id)
select '{{ relation.identifier }}', vectormill.sync(
    collection => '{{ collection }}',
    query => 'select {{ columns | join(", ") }} from {{ relation }}',
    name => '{{ name }}',
    idempotency_key => 'dbt {{ relation.schema }}.{{ name }}'
)
on conflict (table_name) do update set job_id = excluded.job_id
{% endmacro %}

{#- The job that was asked for last, of each table. -#}
{% macro kept_jobs() %}{{ target.schema }}.vectormill_jobs{% endmacro %}

{#- For on-run-start. -#}
{% macro make_kept_jobs() %}
create table if not exists {{ kept_jobs() }} (table_name text primary key, job_id uuid not null)
{% endmacro %}

{#- Wait for the job that a table's last run asked for: dbt run-operation wait_for_vectormill --args '{table: articles}'
    It fails if the job fails, so that what comes after it in a script isn't begun. A paused job is waited for. -#}
{% macro wait_for_vectormill(table, hours=6) %}
{% set job = namespace(name=table, state="") %}
{% for _ in range(hours * 720) if job.state != "completed" %}
    {% set row = run_query(
        "select name, state, concat_ws(': ', reason, message) from vectormill.job_status where id = (select job_id from "
        ~ kept_jobs() ~ " where table_name = '" ~ table ~ "')"
    ).rows | first %}
    {% if not row %}
        {{ exceptions.raise_compiler_error("no job of " ~ table ~ ": run its model first") }}
    {% endif %}
    {% set job.name = row[0] %}
    {% set job.state = row[1] %}
    {% if job.state in ("failed", "cancelled") %}
        {{ exceptions.raise_compiler_error(job.name ~ ": " ~ job.state ~ ", " ~ row[2]) }}
    {% elif job.state != "completed" %}
        {% do run_query("select pg_sleep(5)") %}
    {% endif %}
{% endfor %}
{% if job.state != "completed" %}
    {{ exceptions.raise_compiler_error(job.name ~ ": still " ~ job.state ~ " after " ~ hours ~ " hours") }}
{% endif %}
{{ log(job.name ~ " is completed.", info=true) }}
{% endmacro %}
