"""Commands that run a process of a deployment: migrate, dispatcher, worker, engine, api, flower."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import Annotated, NamedTuple

import typer

from pipeline.cli.context import database_url, server_urls
from pipeline.cli.oneshot import oneshot
from pipeline.cli.output import stderr
from pipeline.core.errors import UserError
from pipeline.embedded.processes import our_environment, our_module
from pipeline.infra import metrics, metrics_server
from pipeline.infra.logs import configure_logs
from pipeline.infra.settings import MODELS_SHARE, ROOM_FACTOR, load_settings

Precision = Annotated[
    str | None,
    typer.Option(
        help="auto, float32, bfloat16 or float16. auto: bfloat16 on GPUs that have it, else float32. A CPU always uses "
        "float32. Default: VECTORMILL_WORKER_DTYPE, or auto.",
        show_default=False,
    ),
]

_CELERY = ("celery", "--quiet", "-A", "workers.runner.app")
_LIBRARIES_BYTES = 700 * 1024 * 1024


class _Device(NamedTuple):
    """Device of this machine, as `workers.oneshot devices` lists it."""

    name: str
    memory_bytes: int
    kind: str


def migrate() -> None:
    """Create the database schema, or migrate it to the newest revision.

    Safe to run at any time, from anywhere, as often as you like.

    Example: vectormill migrate
    """
    from pipeline.cli.bootstrap import migrate_database

    migrate_database(database_url(load_settings()))
    stderr.print("The schema vectormill is up to date.")


def dispatcher() -> None:
    """Queue pending chunks for workers, sweep expired leases, finish jobs. Run two: one leads, the other stands by.

    Example: vectormill dispatcher
    """
    from pipeline.broker import Publisher
    from pipeline.db.database import make_engine
    from pipeline.dispatch.background import CONNECTIONS, Background, Resources
    from pipeline.dispatch.dispatcher import run
    from pipeline.dispatch.state import Dispatcher

    settings = load_settings()
    configure_logs(settings.log_level)
    metrics_server.serve(metrics.DISPATCHER, settings.metrics_host, settings.metrics_port)
    database, redis = server_urls(settings)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    engine = make_engine(database, application="vectormill-dispatcher", pool_size=2, ping=False)
    beside = make_engine(database, application="vectormill-background", pool_size=CONNECTIONS)
    publisher = Publisher(redis)
    try:
        run(
            Dispatcher(
                engine=engine,
                publisher=publisher,
                lease_seconds=settings.lease_seconds,
                text_retention_days=settings.text_retention_days,
                background=Background(Resources(beside, settings)),
            ),
            stop,
        )
    finally:
        publisher.close()
        engine.dispose()


def worker(
    model: Annotated[list[str] | None, typer.Option(help="Serve this model; may be repeated. Default: all.")] = None,
    devices: Annotated[str, typer.Option(help="all, cpu, or CUDA devices by number: 0,1.")] = "all",
    replicas: Annotated[
        int | None, typer.Option(min=1, max=64, help="Children per device. Default: 2 where two copies fit.")
    ] = None,
    precision: Precision = None,
) -> None:
    """Claim chunks and embed them, on every GPU of this machine or on its CPU.

    Examples:

        vectormill worker

        vectormill worker --model all-MiniLM-L6-v2 --devices 0,1 --replicas 2 --precision float32
    """
    settings = load_settings()
    database, redis = server_urls(settings)
    chosen = _choose_devices(devices)
    memory_bytes = min(device.memory_bytes for device in chosen)
    each = replicas or _default_replicas(database, memory_bytes, model or [])
    environment = {
        "VECTORMILL_DATABASE_URL": database,
        "VECTORMILL_REDIS_URL": redis,
        "VECTORMILL_WORKER_MODELS": ",".join(model or []),
        "VECTORMILL_WORKER_DEVICES": ",".join(device.name for device in chosen),
        "VECTORMILL_WORKER_DEVICE_KINDS": ",".join(device.kind for device in chosen),
        "VECTORMILL_WORKER_REPLICAS": str(each),
        "VECTORMILL_WORKER_MEMORY_BYTES": str(memory_bytes),
        "VECTORMILL_WORKER_DTYPE": _precision(precision or settings.worker_dtype, chosen),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **_tokenizer_threads(chosen, each),
    }
    if settings.metrics_port is not None:
        environment[metrics_server.FOLDER_VARIABLE] = str(metrics_server.make_folder())
    arguments = ["--hostname", _node_name(chosen), "--concurrency", str(len(chosen) * each), "--pool", "prefork"]
    alone = ["--without-gossip", "--without-mingle"]  # workers coordinate through Postgres only
    _become([*_CELERY, "worker", *arguments, *alone, "--loglevel", settings.log_level], environment)


def engine(
    model: Annotated[
        list[str] | None, typer.Option(help="Serve this model, loaded at the start; may be repeated. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, a CUDA device by number, or all: the first one found.")] = "all",
    precision: Precision = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; one beyond this machine needs VECTORMILL_ENGINE_SECRET.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = None,
) -> None:
    """Serve local models to the api, and batch the texts of many requests together. Run one process for each device.

    Without --model it serves all local models of the catalogue, each loaded at its first request.

    Examples:

        vectormill engine

        vectormill engine --model all-MiniLM-L6-v2 --device 0 --precision float32
    """
    settings = load_settings()
    one = _choose_devices(device)[0]
    chosen = {
        "VECTORMILL_DATABASE_URL": database_url(settings),
        "VECTORMILL_WORKER_MODELS": ",".join(model or []),
        "VECTORMILL_WORKER_DEVICES": one.name,
        "VECTORMILL_WORKER_MEMORY_BYTES": str(one.memory_bytes),
        "VECTORMILL_WORKER_DTYPE": _precision(precision or settings.worker_dtype, [one]),
        "VECTORMILL_ENGINE_HOST": host,
        "VECTORMILL_ENGINE_PORT": None if port is None else str(port),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    _become(["workers.engine.server"], {name: value for name, value in chosen.items() if value is not None})


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port. Default: 8000.")] = None,
) -> None:
    """Serve the dashboard, /api for jobs, and /v1, the OpenAI-compatible gateway. It loads no model: for
    local models, /v1 needs engines.

    Examples:

        vectormill api

        vectormill api --host 0.0.0.0 --port 80
    """
    from pipeline.api.app import make_app
    from pipeline.infra import http_server

    settings = load_settings()
    configure_logs(settings.log_level)
    database, redis = server_urls(settings)
    app = make_app(settings, database, redis)
    http_server.run(
        app,
        metrics.API_CONNECTIONS_CLOSED,
        host=host or settings.api_host,
        port=settings.api_port if port is None else port,
    )


_FLOWER_CONFIG = Path(__file__).with_name("flowerconfig.py")


def flower() -> None:
    """Show Celery's tasks and workers in a browser, behind a password, by default on loopback only.

    Tasks can be found by job and chunk.

    Example: VECTORMILL_FLOWER_PASSWORD=… vectormill flower
    """
    settings = load_settings()
    database, redis = server_urls(settings)
    if settings.flower_password is None:
        raise UserError("set VECTORMILL_FLOWER_PASSWORD; without it Flower's pages would be open.")
    environment = {"VECTORMILL_DATABASE_URL": database, "VECTORMILL_REDIS_URL": redis}
    _become([*_CELERY, "flower", f"--conf={_FLOWER_CONFIG}"], environment)


def _precision(wish: str, devices: Sequence[_Device]) -> str:
    """Return a valid precision, after a note if a device doesn't compute in the one that is named."""
    if wish not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f'--precision "{wish}": choose auto, float32, bfloat16 or float16.')
    others = [device.name for device in devices if not device.name.startswith("cuda:")]
    if others and wish not in ("auto", "float32"):
        stderr.print(f"{wish} is for CUDA devices; {others[0]} computes in float32.", markup=False)
    return wish


