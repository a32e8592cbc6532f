"""A Ray head on this machine as `ray start` makes it, with ports and files of its own, and jobs submitted to it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
_BLOCK = 200
_SERVICES = (
    "port",
    "ray-client-server-port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """``url``: where jobs are submitted to. ``environment``: what its processes were started with."""

    url: str
    environment: dict[str, str]

    def submit(self, script: str, config: Path, *options: str, timeout_s: float = 240.0) -> str:
        """What the job prints; raises `AssertionError` with it if the job fails."""
        command = [
            RAY,
            "job",
            "submit",
            "--working-dir",
            ".",
            *options,
            "--",
            "python",
            script,
            "--config",
            str(config),
        ]
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.url}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@contextmanager
def running(folder: Path, cpus: int = 4) -> Iterator[Head]:
    """``folder``: for Ray's files, of a short path. At the end nothing of it runs any more."""
    environment = _environment(folder)
    first = _free_block()
    ports = [f"--{name}={first + i}" for i, name in enumerate(_SERVICES)]
    workers = [f"--min-worker-port={first + len(ports)}", f"--max-worker-port={first + _BLOCK - 1}"]
    local = ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    size = [f"--num-cpus={cpus}", "--object-store-memory=80000000"]
    command = [RAY, "start", "--head", *ports, *workers, *local, *size, "--disable-usage-stats", "--block"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{first + _SERVICES.index('dashboard-port')}"
    try:
        _wait_until_up(url, process, folder / "head.log")
        yield Head(url, environment)
    finally:
        _end(process)


def _environment(folder: Path) -> dict[str, str]:
    """This process's, without what leads to another cluster, and without JAX's many devices of the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "XLA_FLAGS")}
    binaries = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {
        **kept,
        "PATH": binaries,
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray Train's controller looks at reports so often, by default every two seconds.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "OMP_NUM_THREADS": "1",
    }


def _free_block() -> int:
    """The first of some ports, below those that the kernel gives away, of which none is taken now."""
    for first in random.Random().sample(range(20_000, 32_000 - _BLOCK, _BLOCK), 40):
        with contextlib.suppress(OSError):
            for port in range(first, first + _BLOCK):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise OSError(f"no {_BLOCK} ports in a row are free")


class _Down(Exception):
    """Not answering yet."""


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for attempt in Retrying(
        stop=stop_after_delay(90), wait=wait_fixed(0.3), retry=retry_if_exception_type(_Down), reraise=True
    ):
        with attempt:
            if process.poll() is not None:
                raise AssertionError(log.read_text())
            try:
                urllib.request.urlopen(f"{url}/api/jobs/", timeout=5).close()
            except (urllib.error.URLError, OSError) as error:
                raise _Down(f"{error}; {log.read_text()}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    process.kill()
    process.wait()
    for child in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(ours, timeout=10)
