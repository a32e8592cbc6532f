"""A whole host goes, with the memory on it: its peer has a copy of what it held."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

import ray_ckpt
from ray_ckpt import PerWorker
from ray_ckpt.agent import find_or_start_agent
from ray_ckpt.protocol.messages import RunStatus
from ray_ckpt.snapshot import SegmentState, scan
from tests.system import states
from tests.system.job import QUICK, Crew, Job, get, kill_all
from tests.system.processes import flip_table, segment_folder
from tests.system.test_memory import expect
from tests.system.waiting import eventually
from tests.system.worker import until_planned

pytestmark = pytest.mark.xdist_group("ray")

PATIENT = replace(QUICK, recover_s=60.0)
"""A loaded machine takes its time to start a job again."""

_STORE_NBYTES = 80_000_000


class Doomed:
    """A host that joins the cluster for one test. ``index`` is its place in the crew's list."""

    def __init__(self, cluster: Cluster, crew: Crew) -> None:
        self._cluster = cluster
        self._crew = crew
        self._raylet = cluster.add_node(num_cpus=4, object_store_memory=_STORE_NBYTES)
        self.id = str(self._raylet.node_id)
        self.index = len(crew.hosts)
        crew.hosts.append(self.id)

    def lose(self, job: Job, *, politely: bool) -> None:
        """It goes with all its processes and its memory; ``politely``: so that Ray need not find out for itself."""
        rank = job.hosts.index(self.id)
        folder = segment_folder(job, rank)
        agent = get(job.agent(rank).pid.remote())
        self._remove(politely)
        for pid in () if politely else (job.pids[rank], agent):
            # They would outlive their raylet for a moment.
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder)
        with pytest.raises(ray.exceptions.RayActorError):
            get(job.workers[rank].get.remote("done"))

    def end(self) -> None:
        if self.index < len(self._crew.hosts):
            self._crew.hosts.pop()
            self._crew.idle.pop(self.id, None)
        self._remove(True)

    def _remove(self, politely: bool) -> None:
        if self._raylet is not None:
            self._cluster.remove_node(self._raylet, allow_graceful=politely)
            self._raylet = None


@pytest.fixture
def doomed(ray_cluster: Cluster, crew: Crew) -> Iterator[Doomed]:
    host = Doomed(ray_cluster, crew)
    yield host
    host.end()


def status(job: Job) -> RunStatus:
    found: RunStatus = get(job.coordinator().status.remote())
    return found


def lose_one_of_three(make_job: Callable[..., Job], doomed: Doomed, *, politely: bool) -> None:
    """A job of three hosts that has copies of step 6 loses one of them, and is killed."""
    job = make_job(timeouts=PATIENT, memory_steps=3, replicas=1).start(3, hosts=[0, 1, doomed.index])
    job.all("restore", states.mixed)
    job.all("do", until_planned)
    job.all("train", 1, 6, states.mixed)
    eventually(lambda: status(job).replicated_step == 6, "a second copy of each part of step 6")
    doomed.lose(job, politely=politely)
    job.kill(0)
    job.kill(1)
    job.end()


@pytest.mark.slow
@pytest.mark.parametrize("politely", [True, False])
def test_a_lost_host_s_snapshot_is_restored_from_its_peer(
    make_job: Callable[..., Job], doomed: Doomed, politely: bool
) -> None:
    lose_one_of_three(make_job, doomed, politely=politely)
    again = make_job(timeouts=PATIENT, memory_steps=3, replicas=1).start(2, hosts=[0, 1])
    assert again.all("restore", states.mixed) == [6, 6]
    assert ray_ckpt.checkpoints(again.url) == []
    for rank, found in enumerate(again.all("get", "state")):
        expected = {**states.mixed(rank, 2, 6), "rng": PerWorker(np.array([0, 6], np.uint32))}
        assert found == states.plain(expected)


