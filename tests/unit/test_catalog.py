"""Gateway addresses that the catalogue accepts, and gateway keys read from the environment."""

from pathlib import Path

import pytest

from pipeline.catalog.models import gateway_url
from pipeline.core.errors import UserError
from pipeline.infra.settings import read_key


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/embeddings/", "https://api.openai.com/v1"),
        ("http://10.0.0.1:8080", "http://10.0.0.1:8080/v1"),
        ("http://[::1]:8080/v1", "http://[::1]:8080/v1"),
        ("https://example.org/deployments/a?api-version=1", "https://example.org/deployments/a?api-version=1"),
    ],
)
def test_a_gateways_address(given: str, kept: str) -> None:
    assert gateway_url(given) == kept


@pytest.mark.parametrize(
    "given",
    [
        "example.org/v1",
        "ftp://example.org",
        "https://",
        "http://[::1/v1",
        "http://example.org:99999/v1",
        "http://example.org:port/v1",
        "http://example.org/v1#there",
        "http://exämple.org/v1",
        "http://example.org/v 1",
        "https://user:secret@example.org/v1",
    ],
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(UserError) as refused:
        gateway_url(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("held", "read"), [("sk-one\n", "sk-one"), ("", None), ("sk-\none", None), ("schlüssel", None)]
)
def test_a_key_is_what_a_header_can_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str, read: str | None
) -> None:
    file = tmp_path / "key"
    file.write_text(held, encoding="utf-8")
    monkeypatch.setenv("FAR_KEY_FILE", str(file))
    assert read_key("FAR_KEY") == read
    monkeypatch.delenv("FAR_KEY_FILE")
    monkeypatch.setenv("FAR_KEY", held)
    assert read_key("FAR_KEY") == read
