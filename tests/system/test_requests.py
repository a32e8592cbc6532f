"""When all workers save or stop: cadences, requests, stops, and the end of the run, at different speeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import ray_ckpt
from ray_ckpt.coordinator import request_save
from ray_ckpt.errors import UsageError
from tests.system import states
from tests.system.job import Job, get
from tests.system.waiting import eventually
from tests.system.worker import Worker

pytestmark = pytest.mark.xdist_group("ray")

LONG = 100_000


def training(job: Job, world: int, make: Any, pace_s: float = 0.01) -> list[Any]:
    """Start a job that trains until it is told to halt."""
    job.start(world)
    job.all("restore", make)
    return job.begin("train", 1, LONG, make, pace_s)


def halt(job: Job, refs: list[Any]) -> None:
    """End the training loops, all at one step: one that was agreed on may lie between where they are."""
    job.all("go_on", max(job.all("hold")))
    get(refs)


def all_equal_the_step(job: Job, step: int) -> bool:
    """Whether every part of a checkpoint is of this step: no two ranks saved different ones."""
    found = ray_ckpt.load(job.url, step)
    return found["step"] == step and (found["part"][:, 0] % 100 == step % 100).all()


def of_step(rank: int, world: int, step: int) -> dict[str, Any]:
    """`states.small` with values that tell the step, however large it is."""
    return states.small(rank, world, step % 100) | {"step": step}


def test_requests_from_everywhere(make_job: Callable[..., Job]) -> None:
    job = make_job()
    refs = training(job, 2, of_step)
    step = request_save(job.url, "from the driver", 60.0)
    assert all_equal_the_step(job, step)
    job.on(1, "call", "request_save", "from a worker")
    later = eventually(lambda: [s for s in job.steps() if s > step], "a save for the worker's request")
    assert all_equal_the_step(job, later[0])
    status = ray_ckpt.status(job.url)
    assert (status.phase, status.world_size, len(status.steps)) == ("active", 2, 2)
    halt(job, refs)


def test_a_request_to_nobody_names_the_directory(ray_cluster: Any) -> None:
    with pytest.raises(UsageError, match=r"no running job of this Ray cluster saves to file:///nowhere/run"):
        request_save("/nowhere/run", "why not", 5.0)


def test_a_stop_is_seen_at_one_step_by_all(make_job: Callable[..., Job]) -> None:
    job = make_job()
    refs = training(job, 2, of_step)
    eventually(lambda: min(job.all("get", "done")) > 3, "both are training")
    job.on(1, "call", "request_stop", "enough")
    stopped = get(refs)
    assert stopped[0] == stopped[1] != []
    job.all("call", "close")
    assert job.steps() == stopped[0]
    assert all_equal_the_step(job, stopped[0][0])
    assert job.all("get", "should_stop") == [True, True]


@pytest.mark.slow
def test_seconds_cadence_at_different_speeds(make_job: Callable[..., Job]) -> None:
    job = make_job(save_secs=0.5, max_to_keep=None)
    refs = training(job, 3, of_step)
    eventually(lambda: len(job.steps()) >= 5, "five saves")
    halt(job, refs)
    for step in job.steps():
        assert all_equal_the_step(job, step)


def huge(rank: int, world: int, step: int) -> dict[str, Any]:
    """So large that its write takes longer than its step."""
    return states.large(rank, world, step, 64 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["skip", "coalesce"])
def test_saves_that_come_too_fast(make_job: Callable[..., Job], overlap: str) -> None:
    job = make_job(save_steps=2, overlap=overlap, snapshots=1, max_to_keep=None)
    refs = training(job, 2, huge, 0.002)
    eventually(lambda: len(job.steps()) >= 3, "three saves in spite of the pace")
    halt(job, refs)
    job.all("call", "wait")
    steps = job.steps()
    assert steps[-1] - steps[0] > 2 * (len(steps) - 1), "some were left out"
    for step in steps[-2:]:
        loaded = ray_ckpt.load(job.url, step)
        assert [loaded["w"][rank, -1] for rank in range(2)] == [step, step + 1]
    if overlap == "skip":
        assert all(step % 2 == 0 for step in steps)


def test_the_last_step_is_saved_on_a_clean_exit_alone(make_job: Callable[..., Job]) -> None:
    def loop(worker: Worker, fail: bool) -> None:
        with worker.ckpt as ckpt:
            ckpt.restore(states.small(worker.rank, worker.world, 0))
            for step in (4, 5) if fail else (1, 2, 3):
                ckpt.step(step, states.small(worker.rank, worker.world, step))
            if fail:
                raise ArithmeticError("loss is NaN")

    job = make_job(save_steps=2).start(2)
    get([w.do.remote(loop, False) for w in job.workers])
    assert job.steps() == [2, 3]
    job.end()
    job = make_job(save_steps=2).start(2)
    for ref in [w.do.remote(loop, True) for w in job.workers]:
        with pytest.raises(ArithmeticError):
            get(ref)
    eventually(lambda: job.steps() == [2, 3, 4], "the save under way is finished without the workers")
    job.end()


def test_explicit_saves(make_job: Callable[..., Job]) -> None:
    job = make_job().start(2)
    job.all("restore")
    job.all("train", 1, 3)
    job.all("save", 3)
    job.all("call", "wait")
    assert job.steps() == [3]
    job.all("save", 3)
    job.all("call", "close")
    job.end()
    assert job.steps() == [3]
    again = make_job().start(2)
    assert again.all("restore") == [3, 3]
    again.all("save", 3)
    again.all("call", "wait")
    assert len(ray_ckpt.checkpoints(job.url)) == 1
    again.all("save", 3, force=True)
    again.all("call", "wait")
    (newest,) = [c for c in ray_ckpt.checkpoints(job.url) if not c.superseded]
    assert (newest.step, newest.generation) == (3, 2)


def test_a_rank_that_leaves_a_save_out_is_named(make_job: Callable[..., Job]) -> None:
    job = make_job().start(2)
    job.all("restore")
    job.all("train", 1, 3)
    job.on(0, "save", 3)
    job.on(1, "train", 4, 4)
    with pytest.raises(ray_ckpt.errors.SaveError, match=r"rank 1 on .* went past step 3 without saving it"):
        job.on(0, "call", "wait")
    job.all("save", 5)
    job.all("call", "wait")
    assert job.steps() == [5]


def test_steps_that_go_back(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    job.all("restore")
    job.all("train", 1, 3)
    with pytest.raises(UsageError, match="step 3 follows step 3: steps must increase"):
        job.on(0, "train", 3, 3)
    job.all("call", "close")
    with pytest.raises(UsageError, match=r"this Checkpointer is closed"):
        job.on(0, "restore")
    with pytest.raises(UsageError, match=r"this Checkpointer is closed"):
        job.on(0, "train", 4, 4)
