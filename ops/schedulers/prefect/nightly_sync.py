"""Each night a collection is brought up to a table's export, as a flow of Prefect. `python nightly_sync.py` serves it.

Needs the package `vectormill`, `VECTORMILL_API_URL` and `VECTORMILL_API_KEY`, and the collection: `vectormill
collections create tickets --model …`. The export, `<folder>/<collection>.jsonl`, is uploaded from the machine that runs
the flow. It has all rows, also those that haven't changed: they are compared, and cost no tokens.

The day in the idempotency key makes each try, and another run for the day, attach to the sync that is there. What may
go better by itself is tried four times, each for two hours; the sync goes on meanwhile. A sync that has failed, for too
many rejects or too many rows that are missing, fails the run at once.
"""

from datetime import date
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.tasks import exponential_backoff

import vectormill


def may_succeed_later(_task: Any, _run: Any, state: Any) -> bool:
    """Return True if the same may succeed without a change by a person."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, vectormill.VectormillError) and error.retryable


@task(retries=3, retry_delay_seconds=exponential_backoff(60), retry_condition_fn=may_succeed_later)
def sync(folder: str, collection: str, day: str) -> vectormill.Receipt:
    """Bring the collection up to its export, and wait for that."""
    with vectormill.connect() as mill:
        job = mill.collection(collection).sync(
            Path(folder, f"{collection}.jsonl"), idempotency_key=f"{collection}-{day}", labels={"day": day}
        )
        get_run_logger().info("sync of %s: job %s", collection, job.id)
        job.wait(timeout=2 * 3600)
        return job.receipt()


@flow
def nightly_sync(folder: str = "/srv/export", collection: str = "tickets", day: date | None = None) -> dict[str, int]:
    """Sync, show the receipt, and return what became of the rows. The day is by default that of the run's schedule."""
    day = day or flow_run.scheduled_start_time.date()
    receipt = sync(folder, collection, day.isoformat())
    create_table_artifact(
        [{"items": outcome, "count": count} for outcome, count in receipt.items.items()],
        key="nightly-sync-receipt",
        description=f"Sync of {collection} on {day}: job {receipt.id}, {receipt.tokens['prompt']:,} tokens.",
    )
    return dict(receipt.items)


if __name__ == "__main__":
    nightly_sync.serve(name="tickets", cron="45 2 * * *")
