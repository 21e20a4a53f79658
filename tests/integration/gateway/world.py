"""Job whose model is behind a scripted upstream."""

from typing import Any

import numpy as np
from sqlalchemy import Engine

from pipeline.catalog.models import add_gateway, find_model, workspace_id
from pipeline.core.chunks import Claim
from pipeline.core.models import Model, Upstream
from tests.support.jobs_made import chunk_rows, make_job, run_sql, taken
from tests.support.scripted_gateway import ScriptedGateway, vector_of
from workers.runner.run_chunk import run_chunk
from workers.upstream.attempts import Attempts
from workers.upstream.client import UpstreamClient
from workers.upstream.encoder import UpstreamEncoder
from workers.upstream.probe import describe
from workers.upstream.rate_limiter import RateLimiter, connect
from workers.upstream.state import UpstreamState
from workers.watchdog import Watch

ITEMS = 40


def upstream_of(far: ScriptedGateway) -> Upstream:
    """Return the upstream's settings before anything is known of its replies."""
    return Upstream(
        url=far.url,
        model="embed-1",
        reply_model=None,
        key_env="FAR_KEY",
        base64=True,
        request_inputs=8,
        request_tokens=100_000,
    )


class World:
    """Job of `ITEMS` items in one chunk, whose model is behind an upstream."""

    def __init__(self, engine: Engine, redis_url: str, far: ScriptedGateway) -> None:
        self.engine, self.redis_url = engine, redis_url
        asked = upstream_of(far)
        with engine.begin() as connection:
            add_gateway(connection, "far", asked, describe(asked))
            self.model = find_model(connection, workspace_id(connection), "far")
        self.memory = UpstreamState()
        self.job = make_job(engine, self.model, ITEMS, per_chunk=ITEMS)
        far.requests.clear()

    def run(
        self,
        claim: Claim | None = None,
        *,
        model: Model | None = None,
        seconds: float = 5.0,
        watch: Watch | None = None,
    ) -> None:
        """Run the chunk as a worker does."""
        model = model or self.model
        assert model.upstream
        claim = claim or taken(self.engine, self.job)
        watch = watch or Watch(60, 60)
        attempts = Attempts(self.engine, claim, model.name, watch)
        with (
            UpstreamClient(model.upstream, seconds=seconds, in_flight=3) as client,
            connect(self.redis_url) as redis,
        ):
            limiter = RateLimiter(redis, model.upstream, request_seconds=seconds)
            encoder = UpstreamEncoder(model, client, limiter, attempts, self.memory, in_flight=3)
            run_chunk(self.engine, encoder, claim, watch, on_hang=lambda: None)

    @property
    def chunk(self) -> dict[str, Any]:
        """The chunk's row."""
        (row,) = chunk_rows(self.engine, self.job)
        return dict(row)

    def must_be_done(self, embedded: int = ITEMS) -> None:
        """Check that the chunk is done, and that each embedded item has its own vector."""
        chunk = self.chunk
        assert (chunk["state"], chunk["embedded"], chunk["crashes"]) == ("done", embedded, 0)
        rows = run_sql(self.engine, "select index, vector::real[], tokens from vectormill.embeddings order by index")
        assert len(rows) == embedded
        for index, vector, _ in rows:
            np.testing.assert_allclose(vector, vector_of(f"text {index}"), atol=1e-6)

    def rejects(self) -> list[tuple[int, str]]:
        """Return the index and code of each reject."""
        return [(row[0], row[1]) for row in run_sql(self.engine, "select index, code from vectormill.rejects")]

    def statuses(self) -> set[str]:
        """Return the distinct statuses of the attempts."""
        return {row[0] for row in run_sql(self.engine, "select distinct status from vectormill.attempts")}
