"""Flower's settings, read by `vectormill flower`. Flower only looks here: jobs are steered by vectormill."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from celery.events.state import Task
from flower.events import PrometheusMetrics
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from tornado.web import authenticated

from pipeline.broker import RUN_CHUNK
from pipeline.infra.logs import configure_logs
from pipeline.infra.settings import load_settings

_settings = load_settings()
assert _settings.flower_password
_password = _settings.flower_password.get_secret_value()

address = _settings.flower_host
port = _settings.flower_port
# In JSON, as all processes log; Flower would set up lines of its own.
configure_logs(_settings.log_level)
logging = "none"

basic_auth = [f"vectormill:{_password}"]
# The same after a restart, and no one else's.
cookie_secret = hmac.new(_password.encode(), b"Flower's cookies", hashlib.sha256).hexdigest()
# Flower leaves its metrics open even so; they name workers and models.
Metrics.get = authenticated(Metrics.get)
_observe = PrometheusMetrics.observe_task


def _observe_alike(metrics: PrometheusMetrics, worker: str, event: Mapping[str, Any], task: Task) -> None:
    """Count a task under one name: as a label, each job's own would make a series for each worker and kind of event."""
    _observe(metrics, worker, {**event, "name": RUN_CHUNK}, task)


PrometheusMetrics.observe_task = _observe_alike
_show_broker = BrokerView.get


async def _ask_and_show_broker(view: BrokerView) -> None:
    """Show the queues of the models that workers serve now; Flower would show those from when it started."""
    await view.application.update_workers()
    await _show_broker(view)


BrokerView.get = authenticated(_ask_and_show_broker)
# No task is run, revoked or limited from here, and no worker stopped.
read_only = True

# About 5.5 KB each.
max_tasks = 10_000
purge_offline_workers = 300
# A task's name is its job's and model's; its arguments are its chunk, then the ids of job and chunk.
tasks_columns = "name,args,state,result,received,runtime,worker,uuid"


def format_task(task: Task) -> Task:
    """Show why a task isn't done where one that is done shows its result."""
    if task.exception and not task.result:
        task.result = task.exception
    return task
