"""Sensor of a job's end over HTTP, for the DAGs beside it; it holds no worker while it waits."""

from datetime import timedelta
from typing import Any

from airflow.providers.http.sensors.http import HttpSensor
from airflow.sdk.exceptions import AirflowFailException


def has_completed(response: Any) -> bool:
    """Return True if a job has completed. A paused one is waited for: somebody may resume it.

    Raises:
        AirflowFailException: it has failed or was cancelled.
    """
    job = response.json()
    if job["state"] in ("failed", "cancelled"):
        raise AirflowFailException(f"job {job['id']} is {job['state']}: {job['reason'] or ''} {job['message'] or ''}")
    return bool(job["state"] == "completed")


def wait_for(job: Any) -> HttpSensor:
    """Return the task that waits for a job, given by its id, for six hours."""
    return HttpSensor(
        task_id="wait",
        http_conn_id="vectormill",
        endpoint=f"/api/jobs/{job}",
        response_check=has_completed,
        # By default one waits for a job that isn't there.
        response_error_codes_allowlist=[],
        mode="reschedule",
        poke_interval=timedelta(seconds=10),
        timeout=timedelta(hours=6),
    )
