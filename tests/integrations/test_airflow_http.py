"""ops/schedulers/airflow/http_job.py, run by Airflow."""

from tests.integrations.conftest import Airflow

_TEXTS = [{"id": f"a{n}", "text": f"in November the mill grinds {n} sacks"} for n in range(120)]


def test_a_job_completes_and_a_second_run_attaches(airflow: Airflow) -> None:
    site = airflow.site
    site.write("2026-11-24.jsonl", _TEXTS)
    before = site.embedded()
    done = airflow.run("http_job", "2026-11-24")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert site.jobs("articles-2026-11-24") == ["completed"]
    assert airflow.run("http_job", "2026-11-24").returncode == 0
    assert site.jobs("articles-2026-11-24") == ["completed"]
    assert site.embedded() == before + len(_TEXTS)


def test_a_failed_job_fails_the_run(airflow: Airflow) -> None:
    airflow.site.write("2026-11-25.jsonl", [row if n % 5 else {"id": row["id"]} for n, row in enumerate(_TEXTS)])
    done = airflow.run("http_job", "2026-11-25")
    assert done.returncode != 0
    assert "too_many_rejects" in done.stdout + done.stderr
    assert airflow.site.jobs("articles-2026-11-25") == ["failed"]


def test_a_missing_file_fails_the_run(airflow: Airflow) -> None:
    done = airflow.run("http_job", "2026-11-26")
    assert done.returncode != 0
    assert airflow.site.jobs("articles-2026-11-26") == []
