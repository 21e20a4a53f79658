"""Settings read from files."""

from base64 import b64encode
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.infra.settings import load_settings


def test_secrets_are_read_from_the_files_that_variables_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "database_url": "a secret",
        "redis_url": "redis://:another%20secret@here",
        "sql_url": "postgresql://etl:a%20secret@here/x",
        "flower_password": "a third secret",
        "webhook_secret": f"{whsec(b'a' * 24)} {whsec(b'b' * 64)}",
        "engine_secret": "a secret of engines",
    }
    for name, secret in secrets.items():
        (tmp_path / name).write_text(f"{secret}\n")
        monkeypatch.setenv(f"VECTORMILL_{name.upper()}_FILE", str(tmp_path / name))
    settings = load_settings()
    for name, secret in secrets.items():
        assert getattr(settings, name).get_secret_value() == secret
        assert secret not in repr(settings)


def whsec(key: bytes) -> str:
    return f"whsec_{b64encode(key).decode()}"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("WEBHOOK_SECRET", "guess", "whsec_ and base64 of 24 to 64 bytes"),
        ("WEBHOOK_SECRET", whsec(b"a" * 23), "whsec_ and base64 of 24 to 64 bytes"),
        ("WEBHOOK_SECRET", f"{whsec(b'a' * 24)} whsec_a?b", "whsec_ and base64 of 24 to 64 bytes"),
        ("ENGINE_SECRET", "guess", "16"),
        ("SQL_URL", "duckdb:///guess", "write postgresql://user:password@host/name"),
    ],
)
def test_what_is_wrong_with_a_secret_is_said_without_it(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"VECTORMILL_{name}", value)
    with pytest.raises(UserError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"VECTORMILL_{name}: ")
    assert told in str(caught.value)
    assert value not in str(caught.value)


@pytest.mark.parametrize("content", [None, ""])
def test_a_secret_whose_file_says_nothing_is_a_mistake(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("VECTORMILL_REDIS_URL_FILE", str(file))
    with pytest.raises(UserError, match="VECTORMILL_REDIS_URL_FILE: give an absolute path"):
        load_settings()


def test_a_redis_url_of_another_kind_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTORMILL_REDIS_URL", "http://:sesame@cache")
    with pytest.raises(UserError, match=r"VECTORMILL_REDIS_URL: .*write redis:") as caught:
        load_settings()
    assert "sesame" not in str(caught.value)
