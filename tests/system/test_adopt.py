"""Starts whose state was read by other means, loops that tell a bound, and saves of the restored step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

import ray_ckpt
from ray_ckpt.bundle import parse_state_file
from ray_ckpt.errors import NoCheckpointError, UsageError
from ray_ckpt.tree import Named
from tests.system import states
from tests.system.job import Job, get
from tests.system.waiting import eventually
from tests.system.worker import Worker

pytestmark = pytest.mark.xdist_group("ray")


def named(rank: int, world: int, step: int) -> Any:
    """A flat state under TensorFlow's names."""
    return Named({"dense/kernel": np.full(8, step, np.float32), "global_step": np.int64(step)})


def run(worker: Worker, last: int) -> list[int]:
    """Run a loop that only knows a bound, two steps a run, until there is nothing left to save; the steps told."""
    told = []
    for step in range(worker.done + 2, last + 1, 2):
        worker.done = step
        if worker.ckpt.reached(step + 2):
            worker.ckpt.step(step, lambda step=step: named(worker.rank, worker.world, step))
            told.append(step)
    return told


def counted(worker: Worker, step: int, **options: Any) -> int:
    """Save with a function for a state; how often it was called."""
    calls = []

    def make() -> Any:
        calls.append(step)
        return named(worker.rank, worker.world, step)

    worker.ckpt.save(step, make, **options)
    return len(calls)


def newest(job: Job) -> str | None:
    return parse_state_file((job.path / "checkpoint").read_bytes()).newest


@pytest.fixture
def saved(make_job: Callable[..., Job]) -> Job:
    """A run of two workers with steps 3 and 5."""
    job = make_job().start(2)
    assert job.all("call", "adopt", None) == [None, None]
    for step in (3, 5):
        assert job.all("do", counted, step) == [1, 1]
        job.all("call", "wait")
    assert job.all("get", "generation") == [1, 1]
    job.end()
    return job


def test_a_start_from_a_step_that_others_read_saves_it_again(saved: Job, make_job: Callable[..., Job]) -> None:
    tf = pytest.importorskip("tensorflow")
    job = make_job(saved.path).start(2)
    job.all("call", "adopt", 5)
    assert job.all("get", "restored_step") == [5, 5]
    assert job.all("get", "generation") == [2, 2]
    assert job.all("do", counted, 5) == [0, 0]
    assert job.all("call", "outcome", 5) == [None, None]
    assert job.all("do", partial(counted, force=True), 5) == [1, 1]
    job.all("call", "wait")
    (outcome, _) = job.all("call", "outcome", 5)
    assert (outcome.state, outcome.generation) == ("committed", 2)
    assert outcome.prefix.endswith("/model.ckpt-5")
    eventually(lambda: newest(job) == outcome.prefix, "the file names the newest")
    latest = tf.train.latest_checkpoint(job.url)
    assert Path(latest) == job.path / outcome.prefix
    assert tf.train.load_checkpoint(latest).get_tensor("dense/kernel").tolist() == [5.0] * 8
    assert [(c.step, c.superseded) for c in ray_ckpt.checkpoints(job.url)] == [(3, False), (5, True), (5, False)]
    job.all("call", "close")
    assert job.steps() == [3, 5, 5]


def test_an_older_step_supersedes_what_came_after_it(saved: Job, make_job: Callable[..., Job]) -> None:
    job = make_job(saved.path).start(2)
    job.all("call", "adopt", 3)
    assert [(c.step, c.superseded) for c in ray_ckpt.checkpoints(job.url)] == [(3, False), (5, True)]
    assert job.all("do", counted, 4) == [1, 1]
    job.all("call", "wait")
    assert job.all("call", "all_steps") == [[3, 4], [3, 4]]


def test_nothing_but_a_fresh_start_or_a_step_that_is_there_is_adopted(saved: Job, make_job: Callable[..., Job]) -> None:
    job = make_job(saved.path).start(1)
    with pytest.raises((UsageError, RayTaskError), match="pass fresh=True"):
        job.on(0, "call", "adopt", None)
    job = make_job(saved.path).start(1)
    with pytest.raises((NoCheckpointError, RayTaskError), match="step 4 is not among the checkpoints: 3, 5"):
        job.on(0, "call", "adopt", 4)
    job = make_job(saved.path, fresh=True, keep_before=0, max_to_keep=1, basename="anew").start(1)
    job.on(0, "call", "adopt", None)
    for call in (("adopt", 5), ("restore",)):
        with pytest.raises((UsageError, RayTaskError), match="adopt"):
            job.on(0, "call", *call)
    for step in (7, 8):
        job.on(0, "do", counted, step)
    job.on(0, "call", "wait")
    eventually(lambda: job.steps() == [3, 5, 8], "what this start made is deleted, what was there is not")
    eventually(lambda: newest(job) == "anew-8", "the state file to follow")


