"""Child processes of `up`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.api.gateway.engines import MOST_SECONDS
from pipeline.embedded import stages
from pipeline.embedded.runtime import Running
from pipeline.infra.settings import Settings


def _running(**more: Any) -> Running:
    return Running(
        home=Path("/nowhere"),
        supervisor_pid=1,
        supervisor_started=0,
        database_url="postgresql://here/x",
        redis_url="redis://here/0",
        api_url="http://127.0.0.1:8000",
        flower_url="http://127.0.0.1:5555",
        flower_password="secret",
        ready=False,
        children=(),
        **more,
    )


def test_each_shows_its_metrics_at_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_database_time", lambda _: datetime.now(UTC))
    monkeypatch.setenv("VECTORMILL_METRICS_PORT", "1")
    ports = {name: 20_000 + at for at, name in enumerate(stages.metered_names(2))}
    running = _running(metrics_ports=ports)
    children = {child.name: child.env for stage in stages.app_stages(running, 2) for child in stage}
    for name in ("dispatcher", "worker-1", "worker-2"):
        assert children[name]["VECTORMILL_METRICS_PORT"] == str(ports[name])
        assert children[name]["VECTORMILL_METRICS_HOST"] == "127.0.0.1"
    assert children["engine"]["VECTORMILL_ENGINE_PORT"] == str(ports["engine"])
    assert running.metrics_urls == [
        "http://127.0.0.1:8000/metrics",
        *(f"http://127.0.0.1:{ports[name]}/metrics" for name in ("engine", "dispatcher", "worker-1", "worker-2")),
    ]


def test_requests_are_finished_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The api stops before the engine that it needs, and both may take as long as the longest request."""
    monkeypatch.setattr(stages, "_database_time", lambda _: datetime.now(UTC))
    running = _running()
    found = [{child.name: child for child in stage} for stage in stages.app_stages(running, 1)]
    (at_api,), (at_engine,) = ([n for n, stage in enumerate(found) if name in stage] for name in ("api", "engine"))
    assert at_api > at_engine
    (upstream,) = (bound.le for bound in Settings.model_fields["gateway_seconds"].metadata if hasattr(bound, "le"))
    longest = max(MOST_SECONDS, upstream)
    for at, name in ((at_api, "api"), (at_engine, "engine")):
        assert found[at][name].stop_grace_seconds > longest
    graces = [max(child.stop_grace_seconds for child in stage.values()) for stage in found]
    assert sum(graces) < stages.STOP_SECONDS


@pytest.mark.parametrize(("own", "wanted"), [(True, "postgresql://here/x"), (False, None)])
def test_only_on_a_database_of_its_own_do_queries_run_as_its_owner(
    own: bool, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_database_time", lambda _: datetime.now(UTC))
    found = {
        child.env.get("VECTORMILL_SQL_URL")
        for stage in stages.app_stages(_running(), 1, queries_as_owner=own)
        for child in stage
        if child.name == "dispatcher"
    }
    assert found == {wanted}
