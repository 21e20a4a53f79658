"""Each night a collection is brought up to a table's export, by HTTP; a sensor that holds no worker waits for the end.

Needs what `http_job.py` needs, and the collection: `vectormill collections create tickets --model …`. The export,
`<folder>/tickets.jsonl`, has all rows, also those that haven't changed: they are compared, and cost no tokens.

The day in the idempotency key makes each try attach to the sync that is there. While another sync of the collection
goes on, the answer is 409, and the task is tried again. If too many rows are missing, the sync fails and removes none.
"""

import json

import pendulum
from airflow.providers.http.operators.http import HttpOperator
from airflow.sdk import dag
from vectormill_sensor import wait_for


@dag(
    schedule="45 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3},
    params={"folder": "/srv/export", "collection": "tickets"},
)
def http_sync() -> None:
    """Sync, wait."""
    sync = HttpOperator(
        task_id="sync",
        http_conn_id="vectormill",
        method="POST",
        endpoint="/api/collections/{{ params.collection }}/syncs",
        headers={"Content-Type": "application/json", "Idempotency-Key": "{{ params.collection }}-{{ ds }}"},
        data=json.dumps(
            {"sources": ["{{ params.folder }}/{{ params.collection }}.jsonl"], "labels": {"day": "{{ ds }}"}}
        ),
        response_filter=lambda response: response.json()["id"],
    )
    sync >> wait_for(sync.output)


http_sync()
