"""The training processes of one start of the job: started, watched, killed, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import psutil
import ray

from examples.demo.cluster import CHIPS
from examples.demo.journal import Story
from examples.demo.trainer import Job, Trainer

_START_S = 120.0
_END_S = 30.0


class FleetError(Exception):
    """A training process ended that should not have."""


class Fleet:
    """One actor on each host of the job; each takes all chips of its host."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stories = [Story(job.journal(rank), job.start, rank, host) for rank, host in enumerate(job.hosts)]
        self._actors = [_actor_on(host).remote() for host in job.hosts]
        self._runs: list[Any] = []
        self._processes: list[psutil.Process] = []

    def start(self) -> None:
        """Have all of them train."""
        pids = ray.get([actor.pid.remote() for actor in self._actors], timeout=_START_S)
        self._processes = [psutil.Process(pid) for pid in pids]
        address = ray.get(self._actors[0].free_address.remote(), timeout=_START_S)
        self._runs = [actor.train.remote(self.job, rank, address) for rank, actor in enumerate(self._actors)]

    def update(self) -> None:
        """Read what the processes have written.

        Raises:
            FleetError: one of them failed.
        """
        for story in self.stories:
            story.update()
        for rank, run in enumerate(self._runs):
            done, _ = ray.wait([run], timeout=0)
            if done:
                self._check(rank, run)

    def _check(self, rank: int, run: Any) -> None:
        try:
            ray.get(run)
        except ray.exceptions.RayError as error:
            raise FleetError(f"rank {rank} on host {self.job.hosts[rank]} ended: {error}") from error

    @property
    def running(self) -> bool:
        """Whether any process still trains."""
        return bool(ray.wait(self._runs, num_returns=len(self._runs), timeout=0)[1])

    def kill(self, rank: int) -> float:
        """SIGKILL to the process of one rank; when, in seconds since the epoch."""
        os.kill(self._processes[rank].pid, signal.SIGKILL)
        return time.time()

    def end(self) -> None:
        """End all processes that still run: without the killed one, their collectives would wait for ever."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        _, left = psutil.wait_procs(self._processes, timeout=_END_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for story in self.stories:
            story.update()


def _actor_on(host: int) -> Any:
    """The actor class, tied to the raylet of one host by that host's labels and chips."""
    return ray.remote(Trainer).options(
        num_cpus=1, resources={"TPU": CHIPS}, label_selector={"ray.io/tpu-worker-id": str(host)}, max_restarts=0
    )
