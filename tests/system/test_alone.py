"""Actors that nobody calls: they do what is left to do, and end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from ray_ckpt.agent import find_or_start_agent
from ray_ckpt.agent.pool import WriterPool
from ray_ckpt.coordinator import find_or_start, run_id
from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot import ProcessId, default_folder
from ray_ckpt.storage import open_store
from tests.system import states
from tests.system.job import Job, get
from tests.system.processes import during
from tests.system.waiting import eventually

pytestmark = pytest.mark.xdist_group("ray")


def lease(monkeypatch: pytest.MonkeyPatch, seconds_s: float) -> None:
    """So long the actors that are started from now on wait for somebody who needs them."""
    for package in ("agent", "coordinator"):
        monkeypatch.setattr(sys.modules[f"ray_ckpt.{package}.find"], "LEASE_S", seconds_s)


def named(url: Path) -> list[str]:
    """The run's actors that Ray knows."""
    return sorted(a["name"].split(":")[0] for a in list_named_actors(True) if run_id(str(url)) in a["name"])


@pytest.mark.parametrize("called", [False, True])
def test_actors_that_nobody_calls_end(
    ray_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: bool
) -> None:
    lease(monkeypatch, 6.0 if called else 1.0)
    node = ray.get_runtime_context().get_node_id()
    coordinator = find_or_start(str(tmp_path), {})
    seen = named(tmp_path)
    agent = find_or_start_agent(str(tmp_path), {}, node_id=node)
    assert {*seen, *named(tmp_path)} == {"agent", "coordinator"}
    if called:
        # Ray restarts them, and then nobody calls any more.
        pids = get([coordinator.pid.remote(), agent.pid.remote()])
        get([coordinator.status.remote(), agent.prepare.remote(0, 4096, 1)])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: named(tmp_path) == [], "both have ended", timeout_s=100)
    assert not list(default_folder(f"{run_id(str(tmp_path))}-{node[:12]}").glob("*"))


def test_an_agent_that_ray_restarts_writes_what_lies_there_though_nobody_calls(make_job: Callable[..., Job]) -> None:
    big = partial(states.large, nbytes=96 << 20)
    job = make_job(save_steps=4).start(1)
    assert job.all("restore", big) == [None]
    job.all("train", 1, 3, big)
    job.begin("train", 4, 4, big)
    eventually(during(job, "writing"), "shards are being written", every_s=0.005)
    job.kill(0)
    job.kill_actor(job.agent(0))
    job.until_committed(4)


@pytest.mark.slow
def test_a_writer_that_hangs_is_ended(ray_cluster: Cluster, tmp_path: Path) -> None:
    def hang(path: str, store: object) -> None:
        partial = Path(path).with_suffix(".partial")
        partial.write_text(str(os.getpid()))
        partial.rename(path)
        signal.pause()

    note = tmp_path / "pid"
    pool = WriterPool(ray.get_runtime_context().get_node_id(), open_store(str(tmp_path)))
    pool._write = ray.remote(hang).options(num_cpus=0, max_retries=0)

    async def write_until_it_runs() -> None:
        while not note.exists():
            with pytest.raises(StorageError, match="has been ended"):
                await pool.write(str(note), timeout_s=5.0)

    asyncio.run(write_until_it_runs())
    process = ProcessId.of(int(note.read_text()))
    eventually(lambda: not process.alive, "the writer's process has ended")
