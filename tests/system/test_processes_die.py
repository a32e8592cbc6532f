"""SIGKILL at the worst moments: training processes, writers, agents and the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import ray

import ray_ckpt
from ray_ckpt.errors import SaveError
from ray_ckpt.snapshot import SegmentState
from tests.system import states
from tests.system.job import Job, get
from tests.system.processes import during, kill_writer, kill_writer_if_any, segment_states, until_filling
from tests.system.waiting import eventually, pause

pytestmark = pytest.mark.xdist_group("ray")

BIG = partial(states.large, nbytes=96 << 20)


def slow_to_copy(rank: int, world: int, step: int) -> dict[str, Any]:
    """Rank 0's array lies the wrong way round in memory, so that its copy takes long."""
    n = 6000 if rank == 0 else 60
    return {f"w{rank}": np.full((n, n), step, np.float32).T, "step": step}


def started(job: Job, world: int, make: Any = states.small) -> Job:
    """A run whose workers have restored nothing and know who writes what."""
    job.start(world)
    assert job.all("restore", make) == [None] * world
    return job


def test_a_save_commits_without_the_processes_that_took_its_snapshots(make_job: Callable[..., Job]) -> None:
    job = started(make_job(save_steps=4), 2)
    job.all("train", 1, 3)
    killed = job.begin("die_after", 4)
    for ref in killed:
        with pytest.raises(ray.exceptions.RayActorError):
            get(ref)
    job.until_committed(4)
    assert ray_ckpt.load(job.url)["part"][1, 0] == 104
    job.end()
    again = make_job(save_steps=4).start(2)
    assert again.all("restore") == [4, 4]


def test_killed_in_its_snapshot_the_older_checkpoint_stays(make_job: Callable[..., Job]) -> None:
    job = started(make_job(save_steps=4), 2, slow_to_copy)
    job.all("train", 1, 4, slow_to_copy)
    job.until_committed(4)
    refs = job.begin("train", 5, 8, slow_to_copy)
    until_filling(job, 0)
    job.kill(0)
    get(refs[1])
    lost = eventually(lambda: [m for m in job.on(1, "get", "messages") if "was not saved" in m], "a warning")
    assert "rank 0" in lost[0]
    assert "ended before its snapshot of step 8" in lost[0]
    assert job.steps() == [4]
    job.end()
    again = make_job(save_steps=4).start(2)
    assert again.all("restore", slow_to_copy) == [4, 4]
    again.all("train", 5, 8, slow_to_copy)
    again.until_committed(8)


def test_a_writer_killed_in_its_shard_is_replaced_under_another_number(make_job: Callable[..., Job]) -> None:
    job = started(make_job(), 1, BIG)
    refs = job.begin("save", 1, BIG)
    kill_writer(job)
    get(refs)
    job.all("call", "wait")
    assert job.steps() == [1]
    numbers = [int(name.split("-")[2]) for name in job.files("model.ckpt-1.data-*")]
    assert numbers == [1, 3], "the second try of the only writer, and the coordinator's"
    (report,) = ray_ckpt.verify(job.url)
    assert report.ok


@pytest.mark.slow
def test_writers_that_always_die_fail_one_save(make_job: Callable[..., Job]) -> None:
    job = started(make_job(), 1, BIG)
    refs = job.begin("save", 1, BIG)
    get(refs)
    waiting = job.begin("call", "wait")
    while not ray.wait(waiting, timeout=0)[0]:
        kill_writer_if_any(job)
    with pytest.raises(SaveError, match=r"step 1 was not saved: shard of writer 0 on .*: the writer process died"):
        get(waiting)
    assert job.files("model.ckpt-1.*") == []
    job.all("save", 2, BIG)
    job.all("call", "wait")
    assert job.steps() == [2]


@pytest.mark.parametrize(
    ("who", "stage"),
    [
        ("agent", "before"),
        ("coordinator", "writing"),
        pytest.param("agent", "writing", marks=pytest.mark.slow),
        pytest.param("coordinator", "before", marks=pytest.mark.slow),
    ],
)
def test_a_killed_actor_comes_back_and_the_save_ends(make_job: Callable[..., Job], who: str, stage: str) -> None:
    make = BIG if stage == "writing" else states.small
    job = started(make_job(save_steps=4), 2, make)
    job.all("train", 1, 4, make)
    job.until_committed(4)
    actor = job.agent(0) if who == "agent" else job.coordinator()
    first = job.begin("train", 5, 8, make)
    if stage == "writing":
        eventually(during(job, "writing"), "shards are being written", every_s=0.005)
    before = job.kill_actor(actor)
    get(first)
    job.all("call", "wait")
    job.all("train", 9, 12, make)
    job.all("call", "wait")
    assert job.steps()[-1] == 12
    assert all(report.ok for report in ray_ckpt.verify(job.url))
    assert get((job.agent(0) if who == "agent" else job.coordinator()).pid.remote()) != before


@pytest.mark.slow
def test_the_coordinator_killed_again_and_again_does_no_harm(make_job: Callable[..., Job], seed: int) -> None:
    rng = np.random.default_rng(seed)
    job = started(make_job(save_steps=2, max_to_keep=3), 2)
    refs = job.begin("train", 1, 60, states.small, 0.25)
    for _ in range(4):
        newest = job.steps()[-1:]
        eventually(lambda newest=newest: job.steps()[-1:] > newest, "another commit")
        pause(float(rng.uniform(0.0, 1.0)))
        job.kill_actor(job.coordinator())
    get(refs)
    job.all("call", "close")
    assert job.steps()[-1] == 60
    assert all(report.ok for report in ray_ckpt.verify(job.url))
    eventually(lambda: SegmentState.SEALED not in segment_states(job, 0), "all segments are free")
