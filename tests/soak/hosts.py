"""Four simulated hosts, each a raylet with all that runs on it, and the training processes that are warm on them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import Retrying, stop_after_attempt

from tests.soak.trainer import Trainer

logger = logging.getLogger(__name__)

HOSTS = 4
ROOT = Path(__file__).parents[2]
_STORE_NBYTES = 80_000_000
_PATIENCE_S = 10.0

_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A host that is gone is noticed within seconds.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Host:
    """One raylet. ``memory``: where its snapshots lie, which go with it."""

    node: Any
    memory: Path
    idle: list[Any] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Ray's number of the node."""
        return str(self.node.node_id)

    @property
    def raylet(self) -> int:
        """The process of the raylet, of which all others on the host are children."""
        return int(self.node.all_processes["raylet"][0].process.pid)

    def processes(self) -> list[psutil.Process]:
        """All that would be gone with the machine, the raylet last."""
        try:
            raylet = psutil.Process(self.raylet)
            return [*raylet.children(recursive=True), raylet]
        except psutil.NoSuchProcess:
            return []

    def hire(self) -> Any:
        """A training process that does nothing yet: a warm one, if there is one."""
        return self.idle.pop() if self.idle else self._new()

    def warm(self, count: int) -> None:
        """Have so many start that there are ``count`` of them, without waiting."""
        self.idle += [self._new() for _ in range(count - len(self.idle))]

    def _new(self) -> Any:
        where = NodeAffinitySchedulingStrategy(self.id, soft=False)
        return ray.remote(Trainer).options(num_cpus=0, max_concurrency=8, scheduling_strategy=where).remote()


class Hosts:
    """The cluster. ``alive``: the hosts that can be used now, the head first; it is never lost."""

    def __init__(self, cluster: Any, memory: Path) -> None:
        self.cluster = cluster
        self._memory = memory
        self._made = 0
        self._arrived: list[Any] = []
        self._joining: threading.Thread | None = None
        self.alive: list[Host] = [self._host(cluster.head_node)]
        self.alive += [self._host(self._add()) for _ in range(HOSTS - 1)]

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=2, object_store_memory=_STORE_NBYTES)

    def _host(self, node: Any) -> Host:
        self._made += 1
        memory = self._memory / f"host{self._made}"
        memory.mkdir(exist_ok=True)
        return Host(node, memory)

    def lose(self, host: Host) -> None:
        """SIGKILL everything on a host, and take its memory; a fresh one is on its way then."""
        self.alive.remove(host)
        for process in reversed(host.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(host.memory, ignore_errors=True)
        self._joining = threading.Thread(target=self._replace, args=(host,), name="a fresh host")
        self._joining.start()

    def _replace(self, host: Host) -> None:
        with contextlib.suppress(Exception):
            # It looks for processes that are gone already.
            self.cluster.remove_node(host.node, allow_graceful=False)
        shutil.rmtree(host.memory, ignore_errors=True)
        try:
            for attempt in Retrying(stop=stop_after_attempt(3), reraise=True):
                with attempt:
                    self._arrived.append(self._add())
        except Exception:
            logger.exception("no fresh host has come")

    def welcome(self) -> list[Host]:
        """Take in the fresh hosts that have come since."""
        fresh = [self._host(self._arrived.pop()) for _ in range(len(self._arrived))]
        self.alive += fresh
        return fresh

    @property
    def complete(self) -> bool:
        """Whether no host is missing or on its way."""
        return len(self.alive) == HOSTS

    def settle(self) -> None:
        """Wait for a host that is on its way."""
        if self._joining is not None:
            self._joining.join()


@contextlib.contextmanager
def hosts() -> Iterator[Hosts]:
    """Start them and connect to them; at the end nothing of it is left, but for the logs: ``$RAY_TMPDIR``."""
    # Ray's socket names must fit in 107 bytes, so its folder needs a short path.
    folder = Path(tempfile.mkdtemp(prefix="rcs", dir="/tmp"))
    shm = Path("/dev/shm")
    memory = Path(tempfile.mkdtemp(prefix="ray_ckpt-soak-", dir=shm if os.access(shm, os.W_OK) else folder))
    before = {process.pid for process in _children()}
    os.environ.update({**_ENVIRONMENT, "RAY_TMPDIR": str(folder)})
    found: Hosts | None = None
    try:
        # Ray gives its processes 30 s, which a busy machine exceeds.
        for attempt in Retrying(stop=stop_after_attempt(3), reraise=True):
            with attempt:
                found = _start(memory, before)
        assert found is not None
        yield found
    finally:
        if found is not None:
            found.settle()
            _shut_down(found.cluster, before)
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _start(memory: Path, before: set[int]) -> Hosts:
    cluster: Any = None
    try:
        head = {"num_cpus": 2, "object_store_memory": _STORE_NBYTES, "include_dashboard": False}
        # Without its handlers of signals, which only the main thread may set: hosts are added in another one.
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        found = Hosts(cluster, memory)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    except BaseException:
        _shut_down(cluster, before)
        raise
    return found


def logs() -> Path:
    """Where Ray's processes write their logs while the cluster runs."""
    return Path(os.environ["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"


def _children() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _shut_down(cluster: Any, before: set[int]) -> None:
    """End the cluster, then by its number each process of it that is left."""
    ours = [process for process in _children() if process.pid not in before]
    with contextlib.suppress(Exception):
        ray.shutdown()
    if cluster is not None:
        with contextlib.suppress(Exception):
            cluster.shutdown()
    _, left = psutil.wait_procs(ours, timeout=_PATIENCE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_PATIENCE_S)
