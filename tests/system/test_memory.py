"""Snapshots outlive the processes that took them: what a restart finds in host memory, and when it is given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_ckpt
from ray_ckpt import PerWorker
from ray_ckpt.agent.owning import SUFFIX
from ray_ckpt.snapshot import SegmentState
from tests.system import states
from tests.system.job import QUICK, Job, get, kill_all
from tests.system.processes import flip_table, segment_folder, segment_states
from tests.system.waiting import eventually
from tests.system.worker import Worker, until_planned

pytestmark = pytest.mark.xdist_group("ray")

PATIENT = replace(QUICK, recover_s=60.0)
"""A loaded machine takes its time to start a job again."""


def start(job: Job, world: int) -> Job:
    job.start(world)
    assert job.all("restore") == [None] * world
    return job


def until_in_memory(job: Job, step: int) -> None:
    eventually(lambda: get(job.coordinator().status.remote()).memory_step == step, f"step {step} whole in memory")


def said(job: Job, text: str) -> list[str]:
    return [m for messages in job.all("get", "messages") for m in messages if text in m]


def expect(job: Job, step: int) -> None:
    """Every rank holds the bits of this step."""
    world = len(job.workers)
    assert job.all("get", "state") == [states.plain(states.small(rank, world, step)) for rank in range(world)]


def test_a_restart_reads_what_was_committed_from_memory(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, save_steps=4), 2)
    job.all("train", 1, 9)
    job.until_committed(8)
    kill_all(job)
    for path in job.path.glob("model.ckpt-8.*"):
        # Whoever reads a byte of it there finds that out.
        path.write_bytes(b"")
    again = make_job(timeouts=PATIENT, save_steps=4).start(2)
    assert again.all("restore") == [8, 8]
    expect(again, 8)
    assert len(said(again, "step 8 read from the memory of 2 hosts")) == 2


def test_a_newer_step_than_the_store_has(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, save_steps=10_000, memory_steps=3), 2)
    job.all("do", until_planned)
    job.all("train", 1, 7)
    until_in_memory(job, 6)
    kill_all(job)
    again = make_job(timeouts=PATIENT, save_steps=10_000, memory_steps=3).start(2)
    assert again.all("restore") == [6, 6]
    expect(again, 6)
    assert ray_ckpt.checkpoints(again.url) == []
    again.all("train", 7, 10)
    again.all("call", "close")
    assert again.steps() == [10]


def keep(worker: Worker) -> None:
    """Hold on to what was restored while other states are trained."""
    worker.kept = worker.state  # type: ignore[attr-defined]


def kept(worker: Worker) -> Any:
    return states.plain(worker.kept)  # type: ignore[attr-defined]


def lent(worker: Worker) -> list[str]:
    """The segments whose memory this process has as its own."""
    return [
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if SUFFIX in line and "w-p" in line
    ]


def test_what_was_restored_stays_as_it_is_whatever_is_saved_after(make_job: Callable[..., Job]) -> None:
    settings: dict[str, Any] = {"timeouts": PATIENT, "save_steps": 4, "memory_steps": 1}
    size = partial(states.large, nbytes=3 << 20)
    for first, last in ((1, 6), (7, 14), (15, 22)):
        job = make_job(**settings).start(2)
        assert job.all("restore", size) == [first - 1 or None] * 2
        assert [len(names) for names in job.all("do", lent)] == [int(first > 1)] * 2
        job.all("do", keep)
        job.all("do", until_planned)
        job.all("train", first, last - 1, size)
        job.until_committed(last // 4 * 4)
        job.all("train", last, last, size)
        until_in_memory(job, last)
        if first > 1:
            assert job.all("do", kept) == [states.plain(size(rank, 2, first - 1)) for rank in range(2)]
        files = [len(list(segment_folder(job, rank).glob(f"*{SUFFIX}"))) for rank in range(2)]
        assert max(files) <= 4, "what lies in a restored state's memory is given up"
        kill_all(job)


@pytest.mark.slow
def test_half_of_a_newer_save_does_not_cost_what_was_restored_before_it(make_job: Callable[..., Job]) -> None:
    settings: dict[str, Any] = {"timeouts": PATIENT, "save_steps": 8, "memory_steps": 6}
    size = partial(states.large, nbytes=3 << 20)
    job = make_job(**settings).start(2)
    assert job.all("restore", size) == [None] * 2
    job.all("do", until_planned)
    job.all("train", 1, 7, size)
    until_in_memory(job, 6)
    kill_all(job)
    job = make_job(**settings).start(2)
    assert job.all("restore", size) == [6] * 2
    job.all("do", until_planned)
    job.all("train", 7, 7, size)
    job.on(0, "train", 8, 8, size)
    eventually(lambda: SegmentState.SEALED in segment_states(job, 0), "rank 0's snapshot of step 8")
    kill_all(job)
    assert make_job(**settings).start(2).all("restore", size) == [6] * 2


@pytest.mark.slow
def test_a_loop_with_no_step_left_still_saves_what_only_memory_held(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, memory_steps=3), 2)
    job.all("do", until_planned)
    job.all("train", 1, 6)
    until_in_memory(job, 6)
    kill_all(job)
    again = make_job(timeouts=PATIENT, memory_steps=3).start(2)
    assert again.all("restore") == [6, 6]
    again.all("call", "close")
    assert again.steps() == [6]


@pytest.mark.slow
def test_other_numbers_of_hosts_restore_from_memory(make_job: Callable[..., Job]) -> None:
    job = make_job(timeouts=PATIENT, save_steps=4).start(3)
    job.all("restore", states.mixed)
    job.all("train", 1, 4, states.mixed)
    job.until_committed(4)
    kill_all(job)
    for path in job.path.glob("model.ckpt-4.data*"):
        path.write_bytes(b"")
    for world in (2, 4):
        again = make_job(timeouts=PATIENT, save_steps=4).start(world)
        assert again.all("restore", states.mixed) == [4] * world
        for rank, found in enumerate(again.all("get", "state")):
            # Of the generators' states, one for each worker, all get the first here.
            expected = {**states.mixed(rank, world, 4), "rng": PerWorker(np.array([0, 4], np.uint32))}
            assert found == states.plain(expected)
        kill_all(again)


@pytest.mark.slow
def test_a_clean_end_gives_the_memory_back(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, save_steps=4), 1)
    job.all("train", 1, 9)
    eventually(lambda: SegmentState.KEPT in segment_states(job, 0), "a snapshot kept")
    job.all("call", "close")
    eventually(lambda: not list(segment_folder(job, 0).glob("*.segment")), "an empty folder")


@pytest.mark.slow
def test_what_cannot_be_read_in_memory_is_read_in_the_store(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, save_steps=4), 2)
    job.all("train", 1, 5)
    job.until_committed(4)
    agent = job.agent(1)
    folder = segment_folder(job, 1)
    kill_all(job)
    job.kill_actor(agent)
    for path in folder.glob("*.segment"):
        path.unlink()
    again = make_job(timeouts=PATIENT, save_steps=4).start(2)
    assert again.all("restore") == [4, 4]
    expect(again, 4)


def test_memory_only_snapshots_are_lost_with_their_host(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, save_steps=4, memory_steps=1), 2)
    job.all("do", until_planned)
    job.all("train", 1, 6)
    job.until_committed(4)
    until_in_memory(job, 6)
    agent, folder = job.agent(1), segment_folder(job, 1)
    kill_all(job)
    for path in folder.glob("*.segment"):
        path.unlink()
    os.kill(get(agent.pid.remote()), signal.SIGKILL)
    again = make_job(timeouts=PATIENT, save_steps=4, memory_steps=1).start(2)
    assert again.all("restore") == [4, 4]
    expect(again, 4)


def test_a_snapshot_that_is_damaged_gives_way_to_the_one_before_on_all_ranks(make_job: Callable[..., Job]) -> None:
    job = start(make_job(timeouts=PATIENT, save_steps=10_000, memory_steps=3), 2)
    job.all("do", until_planned)
    job.all("train", 1, 7)
    until_in_memory(job, 6)
    flip_table(job, 1, 6)
    kill_all(job)
    again = make_job(timeouts=PATIENT, save_steps=10_000, memory_steps=3).start(2)
    assert again.all("restore") == [3, 3]
    expect(again, 3)
    text = "the snapshot of step 6 in host memory is damaged"
    assert len([m for m in said(again, text) if "taking step 3 from host memory instead" in m]) == 2