@pytest.mark.slow
def test_a_spare_host_takes_the_place_of_a_lost_one(
    make_job: Callable[..., Job], doomed: Doomed, ray_cluster: Cluster, crew: Crew
) -> None:
    lose_one_of_three(make_job, doomed, politely=False)
    crew.hosts.pop()
    spare = Doomed(ray_cluster, crew)
    try:
        again = make_job(timeouts=PATIENT, memory_steps=3, replicas=1).start(3, hosts=[0, 1, spare.index])
        assert again.all("restore", states.mixed) == [6] * 3
        assert ray_ckpt.checkpoints(again.url) == []
        assert again.all("get", "state") == [states.plain(states.mixed(rank, 3, 6)) for rank in range(3)]
        again.end()
    finally:
        spare.end()


@pytest.mark.parametrize("politely", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_lost_host_s_shards_are_written_by_its_peer(
    make_job: Callable[..., Job], doomed: Doomed, politely: bool
) -> None:
    job = make_job(timeouts=PATIENT, save_steps=4, replicas=1)
    # Its own writers never begin.
    find_or_start_agent(job.url, {}, node_id=doomed.id, max_writes=0)
    job.start(3, hosts=[0, 1, doomed.index])
    job.all("restore")
    job.all("train", 1, 5)
    eventually(lambda: status(job).replicated_step == 4, "a second copy of each part of step 4")
    assert job.steps() == []
    doomed.lose(job, politely=politely)
    job.until_committed(4)
    found = ray_ckpt.load(job.url)
    assert [int(part[0]) for part in found["part"]] == [4, 104, 204]
    assert [report.damage for report in ray_ckpt.verify(job.url)] == [()]
    # Three writers of three tries each, and as many of the copies: those come after.
    numbers = sorted(int(name.split("-")[2]) for name in job.files("model.ckpt-4.data-*"))
    assert len(numbers) == 4
    assert [n // 9 for n in numbers] == [0, 0, 1, 2]
    job.workers.pop()
    job.hosts.pop()


@pytest.mark.slow
def test_a_snapshot_that_is_damaged_is_read_from_its_peer(make_job: Callable[..., Job]) -> None:
    job = make_job(timeouts=PATIENT, memory_steps=3, replicas=1).start(2, hosts=[0, 1])
    job.all("restore")
    job.all("do", until_planned)
    job.all("train", 1, 6)
    eventually(lambda: status(job).replicated_step == 6, "a second copy of each part of step 6")
    flip_table(job, 1, 6)
    kill_all(job)
    again = make_job(timeouts=PATIENT, memory_steps=3, replicas=1).start(2, hosts=[0, 1])
    assert again.all("restore") == [6, 6]
    expect(again, 6)


def unequal(rank: int, _world: int, step: int) -> dict[str, object]:
    """Rank 0's part takes six times as long to copy."""
    return {"w": PerWorker(np.full((6, 1)[rank] << 20, step, np.float32)), "step": step}


def own_states(folder: Path, rank: int, step: int) -> list[SegmentState | None]:
    """Of a rank's own snapshots of a step."""
    found = [info for info in scan(folder) if info.save is not None and not info.save.replica]
    return [info.state for info in found if info.save is not None and (info.save.rank, info.save.step) == (rank, step)]


@pytest.mark.slow
def test_a_copied_snapshot_outlives_one_that_is_copied_in_part(make_job: Callable[..., Job]) -> None:
    settings: dict[str, Any] = {"timeouts": PATIENT, "save_steps": 10_000, "memory_steps": 1, "replicas": 1}
    job = make_job(**settings).start(2)
    job.all("restore", unequal)
    job.all("do", until_planned)
    job.all("train", 1, 1, unequal)
    eventually(lambda: status(job).replicated_step == 1, "a second copy of each part of step 1")
    kill_all(job)
    job = make_job(**settings, replica_bytes_per_s=1.5e6).start(2)
    assert job.all("restore", unequal) == [1, 1]
    job.all("do", until_planned)
    job.all("train", 2, 2, unequal)
    folders = [segment_folder(job, rank) for rank in range(2)]
    eventually(lambda: own_states(folders[1], 1, 2) == [SegmentState.KEPT], "rank 1's part of step 2 copied")
    agent = job.agent(0)
    kill_all(job)
    for path in folders[0].glob("*.segment"):
        path.unlink()
    os.kill(get(agent.pid.remote()), signal.SIGKILL)
    assert make_job(**settings).start(2).all("restore", unequal) == [1, 1]
