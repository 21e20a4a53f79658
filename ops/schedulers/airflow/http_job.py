"""Each night a job over the day's file, by HTTP; a sensor that holds no worker waits for its end.

Needs apache-airflow-providers-http, `vectormill_sensor.py` beside it, and the connection `vectormill`: schema, host and
port of the api, and in its extra `{"Authorization": "Bearer vm_…"}`. The api must allow the folder
(VECTORMILL_API_SOURCES), which its machine must see.

The day's file is `<folder>/<day>.jsonl`, lines with `id` and `text`; the day is Airflow's `ds`, the date of the run. A
run by hand needs a logical date.

The day in the idempotency key makes each try, and a run that is cleared, attach to the job that is there, or go on with
it if it has failed. So both tasks are tried again whatever went wrong, an answer that was lost on its way too, after
Airflow's `default_task_retry_delay`. Only a job that has failed or was cancelled ends the run at once.
"""

import json

import pendulum
from airflow.providers.http.operators.http import HttpOperator
from airflow.sdk import dag
from vectormill_sensor import wait_for


@dag(
    # Not "@daily": that is at midnight, and the day that it names has just begun.
    schedule="15 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3},
    params={"folder": "/srv/articles", "model": "all-MiniLM-L6-v2"},
)
def http_job() -> None:
    """Submit, wait."""
    submit = HttpOperator(
        task_id="submit",
        http_conn_id="vectormill",
        method="POST",
        endpoint="/api/jobs",
        headers={"Content-Type": "application/json", "Idempotency-Key": "articles-{{ ds }}"},
        data=json.dumps(
            {
                "name": "articles-{{ ds }}",
                "model": "{{ params.model }}",
                "sources": ["{{ params.folder }}/{{ ds }}.jsonl"],
                "labels": {"day": "{{ ds }}"},
            }
        ),
        response_filter=lambda response: response.json()["id"],
    )
    submit >> wait_for(submit.output)


http_job()
