"""Settings that stand in files."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.settings import load_settings


def test_secrets_are_read_from_the_files_that_variables_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("database_url", "redis_url", "flower_password"):
        (tmp_path / name).write_text(f"redis://secret {name}\n")
        monkeypatch.setenv(f"VECTORMILL_{name.upper()}_FILE", str(tmp_path / name))
    settings = load_settings()
    for name in ("database_url", "redis_url", "flower_password"):
        assert getattr(settings, name).get_secret_value() == f"redis://secret {name}"
    assert "secret " not in repr(settings)


@pytest.mark.parametrize("content", [None, ""])
def test_a_secret_whose_file_says_nothing_is_a_mistake(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("VECTORMILL_REDIS_URL_FILE", str(file))
    with pytest.raises(UserError, match="VECTORMILL_REDIS_URL_FILE: name a file"):
        load_settings()


def test_a_redis_url_of_another_kind_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTORMILL_REDIS_URL", "http://:sesame@cache")
    with pytest.raises(UserError, match=r"VECTORMILL_REDIS_URL: .*write redis:") as caught:
        load_settings()
    assert "sesame" not in str(caught.value)
