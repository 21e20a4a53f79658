{#- A job over a table, for a post-hook. Its name is the table's and the day. -#}
{% macro submit_to_vectormill(relation, key_column, text_column) %}
select vectormill.submit(
    query => 'select {{ key_column }}, {{ text_column }} from {{ relation }}',
    model => '{{ var("model") }}',
    name => '{{ job_of(relation.identifier) }}',
    key_column => '{{ key_column }}',
    text_column => '{{ text_column }}',
    idempotency_key => 'dbt {{ job_of(relation.identifier) }}'
)
{% endmacro %}

{% macro job_of(table) %}{{ table }}-{{ var("day", run_started_at.strftime("%Y-%m-%d")) }}{% endmacro %}

{#- Wait for a table's job of today: dbt run-operation wait_for_vectormill --args '{table: articles}'
    It fails if the job fails, so that what comes after it in a script isn't begun. -#}
{% macro wait_for_vectormill(table, hours=6) %}
{% set job = namespace(state="") %}
{% for _ in range(hours * 720) if job.state != "completed" %}
    {% set row = run_query(
        "select state, concat_ws(': ', reason, message) from vectormill.job_status where name = '"
        ~ job_of(table) ~ "' order by created_at desc limit 1"
    ).rows | first %}
    {% set job.state = row[0] if row else "not there" %}
    {% if job.state in ("failed", "cancelled", "not there") %}
        {{ exceptions.raise_compiler_error(job_of(table) ~ ": " ~ job.state ~ (", " ~ row[1] if row else "")) }}
    {% elif job.state != "completed" %}
        {% do run_query("select pg_sleep(5)") %}
    {% endif %}
{% endfor %}
{% if job.state != "completed" %}
    {{ exceptions.raise_compiler_error(job_of(table) ~ ": still " ~ job.state ~ " after " ~ hours ~ " hours") }}
{% endif %}
{{ log(job_of(table) ~ " is completed.", info=true) }}
{% endmacro %}
