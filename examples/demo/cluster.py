"""A TPU pod slice on this machine: one raylet for each host, with the environment that a TPU host has."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]
CHIPS = 4
_STORE_NBYTES = 80_000_000
_PATIENCE_S = 10.0

# Two cores for everything: each process computes in one thread, and is not optimized beyond what it needs.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The processes that outlive the killed one fail in their collectives, as they must: no news.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}


def tpu_environment(host: int, hosts: int) -> dict[str, str]:
    """What a host of a TPU v4 slice finds in its environment; two cores a chip give the slice its name."""
    return {
        "TPU_NAME": "demo-slice",
        "TPU_WORKER_ID": str(host),
        "TPU_ACCELERATOR_TYPE": f"v4-{2 * CHIPS * hosts}",
        "TPU_TOPOLOGY": f"2x2x{hosts}",
    }


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables for this process and the ones it starts, then as it was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Pod:
    """The running cluster. ``nodes``: the Ray node id of each host, by its number; host 0 is the head.

    ``memory``: a folder on tmpfs that goes with the cluster, for snapshots.
    """

    def __init__(self, nodes: list[str], folder: Path, memory: Path) -> None:
        self.nodes = nodes
        self.logs = folder / "ray" / "session_latest" / "logs"
        self.memory = memory


@contextlib.contextmanager
def pod(hosts: int) -> Iterator[Pod]:
    """Start the hosts and connect to them; at the end, on whatever error, nothing of it is left."""
    # Ray's socket names must fit in 107 bytes, so its folder needs a short path.
    folder = Path(tempfile.mkdtemp(prefix="rcd", dir="/tmp"))
    shm = Path("/dev/shm")
    memory = Path(tempfile.mkdtemp(prefix="ray_ckpt-demo-", dir=shm if os.access(shm, os.W_OK) else folder))
    before = {process.pid for process in _children()}
    cluster: Any = None
    with environment({**_ENVIRONMENT, "RAY_TMPDIR": str(folder)}):
        try:
            cluster = Cluster()
            for host in range(hosts):
                _add_host(cluster, host, hosts)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            yield Pod(_nodes(hosts), folder, memory)
        finally:
            _shut_down(cluster, before)
            shutil.rmtree(memory, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)


def _add_host(cluster: Any, host: int, hosts: int) -> None:
    head = {"include_dashboard": False, "dashboard_agent_listen_port": 0} if host == 0 else {}
    with environment(tpu_environment(host, hosts)):
        cluster.add_node(num_cpus=2, resources={"TPU": CHIPS}, object_store_memory=_STORE_NBYTES, **head)


def _nodes(hosts: int) -> list[str]:
    """Node ids by TPU worker id."""
    found = {int(n["Labels"]["ray.io/tpu-worker-id"]): n["NodeID"] for n in ray.nodes() if n["Alive"]}
    return [found[host] for host in range(hosts)]


def _children() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _shut_down(cluster: Any, before: set[int]) -> None:
    """End the cluster, then by its number each process of it that is left: workers outlive their raylet a little."""
    with _undisturbed():
        ours = [process for process in _children() if process.pid not in before]
        with contextlib.suppress(Exception):
            ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
        _, left = psutil.wait_procs(ours, timeout=_PATIENCE_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_PATIENCE_S)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave half a cluster behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
