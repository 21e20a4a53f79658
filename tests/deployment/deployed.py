"""Deployment for the doctor to examine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from sqlalchemy import Engine

from pipeline.catalog import models
from pipeline.core.models import Upstream
from pipeline.doctor.context import Context
from pipeline.infra.settings import Settings
from tests.acceptance.fleet import Fleet, eventually
from tests.support.jobs_made import run_sql

KEY = "NEAR_KEY"


#: Role that runs the queries of requests in SQL.
QUERIES = "doctors_queries"


@dataclass(frozen=True)
class Deployment:
    """Dispatcher, worker, engine and api, with the models `static` and `near`; `near` is an upstream's."""

    fleet: Fleet
    engine: Engine
    database_url: str
    redis_url: str
    api_url: str
    home: Path

    def context(self) -> Context:
        """Return the context that the doctor examines."""
        return Context(
            settings=self.settings(),
            database_url=self.database_url,
            redis_url=self.redis_url,
            api_url=self.api_url,
            flower_url=None,
            flower_password="long enough by far",
            canary_seconds=60,
        )

    def settings(self, **more: Any) -> Settings:
        """Return the dispatcher's settings, with those of `more` changed."""
        login = self.database_url.replace(self.database_url.split("//")[1].split("@")[0], f"{QUERIES}:secret")
        return Settings(
            home=self.home,
            **{
                "sql_url": SecretStr(login),
                "webhooks": ("https://etl.example.com/hooks",),
                "webhook_secret": SecretStr(f"whsec_{'YWFh' * 8}"),
                **more,
            },
        )

    def start_api(self) -> None:
        """Start the api."""
        self.fleet.start("api", "pipeline.cli", "api", "--port", self.api_url.rsplit(":", 1)[1])

    def start_engine(self) -> None:
        """Start an engine, and wait until it has registered."""
        run_sql(self.engine, "delete from vectormill.engines")
        self.fleet.start("engine", "workers.engine.server", VECTORMILL_WORKER_MODELS="static")
        eventually(lambda: self.fleet.scalar("select count(*) from vectormill.engines"), "an engine")

    def start_worker(self) -> None:
        """Start a worker that has the key of `near`."""
        self.fleet.start_worker(replicas=1)

    def end(self, name: str) -> None:
        """Ask a process to end, and wait for that."""
        process = self.fleet.processes.pop(name)
        process.terminate()
        process.wait(60)


def add_gateway(engine: Engine, name: str, variable: str) -> None:
    canary = np.ones(4, "<f4").tobytes().hex()
    description = {"dimensions": 4, "normalised": False, "canary": canary, "tokens_per_second": 1000.0}
    upstream = Upstream(
        url="http://127.0.0.1:1/v1",
        model=name,
        reply_model=None,
        key_env=variable,
        base64=True,
        request_inputs=8,
        request_tokens=1000,
    )
    with engine.begin() as connection:
        models.add_gateway(connection, name, upstream, {**description, "base64": True})
