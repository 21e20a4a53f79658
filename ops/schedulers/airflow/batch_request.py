"""Each night a batch request over the day's texts, by the stock operators of OpenAI's provider.

Needs apache-airflow-providers-openai, and the connection `openai_default`: the host is the gateway's address with its
`/v1`, the password is a key of it, and the extra is `{"openai_client_kwargs": {"max_retries": 8}}`, so that a gateway
that restarts doesn't fail a run.

The day's texts are `<folder>/<day>.jsonl`, lines with `id` and `text`, at most 50,000 and 200 MiB, in a folder that all
workers of Airflow see. The day is Airflow's `ds`, the date of the run; a run by hand needs a logical date.

What is uploaded depends on the texts alone, so that a task that runs again gets a batch request over the same job:
nothing is embedded twice.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pendulum
from airflow.providers.openai.hooks.openai import OpenAIHook
from airflow.providers.openai.operators.openai import OpenAITriggerBatchOperator
from airflow.sdk import dag, task


@dag(
    # Not "@daily": that is at midnight, and the day that it names has just begun.
    schedule="15 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    params={"folder": "/srv/articles", "model": "all-MiniLM-L6-v2"},
)
def batch_request() -> None:
    """Upload, embed, fetch."""

    @task(retries=2)
    def upload(params: dict[str, Any] | None = None, ds: str | None = None) -> str:
        """Upload the day's texts as lines of a batch request. Returns the file's id."""
        assert params is not None
        with TemporaryDirectory() as folder:
            file = Path(folder, f"articles-{ds}.jsonl")
            with Path(params["folder"], f"{ds}.jsonl").open() as texts, file.open("w") as lines:
                for row in map(json.loads, texts):
                    body = {"model": params["model"], "input": row["text"]}
                    line = {"custom_id": str(row["id"]), "method": "POST", "url": "/v1/embeddings", "body": body}
                    lines.write(json.dumps(line) + "\n")
            return OpenAIHook().upload_file(str(file), purpose="batch").id

    embed = OpenAITriggerBatchOperator(
        task_id="embed",
        file_id=upload(),
        endpoint="/v1/embeddings",
        # Holds no worker while it waits. When the time is up the batch request is cancelled; what is embedded stays.
        deferrable=True,
        poll_interval=10,
        timeout=6 * 3600,
        metadata={"day": "{{ ds }}"},
    )

    @task(retries=2)
    def fetch(batch_id: str, params: dict[str, Any] | None = None, ds: str | None = None) -> list[str]:
        """Write the output to `<folder>/<day>-vectors.jsonl`, and what was rejected, if anything was, to
        `<day>-errors.jsonl`; each whole or not at all. Returns their paths."""
        assert params is not None
        client = OpenAIHook().conn
        batch = client.batches.retrieve(batch_id)
        assert batch.output_file_id, "a completed batch request with vectors has an output file"
        written = []
        for name, file_id in (("errors", batch.error_file_id), ("vectors", batch.output_file_id)):
            if file_id:
                whole = Path(params["folder"], f"{ds}-{name}.jsonl")
                part = whole.with_suffix(".part")
                with client.files.with_streaming_response.content(file_id) as reply:
                    reply.stream_to_file(part)
                part.replace(whole)
                written.append(str(whole))
        return written

    fetch(embed.output)


batch_request()
