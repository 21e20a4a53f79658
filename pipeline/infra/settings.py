"""Settings from environment variables, which only this module reads, and only when it is asked to."""

import hashlib
import os
import ssl
from base64 import b64decode
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pipeline.core.errors import UserError

#: The share of a device's memory that loaded models may take.
MODELS_SHARE = 0.8
#: A loaded model takes its weights, and roughly as much again for the widest batch.
ROOM_FACTOR = 2

_CHECKOUT = Path(__file__).resolve().parents[2]
_IS_CHECKOUT = (_CHECKOUT / "pyproject.toml").exists()
_MIB = 1024 * 1024


class Settings(BaseSettings):
    """Everything that an operator can set, as `VECTORMILL_<NAME>`. Each field has its bounds."""

    model_config = SettingsConfigDict(env_prefix="VECTORMILL_", frozen=True, extra="ignore")

    #: Postgres with pgvector, as `postgresql://…`. Unset: the embedded server.
    database_url: SecretStr | None = None
    #: Certificates (PEM) of authorities that are trusted for a Redis at `rediss://…`, besides the system's.
    redis_ca: Path | None = None
    #: Redis or Valkey, as `redis://…`. Unset: the embedded server.
    redis_url: SecretStr | None = None
    #: Login that runs the queries of the SQL function `vectormill.submit`: a role in Postgres that may read what they
    #: select from, and nothing else. Unset: the embedded server's own; without one, requests are refused.
    sql_url: SecretStr | None = None
    #: Time limit of such a query, from its start to its last row; only two run at a time.
    sql_seconds: float = Field(default=3600, ge=1, le=7 * 86_400)
    #: Folder of the embedded servers, logs and the demo. Unset: `.vectormill` of the checkout, or of an installed
    #: package's user.
    home: Path = Field(default_factory=lambda: (_CHECKOUT if _IS_CHECKOUT else Path.home()) / ".vectormill")

    #: Lifetime of a claim without renewal; it is renewed every third of this.
    lease_seconds: float = Field(default=30, ge=1, le=3600)
    #: Target duration of a chunk, at the model's measured rate on one slot.
    chunk_seconds: float = Field(default=10, gt=0, le=600)
    #: The most items in a chunk, whatever their size.
    chunk_items: int = Field(default=10_000, ge=1, le=100_000)
    #: The most text in a chunk, which bounds a worker's memory.
    chunk_bytes: int = Field(default=16 * _MIB, ge=1024, le=256 * _MIB)
    #: The longest text; a longer one becomes a reject, `too_large`.
    item_bytes: int = Field(default=1 * _MIB, ge=1, le=64 * _MIB)
    #: Retention of item texts after a job's end.
    text_retention_days: float = Field(default=7, ge=0)

    #: Flower's address and port; 0 picks a free one.
    flower_host: str = "127.0.0.1"
    flower_port: int = Field(default=5555, ge=0, le=65535)
    #: Flower's password for the user `vectormill`. Unset: `up` makes one each time it starts.
    flower_password: SecretStr | None = None
    #: URL of Flower for a browser. Unset: the one of `up`, if `up` runs it.
    flower_url: str | None = None
    #: The api's address and port; 0 picks a free one.
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=65535)
    #: The largest body of a request, and of one that uploads a corpus.
    api_body_bytes: int = Field(default=16 * _MIB, ge=1024, le=1024 * _MIB)
    api_upload_bytes: int = Field(default=1024 * _MIB, ge=1024, le=1024 * 1024 * _MIB)
    #: Timeout of a body of any size; a body must also arrive at 16 KiB/s or more.
    api_upload_seconds: float = Field(default=3600, ge=1, le=7 * 86_400)
    #: Folders and URIs, comma-separated, below which jobs made through the api may read and write; empty: none.
    api_sources: Annotated[tuple[str, ...], NoDecode] = ()
    api_outputs: Annotated[tuple[str, ...], NoDecode] = ()
    #: Origins, comma-separated, of web pages whose scripts may call `/v1` (`https://app.example.com`; `*`: all); empty:
    #: none.
    api_origins: Annotated[tuple[str, ...], NoDecode] = ()
    #: Folder or URI of the files of batch requests, for the api and the dispatcher alike. Unset: below the home.
    files: str | None = Field(default=None, min_length=1)
    #: Retention of such files by default; a batch request may set another one for its output files.
    file_days: float = Field(default=30, gt=0, le=3650)
    #: The most lines of a batch request, and the largest file.
    batch_lines: int = Field(default=50_000, ge=1, le=1_000_000)
    batch_bytes: int = Field(default=200 * _MIB, ge=1024, le=1024 * 1024 * _MIB)
    #: URL of an api that runs commands on jobs in place of direct access to the database, and an API key for it.
    api_url: str | None = Field(default=None, pattern="^https?://")
    api_key: SecretStr | None = None
    #: Secret that engines and apis share, so that nobody else can use an engine: 16 characters or more. An engine that
    #: listens beyond this machine must have one; `up` makes one.
    engine_secret: SecretStr | None = Field(default=None, min_length=16)
    #: An engine's address, as the api reaches it.
    engine_host: str = "127.0.0.1"
    engine_port: int = Field(default=0, ge=0, le=65535)
    #: The longest wait of a request in an engine's queue, estimated from its models' rates there; a request that would
    #: wait longer is refused at once.
    engine_queue_seconds: float = Field(default=120, gt=0, le=3600)
    #: Timeout of a request to an upstream.
    gateway_seconds: float = Field(default=60, ge=1, le=600)
    #: Concurrent requests per chunk.
    gateway_in_flight: int = Field(default=4, ge=1, le=64)
    #: Allowlist of webhooks: URLs, comma-separated, below which they may be; empty: none.
    webhooks: Annotated[tuple[str, ...], NoDecode] = ()
    #: Signing key of webhook events: `whsec_` and base64 of 24 to 64 bytes. Several, separated by spaces, sign every
    #: event, so that receivers can change from one to the next.
    webhook_secret: SecretStr | None = None
    #: Address of the metrics of dispatchers and workers. Unset port: no metrics are served; 0 picks a free port.
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    #: Least level that is logged: debug, info, warning or error.
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    #: The models a worker serves, comma-separated; empty: all of the catalogue. Set by `vectormill worker --model`.
    worker_models: Annotated[tuple[str, ...], NoDecode] = ()
    #: The devices of a worker, comma-separated (`cpu`, `cuda:0`, `mps`). Set by `vectormill worker --devices`.
    worker_devices: Annotated[tuple[str, ...], NoDecode] = ("cpu",)
    #: Kind of each of those devices, comma-separated: `cpu`, `mps`, or a GPU's name. Set by `vectormill worker`.
    worker_device_kinds: Annotated[tuple[str, ...], NoDecode] = ("cpu",)
    #: Children per device. Set by `vectormill worker --replicas`.
    worker_replicas: int = Field(default=1, ge=1, le=64)
    #: Memory of one of those devices; 0: unknown. Set by `vectormill worker`.
    worker_memory_bytes: int = Field(default=0, ge=0)
    #: Precision on CUDA, for workers and engines; `auto`: bfloat16 where the device has it. A CPU always embeds in
    #: float32. `--precision` overrides it.
    worker_dtype: str = Field(default="auto", pattern="^(auto|float32|bfloat16|float16)$")

    @field_validator(
        *("worker_models", "worker_devices", "worker_device_kinds"),
        *("api_sources", "api_outputs", "api_origins", "webhooks"),
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("redis_url", mode="after")
    @classmethod
    def _check_redis_url(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("redis://", "rediss://")):
            raise ValueError("write redis://user:password@host:6379/0, or rediss://…, which is encrypted")
        return SecretStr(verifying(value.get_secret_value(), info.data.get("redis_ca"))) if value else None

    @field_validator("redis_ca", mode="after")
    @classmethod
    def _check_redis_ca(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not value.is_absolute():  # some processes change their working folder
            raise ValueError("give an absolute path")
        try:
            ssl.create_default_context(cafile=value)
        except OSError as error:  # also raised for a file that isn't a certificate
            raise ValueError("give a readable file of PEM certificates") from error
        return value

    @field_validator("sql_url", mode="after")
    @classmethod
    def _check_sql_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("write postgresql://user:password@host/name")
        return value

    @field_validator("webhook_secret", mode="after")
    @classmethod
    def _check_webhook_secret(cls, value: SecretStr | None) -> SecretStr | None:
        for secret in value.get_secret_value().split() if value else ():
            try:
                key = b64decode(secret.removeprefix("whsec_"), validate=True)
            except ValueError:
                key = b""
            if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
                raise ValueError("write whsec_ and base64 of 24 to 64 bytes")
        return value

    @property
    def files_folder(self) -> str:
        """Folder or URI of the files of batch requests."""
        return self.files or str(self.home / "files")

    @field_validator("home", mode="after")
    @classmethod
    def _make_absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()


def verifying(redis_url: str, ca: Path | None = None) -> str:
    """Return a Redis URL that makes every client verify the certificate and its name, if the URL uses TLS.

    Options that the URL already has are kept. `ca`: a file of trusted authorities.
    """
    parts = urlsplit(redis_url)
    if parts.scheme != "rediss":
        return redis_url
    said = dict(parse_qsl(parts.query))
    wanted = {"ssl_cert_reqs": "required"} | ({"ssl_ca_certs": str(ca)} if ca else {}) | said
    if wanted["ssl_cert_reqs"].lower() in ("required", "cert_required"):
        wanted.setdefault("ssl_check_hostname", "true")
    return urlunsplit(parts._replace(query=urlencode(wanted)))


def engine_authorization(secret: SecretStr | None) -> str:
    """Return the `Authorization` header by which an engine recognises an api, or "" without a secret.

    It holds a digest of the secret, which a header can carry whatever characters the secret has.
    """
    return f"Bearer {hashlib.sha256(secret.get_secret_value().encode()).hexdigest()}" if secret else ""


def read_secret(variable: str) -> str | None:
    """Return a secret from an environment variable, or from the file that the variable with the suffix `_FILE` names.

    It is read again each time, so that the file may change. `None`: neither is set, or the file is empty or can't be
    read.
    """
    if path := os.environ.get(f"{variable}_FILE"):
        try:
            value = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
    else:
        value = os.environ.get(variable, "")
    return value.strip() or None


def read_key(variable: str) -> str | None:
    """Return an upstream's API key, read as by `read_secret`. `None`: there is none that a header can carry."""
    key = read_secret(variable)
    return key if key and key.isascii() and key.isprintable() else None


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        UserError: a variable's value is out of bounds; the message names the variable.
    """
    try:
        return Settings(**_secrets_in_files())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        variable = "VECTORMILL_" + "_".join(str(part) for part in first["loc"]).upper()
        raise UserError(f"{variable}: {first['msg'].lower()}.") from None


#: Settings that may be kept in a file, to which the variable with the suffix `_FILE` points.
_SECRETS = ("database_url", "redis_url", "sql_url", "api_key", "flower_password", "webhook_secret", "engine_secret")


def _secrets_in_files() -> dict[str, Any]:
    found = {}
    for name in _SECRETS:
        variable = f"VECTORMILL_{name.upper()}"
        if path := os.environ.get(f"{variable}_FILE"):
            # Some processes change their working folder.
            found[name] = read_secret(variable) if Path(path).is_absolute() else None
            if found[name] is None:
                raise UserError(f"{variable}_FILE: give an absolute path; the file must be readable and not empty.")
    return found
