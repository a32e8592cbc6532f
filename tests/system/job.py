"""A job on the cluster of a test: its workers, its directory, and its actors' processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_ckpt
from ray_ckpt.agent.find import agent_name
from ray_ckpt.checkpointer import Timeouts
from ray_ckpt.coordinator.find import NAMESPACE, coordinator_name
from tests.system.waiting import eventually
from tests.system.worker import Worker

QUICK = Timeouts(start_s=60.0, save_s=60.0, settle_s=20.0, host_s=20.0, recover_s=5.0)
_CALL_S = 120.0


@dataclass
class Crew:
    """Worker processes by host, lent to one test after the other: a new process takes seconds."""

    hosts: list[str]
    idle: dict[str, list[Any]] = field(default_factory=dict)

    def hire(self, host: str) -> Any:
        """An idle worker on this host, or a new one."""
        rested = self.idle.setdefault(host, [])
        if rested:
            return rested.pop()
        where = NodeAffinitySchedulingStrategy(host, soft=False)
        return ray.remote(Worker).options(num_cpus=0, max_concurrency=8, scheduling_strategy=where).remote()


@dataclass
class Job:
    """The workers of one start on one directory. ``settings`` go to every Checkpointer."""

    crew: Crew
    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    workers: list[Any] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(self.path)

    def start(self, world: int, hosts: Sequence[int] | None = None) -> Job:
        """Make ``world`` workers, one on each host in turn (or as ``hosts`` says), and their Checkpointers."""
        self.hosts = [self.crew.hosts[i] for i in (hosts or [r % len(self.crew.hosts) for r in range(world)])]
        self.workers = [self.crew.hire(host) for host in self.hosts]
        settings = {"timeouts": QUICK, "delete_grace_s": 0.0, **self.settings}
        self.pids = get([w.open.remote(self.url, r, world, **settings) for r, w in enumerate(self.workers)])
        return self

    def all(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        """Call a method of every worker; the answers by rank."""
        return get(self.begin(method, *arguments, **options))

    def begin(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        """The same without waiting."""
        return [getattr(worker, method).remote(*arguments, **options) for worker in self.workers]

    def on(self, rank: int, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of one worker."""
        return get(getattr(self.workers[rank], method).remote(*arguments, **options))

    def kill(self, rank: int) -> None:
        """SIGKILL a worker's process."""
        os.kill(self.pids[rank], signal.SIGKILL)

    def end(self) -> None:
        """Leave the run, and the workers to the next test."""
        for host, worker in zip(self.hosts, self.workers, strict=True):
            try:
                ray.get(worker.leave.remote(), timeout=30)
            except (RayError, TimeoutError):
                ray.kill(worker)
            else:
                self.crew.idle.setdefault(host, []).append(worker)
        self.workers, self.hosts = [], []

    # -- looking ------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps."""
        return [c.step for c in ray_ckpt.checkpoints(self.url)]

    def until_committed(self, step: int, timeout_s: float = 60.0) -> None:
        """Wait for the commit of a step."""
        eventually(lambda: step in self.steps(), f"commit of step {step} in {self.url}", timeout_s)

    def coordinator(self) -> Any:
        """The coordinator's handle."""
        return ray.get_actor(coordinator_name(self.url), namespace=NAMESPACE)

    def agent(self, rank: int) -> Any:
        """The handle of the agent on a rank's host."""
        return ray.get_actor(agent_name(self.url, self.hosts[rank]), namespace=NAMESPACE)

    def kill_actor(self, actor: Any) -> int:
        """SIGKILL an actor's process; its number."""
        pid: int = get(actor.pid.remote())
        os.kill(pid, signal.SIGKILL)
        return pid

    def files(self, pattern: str) -> list[str]:
        """Names in the directory that match."""
        return sorted(str(p.relative_to(self.path)) for p in self.path.glob(pattern))


def get(ref: Any, timeout_s: float = _CALL_S) -> Any:
    """`ray.get` with a deadline."""
    return ray.get(ref, timeout=timeout_s)


def kill_all(job: Job) -> None:
    """SIGKILL every training process, and wait until they are gone."""
    for rank in range(len(job.workers)):
        job.kill(rank)
    for worker in job.workers:
        with pytest.raises(ray.exceptions.RayActorError):
            get(worker.get.remote("done"))
    job.end()
