"""Starts of a job: restarts, several at once, ranks that disagree, and what each restores."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

import ray_ckpt
from ray_ckpt.checkpointer import Timeouts
from ray_ckpt.errors import (
    DamagedError,
    FencedError,
    MismatchError,
    NoCheckpointError,
    UnavailableError,
    UsageError,
)
from ray_ckpt.storage import open_store
from tests.restore.make import flip
from tests.system import states
from tests.system.job import Job, get
from tests.system.waiting import eventually
from tests.system.worker import Worker

pytestmark = pytest.mark.xdist_group("ray")


def run(job: Job, world: int, last: int) -> Job:
    """A start that restores, trains up to a step and ends."""
    job.start(world)
    (restored,) = set(job.all("restore"))
    job.all("train", (restored or 0) + 1, last)
    job.all("call", "close")
    job.end()
    return job


@pytest.mark.slow
def test_killed_jobs_restart_on_other_numbers_of_workers(make_job: Callable[..., Job]) -> None:
    previous = None
    for world, last in ((2, 6), (3, 10), (1, 13)):
        job = make_job(save_steps=2).start(world)
        assert job.all("restore", states.mixed) == [previous] * world
        job.all("train", (previous or 0) + 1, last, states.mixed)
        previous = last - last % 2
        job.until_committed(previous)
        for rank in range(world):
            job.kill(rank)
        job.end()
    assert states.plain(ray_ckpt.load(job.url)["table"]) == states.plain(states.whole(12)["table"])


def test_a_newer_start_fences_the_older_one(make_job: Callable[..., Job]) -> None:
    old = make_job(save_steps=2).start(2)
    old.all("restore")
    old.all("train", 1, 3)
    old.until_committed(2)
    new = make_job(save_steps=2).start(2)
    assert new.all("restore") == [2, 2]
    for ref in old.begin("train", 4, 4):
        with pytest.raises(FencedError, match=r"rank \d of .*: the job was started again \(generation 2\)"):
            get(ref)
    new.all("train", 3, 4)
    new.until_committed(4)
    assert [c.generation for c in ray_ckpt.checkpoints(new.url)] == [1, 2]
    with pytest.raises(FencedError):
        old.on(0, "call", "close")


def test_of_two_processes_of_one_rank_one_is_fenced(make_job: Callable[..., Job]) -> None:
    jobs = [make_job(save_steps=2) for _ in range(2)]
    for job in jobs:
        job.start(2)
    refs = [job.begin("restore") for job in jobs]
    for rank in range(2):
        ends = []
        for of_job in refs:
            try:
                ends.append(get(of_job[rank]))
            except RayTaskError as error:
                assert isinstance(error, FencedError)  # noqa: PT017
                ends.append(str(error.cause))
        assert ends.count(None) == 1, ends
        assert sum("a newer process joined as rank" in str(end) for end in ends) == 1, ends


IN_ANOTHER_CLUSTER = """
import sys, numpy as np, ray, ray_ckpt
ray.init(address="local", include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
with ray_ckpt.Checkpointer(sys.argv[1], save_steps=2, rank=0, world_size=1) as ckpt:
    state = ckpt.restore({"w": np.zeros(64, np.float32), "part": np.zeros((1, 16), np.int64), "step": 0})
    for step in range(ckpt.restored_step + 1, ckpt.restored_step + 5):
        ckpt.step(step, state)
print(ckpt.all_steps())
"""


@pytest.mark.slow
def test_a_job_in_another_cluster_takes_the_directory_over(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=2).start(1)
    job.all("restore")
    job.all("train", 1, 2)
    job.until_committed(2)
    other = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_CLUSTER, job.url], capture_output=True, text=True, timeout=200
    )
    assert other.returncode == 0, other.stderr
    assert other.stdout.splitlines()[-1] == "[2, 4, 6]"
    with pytest.raises(FencedError, match=r"generation 1 is over: the job was started again \(now generation 2\)"):
        job.all("train", 3, 400, states.small, 0.1)
    assert job.steps() == [2, 4, 6]


def test_a_step_that_is_not_there(make_job: Callable[..., Job]) -> None:
    run(make_job(save_steps=2), 2, 4)
    job = make_job(save_steps=2).start(2)
    for ref in job.begin("restore", states.small, 3):
        with pytest.raises(NoCheckpointError, match="step 3 is not among the checkpoints: 2, 4"):
            get(ref)


def test_no_restore_where_checkpoints_are(make_job: Callable[..., Job]) -> None:
    run(make_job(save_steps=2), 1, 2)
    job = make_job(save_steps=2).start(1)
    with pytest.raises(UsageError, match=r"checkpoints up to step 2, .* call restore\(\) first, or pass fresh=True"):
        job.all("train", 1, 1)
    job.end()
    fresh = make_job(save_steps=2, fresh=True).start(1)
    fresh.all("train", 1, 1)
    fresh.all("call", "close")
    assert fresh.on(0, "call", "all_steps") == [1]


def test_nothing_to_restore(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    with pytest.raises(NoCheckpointError, match=r"no checkpoint in .*run"):
        job.on(0, "restore", states.small, None, missing="error")


def restore_without_values(worker: Worker) -> list[str]:
    import jax

    texts: list[str] = []
    for like in (None, {"w": jax.ShapeDtypeStruct((2,), np.float32)}):
        with ray_ckpt.Checkpointer(f"{worker.ckpt.url}-{len(texts)}", rank=0, world_size=1) as ckpt:
            with pytest.raises(NoCheckpointError) as caught:
                ckpt.restore(like)
            texts.append(str(caught.value))
    return texts


def test_an_abstract_target_needs_a_checkpoint(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    for text, what in zip(job.on(0, "do", restore_without_values), ("None", "abstract"), strict=True):
        assert re.search(rf"no checkpoint in file://.*, and `like` is {what}: pass a function", text)


@pytest.mark.slow
def test_an_older_step_on_purpose_supersedes_the_newer(make_job: Callable[..., Job]) -> None:
    run(make_job(save_steps=2), 2, 6)
    job = make_job(save_steps=2).start(2)
    assert job.all("restore", states.small, 2) == [2, 2]
    assert job.on(0, "call", "all_steps") == [2]
    job.all("train", 3, 4)
    job.until_committed(4)
    job.all("call", "wait")
    assert job.on(0, "call", "all_steps") == [2, 4]
    assert ray_ckpt.load(job.url)["step"] == 4


def test_damage_makes_all_ranks_take_the_older_one(make_job: Callable[..., Job]) -> None:
    first = run(make_job(save_steps=2), 2, 4)
    flip(open_store(first.url), first.files("model.ckpt-4.data-*")[0], 3)
    job = make_job(save_steps=2).start(2)
    assert job.all("restore") == [2, 2]
    assert job.all("get", "state") == [states.plain(states.small(rank, 2, 2)) for rank in range(2)]
    for said in job.all("get", "messages"):
        assert any("model.ckpt-4 is damaged" in text and "taking step 2 instead" in text for text in said)
    job.all("train", 3, 4)
    job.all("call", "wait")
    assert job.on(0, "call", "all_steps") == [2, 4]


@pytest.mark.slow
def test_damage_everywhere_is_an_error(make_job: Callable[..., Job]) -> None:
    first = run(make_job(save_steps=2), 1, 4)
    for path in first.path.glob("model.ckpt-*.data-*"):
        path.write_bytes(b"")
    job = make_job(save_steps=2).start(1)
    with pytest.raises(DamagedError, match="there is no older checkpoint to take instead"):
        job.all("restore")


@pytest.mark.parametrize(
    ("mine", "theirs", "text"),
    [
        ({"save_steps": 2}, {"save_steps": 3}, r"save_steps=\d against \d"),
        pytest.param({"world": 2}, {"world": 3}, r"world_size=\d against \d", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_disagree_are_told(
    make_job: Callable[..., Job], mine: dict[str, Any], theirs: dict[str, Any], text: str
) -> None:
    job = make_job().start(2)
    for worker in job.workers:
        get(worker.leave.remote())
    settings = [dict(s) for s in (mine, theirs)]
    timeouts = Timeouts(start_s=8.0)
    for rank, (worker, given) in enumerate(zip(job.workers, settings, strict=True)):
        world = given.pop("world", 2)
        get(worker.open.remote(f"{job.url}-disagree", rank, world, timeouts=timeouts, **given))
    eventually(lambda: any(get(w.do.remote(is_refused)) for w in job.workers), "they have heard of each other")
    refs = [worker.restore.remote() for worker in job.workers]
    texts = []
    for ref in refs:
        with pytest.raises((FencedError, UnavailableError)) as caught:
            get(ref)
        texts.append(str(caught.value))
    assert any(re.search(text, t) and "give all ranks the same settings" in t for t in texts), texts


def is_refused(worker: Worker) -> bool:
    return worker.ckpt._link.trouble is not None


def late(worker: Worker) -> str:
    """Whom this worker has been told to wait for."""
    return worker.ckpt._link.logic.late


def test_a_rank_that_never_comes_is_named(make_job: Callable[..., Job]) -> None:
    job = make_job(timeouts=Timeouts(start_s=8.0)).start(2)
    eventually(lambda: "rank 1" in job.on(0, "do", late), "the coordinator has told whom it waits for")
    # On a slow machine it may not have heard of rank 0's call by the end of its patience.
    told = r"rank 0 of .* waited 8 s for .*; late is: (rank 0 on \S+, )?rank 1 on .* has not called"
    with pytest.raises(UnavailableError, match=told):
        job.on(0, "restore")


def test_a_rank_that_leaves_in_its_restore_is_named(make_job: Callable[..., Job]) -> None:
    run(make_job(save_steps=2), 2, 2)
    job = make_job(timeouts=Timeouts(start_s=30.0)).start(2)
    waiting = job.workers[0].restore.remote()
    with pytest.raises(MismatchError):
        job.on(1, "restore", with_extra)
    job.on(1, "leave")
    with pytest.raises(UnavailableError, match=r"rank 1 on .* has left without restoring"):
        get(waiting)


def test_a_target_that_does_not_fit(make_job: Callable[..., Job]) -> None:
    run(make_job(save_steps=2), 1, 2)
    job = make_job().start(1)
    with pytest.raises(MismatchError, match="extra"):
        job.on(0, "restore", with_extra)
    eventually(lambda: job.steps() == [2], "nothing is harmed")


def with_extra(rank: int, world: int, step: int) -> dict[str, Any]:
    """`states.small` and one leaf more."""
    return {**states.small(rank, world, step), "extra": 1}