def _tokenizer_threads(devices: Sequence[_Device], replicas: int) -> dict[str, str]:
    """Return the environment of the tokenisers: beside a GPU they share the cores, which a model on a CPU needs."""
    if devices[0].kind == "cpu":
        return {"TOKENIZERS_PARALLELISM": "false"}
    threads = (os.cpu_count() or 1) // (len(devices) * replicas)
    return {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(max(1, threads))}


def _become(module: list[str], more: dict[str, str]) -> None:
    """Replace this process by another program of ours or Celery's, so that signals reach it."""
    environment = our_environment({**more, "VECTORMILL_HOME": str(load_settings().home)})
    os.chdir("/")  # Celery imports modules from the working directory, even if Python itself does not
    os.execve(sys.executable, our_module(*module), environment)  # noqa: S606 - no shell is what we want  # nosec B606


def _choose_devices(wish: str) -> list[_Device]:
    """Return the devices that `--devices` names."""
    found = [_Device(*each) for each in oneshot(["devices"])]
    if wish == "all":
        return found
    if wish == "cpu":
        return [_Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "cpu")]
    known = {device.name: device for device in found}
    names = [part if part.startswith(("cuda:", "mps")) else f"cuda:{part}" for part in wish.split(",")]
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(f"--devices {wish}: no {missing[0]} here; available: {', '.join(known)}.")
    return [known[name] for name in names]


def _node_name(devices: Sequence[_Device]) -> str:
    """Return Celery's name of a worker, new at each start: cpu-1a2b3c@host, or cuda0.cuda1-1a2b3c@host."""
    names = ".".join(device.name.replace(":", "") for device in devices)
    return f"{names}-{token_hex(3)}@{socket.gethostname()}"


def _default_replicas(url: str, memory_bytes: int, only: list[str]) -> int:
    """Return 2 if two copies of the largest model fit in 80 % of the device's memory, else 1.

    With no model in the catalogue, the bundled one counts: the first start of an `up` adds it meanwhile.
    """
    from pipeline.cli.bootstrap import bundled_model_bytes
    from pipeline.db import models
    from pipeline.db.database import make_engine

    engine = make_engine(url, application="vectormill-cli", pool_size=1)
    with engine.begin() as connection:
        rows = models.every(connection)
    engine.dispose()
    if unknown := set(only) - {name for row in rows for name in (row["name"], *row["aliases"])}:
        stderr.print(f"Not in the catalogue yet, served as soon as it is: {', '.join(sorted(unknown))}", markup=False)
    sizes = [row["weights_bytes"] for row in rows if not only or {row["name"], *row["aliases"]} & set(only)]
    copy_bytes = max(sizes, default=bundled_model_bytes()) * ROOM_FACTOR + _LIBRARIES_BYTES
    return 2 if 2 * copy_bytes <= memory_bytes * MODELS_SHARE else 1
