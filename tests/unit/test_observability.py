"""Consistency of rules, runbooks and the Grafana dashboard, whose queries use listed metrics and their labels."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.scraping import ADDED, asked_for, dashboard_queries, grouped_by, panels, rule_queries, series

_OPS = Path(__file__).resolve().parents[2] / "ops"

#: Runbooks that no alert leads to.
_OF_NO_ALERT = {"Backup", "Restore", "Failover"}


def _alerts() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((_OPS / "prometheus" / "rules.yml").read_text())["groups"]:
        yield from (rule for rule in group["rules"] if "alert" in rule)


def test_queries_ask_for_metrics_of_the_list_by_their_own_labels() -> None:
    known = series()
    for where, query in (*rule_queries(), *dashboard_queries()):
        labels = set(ADDED) | {"le"} | ({"alertname", "severity"} if "ALERTS" in query else set())
        for name, selected in asked_for(query):
            assert name in known, f"{where} asks for {name}"
            of_metric = set(known[name].labels) | ADDED | ({"le"} if name.endswith("_bucket") else set())
            assert selected <= of_metric, f"{where} selects {name} by {selected - of_metric}"
            labels |= of_metric
        assert grouped_by(query) <= labels, where


def test_what_rules_record_is_recorded() -> None:
    whole = (_OPS / "prometheus" / "rules.yml").read_text()
    records = set(re.findall(r"record: (\S+)", whole))
    for where, query in (*rule_queries(), *dashboard_queries()):
        assert set(re.findall(r"vectormill:[\w:]+", query)) <= records, where


def test_every_alert_says_what_it_is_and_has_its_page() -> None:
    pages = {page.stem for page in (_OPS / "runbooks").glob("*.md")} - {"README"} - _OF_NO_ALERT
    names = [alert["alert"] for alert in _alerts()]
    assert len(names) == len(set(names))
    assert set(names) == pages
    for alert in _alerts():
        notes = alert["annotations"]
        assert notes.keys() == {"summary", "description", "runbook"}, alert["alert"]
        assert all(notes.values())
        assert "{{ $value" in notes["summary"] or re.search(r"\d", notes["summary"]), f"{alert['alert']}: how much?"
        assert alert["for"], "a scrape that is missed is no alarm"
        assert alert["labels"]["severity"] in ("critical", "warning")
        page = (_OPS.parent / notes["runbook"]).read_text()
        assert page.startswith(f"# {alert['alert']}\n")
        headings = re.findall(r"^## (.*)", page, re.MULTILINE)
        assert headings == ["What users notice", "Look", "Do", "Over when"], alert["alert"]
        for link in re.findall(r"\]\((\w+)\.md\)", page):
            assert link in pages | _OF_NO_ALERT, f"{alert['alert']} points to {link}"


def test_every_alert_is_tried() -> None:
    tried = (_OPS / "prometheus" / "rules_test.yml").read_text()
    assert set(re.findall(r'alertname="(\w+)"', tried)) == {alert["alert"] for alert in _alerts()}


def test_every_panel_says_what_it_shows() -> None:
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    titles = {panel["title"] for panel in found if panel["type"] != "row"}
    for panel in found:
        assert panel["title"], panel["id"]
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["expr"] for target in panel["targets"]), panel["title"]
    for page in (_OPS / "runbooks").glob("*.md"):
        for title in set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", page.read_text())) - {"Targets"}:
            assert title in titles, f"{page.name} sends to a panel {title}"


def test_panels_do_not_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken.get((x, y))}"
                taken[x, y] = panel["title"]


def test_grafana_finds_its_dashboard_and_prometheus() -> None:
    folder = _OPS / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((folder / "dashboards" / "vectormill.yml").read_text())["providers"]
    compose = yaml.safe_load((_OPS.parent / "docker-compose.yml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounted["./ops/grafana/dashboards"] == provider["options"]["path"]
    assert json.loads((_OPS / "grafana" / "dashboards" / "vectormill.json").read_text())["uid"] == "vectormill"


def test_prometheus_scrapes_what_compose_runs() -> None:
    compose = yaml.safe_load((_OPS.parent / "docker-compose.yml").read_text())["services"]
    whole = yaml.safe_load((_OPS / "prometheus" / "prometheus.yml").read_text())
    (port_of_api, port_of_engine) = (
        compose[name]["environment"][f"VECTORMILL_{name.upper()}_PORT"] for name in ("api", "engine")
    )
    ports = {"api": port_of_api, "engine": port_of_engine}
    scraped = {}
    for job in whole["scrape_configs"]:
        (found,) = job["dns_sd_configs"]
        scraped[job["job_name"]] = found["names"]
        for name in found["names"]:
            environment = compose[name]["environment"]
            expected = ports.get(name, environment.get("VECTORMILL_METRICS_PORT"))
            assert found["port"] == expected, name
            if name not in ports:
                assert environment["VECTORMILL_METRICS_HOST"] == "0.0.0.0", name
    assert scraped == {
        "api": ["api"],
        "engine": ["engine"],
        "dispatcher": ["dispatcher"],
        "worker": ["worker", "worker-gpu"],
    }