def test_a_loop_that_tells_a_bound_saves_and_stops_with_the_others(make_job: Callable[..., Job]) -> None:
    job = make_job(stride=2).start(2)
    job.all("call", "adopt", None)
    job.all("do", run, 20)
    request = job.on(1, "call", "request_save")
    assert request

    def told() -> list[int]:
        first, second = job.all("do", run_on)
        return [step for step in first if step in second]

    common = eventually(told, "both are told to say their steps")
    eventually(lambda: (job.all("do", run_on), job.steps())[1], "a save at an agreed step")
    (step,) = job.steps()
    assert step > 20
    assert common
    job.on(0, "call", "request_stop")
    eventually(lambda: (job.all("do", run_on), all(job.all("get", "should_stop")))[1], "both stop")
    last, other = job.all("get", "done")
    assert last == other > step
    job.all("do", run_past)
    job.all("call", "close")
    assert job.steps() == [step, last]


def run_on(worker: Worker) -> list[int]:
    """A few more runs, unless this worker stops."""
    told = []
    for _ in range(3):
        if worker.ckpt.should_stop:
            break
        told += run(worker, worker.done + 2)
    return told


def run_past(worker: Worker) -> None:
    """The loop goes beyond the last step that was told: its state is not known any more."""
    worker.ckpt.reached(worker.done + 10)


def test_who_waits_for_the_first_plan_goes_on_once_another_rank_was_too_late(make_job: Callable[..., Job]) -> None:
    """No rank has a snapshot of the step that was refused, so no save of it would ever end."""
    job = make_job().start(2)
    job.all("call", "adopt", None)
    job.all("do", run, 10)
    (deaf,) = job.begin("do", hear_nothing_until_far_ahead)[1:]
    job.on(0, "call", "request_save")
    step = eventually(lambda: job.on(0, "do", agreed), "one rank is bound to a step")
    told = job.begin("do", tell, step)[0]
    eventually(lambda: job.on(0, "do", waits_for_a_plan), "it waits there for the structure of the other's state")
    job.on(1, "go_on", 0)
    get([deaf, told])
    assert not [message for message in job.on(0, "get", "messages") if "could not snapshot" in message]
    assert job.on(0, "call", "outcome", step) is None


def hear_nothing_until_far_ahead(worker: Worker) -> None:
    """Votes for nothing until `go_on`; then the loop has gone past all that was proposed."""
    if worker.rank == 0:
        return
    with worker.ckpt._link.lock:
        worker.wait_to_go_on()
        worker.ckpt.reached(1000)


def agreed(worker: Worker) -> int | None:
    """The step that this worker is bound to."""
    return next((p.step for p in worker.ckpt._link.logic.report().accepted), None)


def tell(worker: Worker, step: int) -> None:
    if worker.rank == 0:
        worker.ckpt.step(step, lambda: named(worker.rank, worker.world, step))


def waits_for_a_plan(worker: Worker) -> bool:
    return worker.ckpt._link.logic.report().waiting_step is not None


def test_leaving_adds_nothing_to_what_was_saved(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    job.on(0, "call", "adopt", None)
    job.on(0, "call", "close")
    assert job.steps() == []
    job = make_job(job.path).start(1)
    job.on(0, "call", "adopt", None)
    job.on(0, "do", counted, 2)
    job.on(0, "do", run, 9)
    job.on(0, "call", "close")
    assert job.steps() == [2]


def test_the_last_step_that_was_told_is_saved_on_leaving(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    job.on(0, "call", "adopt", None)
    job.on(0, "train", 1, 4, states.small)
    job.on(0, "call", "close")
    assert job.steps() == [4]


def test_the_graph_goes_with_its_checkpoint(make_job: Callable[..., Job]) -> None:
    job = make_job(max_to_keep=1).start(1)
    job.on(0, "call", "adopt", None)
    for step in (1, 2):
        job.on(0, "do", counted, step)
        job.on(0, "call", "wait")
        (job.path / f"model.ckpt-{step}.meta").write_bytes(b"graph")
        eventually(lambda step=step: job.files("model.ckpt-*.meta") == [f"model.ckpt-{step}.meta"], "one graph is left")
    assert not job.files("model.ckpt-1.*")
