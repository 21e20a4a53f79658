"""Flower's settings, read by `vectormill flower`. Flower only looks here: jobs are steered by vectormill."""

import hashlib
import hmac

from celery.events.state import Task
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from tornado.web import authenticated

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
