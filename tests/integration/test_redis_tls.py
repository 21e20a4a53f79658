"""Redis over TLS, with each of our clients: only a server that has proven its identity gets a password."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flower.utils.broker import Broker
from kombu.exceptions import OperationalError
from pydantic import SecretStr
from uuid_utils.compat import uuid7

from pipeline.broker import ChunkMessage, Publisher, celery_settings
from pipeline.core.errors import ServiceUnreachable, UserError
from pipeline.doctor.servers import encryption
from pipeline.infra.settings import Settings, load_settings, verifying
from workers.upstream.rate_limiter import connect


@dataclass
class Impostor:
    """TLS proxy of a real Redis, with a self-signed certificate. It records what clients send."""

    url: str
    certificate: Path
    heard: bytearray = field(default_factory=bytearray)


@pytest.fixture
def impostor(redis_url: str, tmp_path: Path) -> Iterator[Impostor]:
    with _encrypted(redis_url, tmp_path, "127.0.0.1") as made:
        yield made


@contextmanager
def _encrypted(redis_url: str, folder: Path, name: str) -> Iterator[Impostor]:
    there = urlsplit(redis_url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(folder, name))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    made = Impostor(
        there._replace(scheme="rediss", netloc=there.netloc.rpartition(":")[0] + f":{port}").geturl(),
        folder / f"{name}.pem",
    )
    with ExitStack() as opened:
        opened.callback(listener.close)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=serve, args=(client,), daemon=True).start()

        def serve(client: socket.socket) -> None:
            with (
                suppress(OSError),
                context.wrap_socket(client, server_side=True) as secure,
                socket.create_connection((there.hostname or "", there.port or 0)) as real,
            ):
                threading.Thread(target=_pump, args=(real, secure, None), daemon=True).start()
                _pump(secure, real, made.heard)

        threading.Thread(target=accept, daemon=True).start()
        yield made
        listener.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket, heard: bytearray | None) -> None:
    with suppress(OSError):
        while piece := source.recv(65_536):
            if heard is not None:
                heard += piece
            target.sendall(piece)


def _certificate(folder: Path, name: str) -> Path:
    """Write a key and its self-signed certificate to one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if name[0].isdigit():
        names = [x509.IPAddress(ip_address(name))]
    made = (
        x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / f"{name}.pem"
    file.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return file


def _publish(url: str) -> None:
    publisher = Publisher(url)
    try:
        publisher.publish(
            "tls", ChunkMessage(job_id=uuid7(), chunk_id=1, job="job", model="tls", ordinal=0, chunks=1, items=1)
        )
    finally:
        publisher.close()


def _count(url: str) -> None:
    publisher = Publisher(url)
    try:
        publisher.waiting(["tls"])
    finally:
        publisher.close()


def _listen(url: str) -> None:
    """Connect as a worker does, by Celery's own connection."""
    app = Celery("tests", set_as_current=False)
    app.conf.update(celery_settings(url))
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        connection.default_channel.client.ping()


def _look(url: str) -> None:
    """Look at a queue as Flower does."""
    settings = celery_settings(url)
    broker = Broker(settings["broker_url"], broker_options={}, broker_use_ssl=settings["broker_use_ssl"])
    asyncio.run(broker.queues(["embed.tls"]))


def _limiter(url: str) -> None:
    with connect(verifying(url)) as client:
        client.ping()


_REFUSED = (ServiceUnreachable, OperationalError, redis.RedisError, OSError)
_CLIENTS: list[Callable[[str], Any]] = [_publish, _count, _listen, _look, _limiter]


@pytest.mark.parametrize("use", _CLIENTS)
def test_a_server_that_proves_nothing_hears_nothing(impostor: Impostor, use: Callable[[str], Any]) -> None:
    with pytest.raises(_REFUSED):
        use(impostor.url)
    assert bytes(impostor.heard) == b""


@pytest.mark.parametrize("use", _CLIENTS)
def test_a_private_authority(impostor: Impostor, use: Callable[[str], Any]) -> None:
    settings = Settings(redis_url=SecretStr(impostor.url), redis_ca=impostor.certificate)
    assert settings.redis_url
    use(settings.redis_url.get_secret_value())
    assert b"AUTH" in bytes(impostor.heard).upper()


@pytest.mark.parametrize("use", _CLIENTS)
def test_a_certificate_of_another_name(redis_url: str, tmp_path: Path, use: Callable[[str], Any]) -> None:
    with _encrypted(redis_url, tmp_path, "elsewhere.test") as other:
        with pytest.raises(_REFUSED):
            use(verifying(other.url, other.certificate))
        assert bytes(other.heard) == b""


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_that_holds_no_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    monkeypatch.setenv("VECTORMILL_REDIS_CA", str(file))
    with pytest.raises(UserError, match=r"VECTORMILL_REDIS_CA: .*readable file of pem certificates"):
        load_settings()


@pytest.mark.parametrize(
    ("database", "broker", "warned"),
    [
        ("postgresql://v@db.test/v", "redis://r.test/0", ["database", "Redis"]),
        ("postgresql://v@db.test/v?sslmode=require", "rediss://r.test/0?ssl_cert_reqs=none", ["database", "Redis"]),
        ("postgresql://v@db.test/v?sslmode=verify-full", "rediss://r.test/0", []),
        ("postgresql://v@127.0.0.1/v", "redis://:p@localhost/0", []),
        ("postgresql://v@127.0.0.1:1,db.test:2/v?target_session_attrs=read-write", "redis://localhost/0", ["database"]),
        ("postgresql:///v?host=db.test", "redis://localhost/0", ["database"]),
    ],
)
def test_the_doctor_warns_of_what_isnt_verified(database: str, broker: str, warned: list[str]) -> None:
    found = [finding.found for finding in encryption(database, verifying(broker)) if finding.state == "warn"]
    assert [next(name for name in ("database", "Redis") if name in each) for each in found] == warned
