"""Each night a collection is brought up to a table's export, as an asset of Dagster with a partition a day.

Needs the package `vectormill`, `VECTORMILL_API_URL` and `VECTORMILL_API_KEY`, and the collection: `vectormill
collections create tickets --model …`. The export, `<folder>/<collection>.jsonl`, is uploaded from the machine that runs
the asset. It has all rows, also those that haven't changed: they are compared, and cost no tokens.

The day in the idempotency key makes each try, and a partition that is materialized again, attach to the sync that is
there. What may go better by itself is tried four times, each for two hours; the sync goes on meanwhile. A sync that has
failed, for too many rejects or too many rows that are missing, fails the run at once.
"""

from pathlib import Path

import dagster as dg

import vectormill


class Api(dg.ConfigurableResource):
    """An api of vectormill."""

    url: str
    key: str


class Export(dg.Config):
    """The table's export, and the collection that follows it."""

    folder: str = "/srv/export"
    collection: str = "tickets"


@dg.asset(
    partitions_def=dg.DailyPartitionsDefinition(start_date="2026-01-01"),
    retry_policy=dg.RetryPolicy(max_retries=3, delay=60, backoff=dg.Backoff.EXPONENTIAL),
)
def ticket_vectors(context: dg.AssetExecutionContext, config: Export, api: Api) -> dg.MaterializeResult:
    """The latest vector of each ticket."""
    name, day = config.collection, context.partition_key
    try:
        with vectormill.connect(api.url, api.key) as mill:
            job = mill.collection(name).sync(
                Path(config.folder, f"{name}.jsonl"), idempotency_key=f"{name}-{day}", labels={"day": day}
            )
            context.log.info("sync of %s: job %s", name, job.id)
            job.wait(timeout=2 * 3600)
            receipt = job.receipt()
    except vectormill.VectormillError as error:
        raise dg.Failure(str(error), allow_retries=error.retryable) from error
    return dg.MaterializeResult(
        metadata={
            "job": dg.MetadataValue.url(f"{api.url}/jobs/{receipt.id}"),
            **{f"items/{outcome}": count for outcome, count in receipt.items.items()},
            **{f"tokens/{kind}": count for kind, count in receipt.tokens.items()},
        }
    )


nightly = dg.build_schedule_from_partitioned_job(
    dg.define_asset_job("nightly_sync", [ticket_vectors]), hour_of_day=2, minute_of_hour=45
)

defs = dg.Definitions(
    assets=[ticket_vectors],
    schedules=[nightly],
    resources={"api": Api(url=dg.EnvVar("VECTORMILL_API_URL"), key=dg.EnvVar("VECTORMILL_API_KEY"))},
)
