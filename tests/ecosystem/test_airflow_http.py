"""Airflow's runs of http_job.py and http_sync.py in ops/schedulers/airflow."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2 as httpx

from tests.ecosystem.conftest import Airflow, by_http


def _texts(day: str) -> list[dict[str, str]]:
    """Return rows of texts that no other day has: each of them is embedded once in a workspace."""
    return [{"id": f"a{n}", "text": f"on {day} the mill grinds {n} sacks"} for n in range(120)]


def test_a_job_completes_and_a_second_run_attaches(airflow: Airflow) -> None:
    site = airflow.site
    texts = _texts("2026-11-24")
    site.write("2026-11-24.jsonl", texts)
    before = site.embedded()
    done = airflow.run("http_job", "2026-11-24")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert site.jobs("articles-2026-11-24") == ["completed"]
    assert airflow.run("http_job", "2026-11-24").returncode == 0
    assert site.jobs("articles-2026-11-24") == ["completed"]
    assert site.embedded() == before + len(texts)


def test_a_failed_job_fails_the_run(airflow: Airflow) -> None:
    texts = _texts("2026-11-25")
    airflow.site.write("2026-11-25.jsonl", [row if n % 5 else {"id": row["id"]} for n, row in enumerate(texts)])
    done = airflow.run("http_job", "2026-11-25")
    assert done.returncode != 0
    assert "too_many_rejects" in done.stdout + done.stderr
    assert airflow.site.jobs("articles-2026-11-25") == ["failed"]


def test_a_missing_file_fails_the_run(airflow: Airflow) -> None:
    done = airflow.run("http_job", "2026-11-26")
    assert done.returncode != 0
    assert airflow.site.jobs("articles-2026-11-26") == []


def test_a_lost_answer_is_asked_for_again_with_the_same_key(airflow: Airflow) -> None:
    """The job exists when the answer to its submission is lost; then a load balancer finds no api."""
    site = airflow.site
    texts = _texts("2026-11-27")
    site.write("2026-11-27.jsonl", texts)
    before = site.embedded()
    with _behind_a_bad_line(site.gateway.url) as (url, sent):
        done = airflow.run("http_job", "2026-11-27", AIRFLOW_CONN_VECTORMILL=by_http(url, site.gateway.key))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [key for method, key in sent if method == "POST"] == ["articles-2026-11-27"] * 2
    assert site.jobs("articles-2026-11-27") == ["completed"]
    assert site.embedded() == before + len(texts)


def test_a_table_is_kept_in_step(airflow: Airflow) -> None:
    site, cases = airflow.site, {"collection": "cases"}
    site.collection("cases")
    rows = [{"id": f"h{n}", "subject": f"case {n}", "body": "the wheel is stuck"} for n in range(110)]
    site.write("cases.jsonl", rows)
    for _ in range(2):
        done = airflow.run("http_sync", "2026-11-20", parameters=cases)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    site.write("cases.jsonl", [{**rows[0], "body": "it turns again"}, *rows[1:-1]])
    assert airflow.run("http_sync", "2026-11-21", parameters=cases).returncode == 0
    assert site.syncs("cases") == [(110, 0, 0, 0), (0, 1, 108, 1)]
    site.write("cases.jsonl", rows[:5])
    shrunk = airflow.run("http_sync", "2026-11-22", parameters=cases)
    assert shrunk.returncode != 0
    assert "too_many_removed" in shrunk.stdout + shrunk.stderr


@contextmanager
def _behind_a_bad_line(api: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Run a proxy of an api that loses its first answer to a POST, and gives a 503 to the first GET. Yield its URL, and
    a list of the methods and idempotency keys of the requests."""
    sent: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            wanted = {name: self.headers[name] for name in ("authorization", "content-type", "idempotency-key")}
            headers = {name: value for name, value in wanted.items() if value}
            reply = httpx.request(self.command, api + self.path, content=body, headers=headers, timeout=60)
            sent.append((self.command, self.headers["idempotency-key"]))
            first = Counter(method for method, _ in sent)[self.command] == 1
            if first and self.command == "POST":
                self.close_connection = True
                return
            self.send_response(503 if first else reply.status_code)
            self.send_header("content-type", reply.headers["content-type"])
            self.send_header("content-length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()
