"""S3 server on loopback: moto's, in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3


@contextmanager
def s3_server(*buckets: str) -> Iterator[dict[str, str]]:
    """Serve empty `buckets`, and yield the environment variables by which clients find them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _await(port, process)
            client = _client(environment["AWS_ENDPOINT_URL"])
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
            client.close()
            yield environment
        finally:
            process.terminate()


def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )


def content_of(uri: str) -> bytes | None:
    """Return a file's bytes, read by other code than the project's own, or None if there is no file."""
    if not uri.startswith("s3://"):
        path = Path(uri)
        return path.read_bytes() if path.exists() else None
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client = _client(os.environ["AWS_ENDPOINT_URL"])
    try:
        content: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    except client.exceptions.NoSuchKey:
        return None
    finally:
        client.close()
    return content


def _await(port: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the S3 server didn't start")


@contextmanager
def environment_of(server: dict[str, str]) -> Iterator[None]:
    """Make this process a client of the server for the length of the block."""
    before = {name: os.environ.get(name) for name in server}
    os.environ.update(server)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
