"""What a job leaves behind: nothing but its checkpoints, and of those only what it shall keep."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.util import list_named_actors

import ray_ckpt
from ray_ckpt import log
from ray_ckpt.agent.owning import OWNER, lock
from ray_ckpt.checkpointer import courier
from ray_ckpt.coordinator import NAMESPACE, run_id
from ray_ckpt.snapshot import default_folder
from ray_ckpt.storage import open_store
from tests.snapshot.helpers import of_version
from tests.system import states
from tests.system.job import Job, get
from tests.system.processes import segment_folder
from tests.system.waiting import eventually

pytestmark = pytest.mark.xdist_group("ray")


def actors_of(job: Job) -> list[str]:
    """Names of the run's actors that Ray knows."""
    return [a["name"] for a in list_named_actors(True) if a["namespace"] == NAMESPACE and run_id(job.url) in a["name"]]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "killed", "fenced"])
def test_actors_and_memory_go_with_the_job(make_job: Callable[..., Job], end: str) -> None:
    job = make_job(save_steps=2).start(2)
    job.all("restore")
    job.all("train", 1, 4)
    folders = [segment_folder(job, rank) for rank in range(2)]
    assert all(list(folder.glob("*.segment")) for folder in folders)
    assert len(actors_of(job)) == 3, "a coordinator and two agents"
    if end == "close":
        job.all("call", "close")
        assert job.steps() == [2, 4]
    elif end == "killed":
        for rank in range(2):
            job.kill(rank)
    else:
        newer = make_job(save_steps=2).start(2, hosts=[2, 3])
        newer.all("restore")
        newer.all("call", "close")
    eventually(lambda: actors_of(job) == [], "all actors have ended", timeout_s=100)
    # Another test's fixture makes its folder anew; look where the agents of this one had theirs.
    for folder in folders:
        # After a kill the files stay for the next start on this machine.
        assert bool(list(folder.glob("*"))) == (end == "killed")
    job.end()
    again = make_job(save_steps=2).start(2)
    assert again.all("restore") == [4, 4]


@pytest.mark.slow
def test_what_another_agent_still_owned_at_first_is_taken_over(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=2)
    gone = default_folder(f"{run_id(job.url)}-0123456789ab")
    of_version(gone / "00000-0.segment", b"3")
    owner = lock(gone / OWNER)
    try:
        job.start(1)
        job.all("restore")
        assert gone.exists()
    finally:
        os.close(owner)
    eventually(lambda: not gone.exists(), "a folder that nobody owns any more")


def test_memory_is_given_back_before_close_returns(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=2).start(1)
    job.all("restore")
    job.all("train", 1, 3)
    folder = segment_folder(job, 0)
    assert list(folder.glob("*.segment"))
    job.all("do", have_patience)
    job.all("call", "close")
    # The last word of a worker waits for it: a cluster that ends now would leave the memory behind for good.
    assert list(folder.glob("*.segment")) == []
    assert job.steps() == [2, 3]


def have_patience(worker: object) -> None:
    """Its process waits for the answer to its last word however slow the machine is."""
    courier._LAST_WORD_S = 60.0


def test_retention_spares_what_is_pinned(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=1, max_to_keep=2, keep_every_steps=4).start(2)
    job.all("restore")
    job.all("train", 1, 2)
    job.until_committed(2)
    store = open_store(job.url)
    with log.pin(store, "model.ckpt-2", by="a test"):
        for step in range(3, 11):
            job.all("train", step, step)
            job.all("call", "wait")
        eventually(lambda: job.steps() == [4, 8, 9, 10], "two and the milestones stay")
        eventually(lambda: kept(job) == {2, 4, 8, 9, 10}, "the others are deleted, the pinned one stays")
        assert job.files("model.ckpt-2.index") == ["model.ckpt-2.index"]
    eventually(lambda: kept(job) == {4, 8, 9, 10}, "what was pinned goes too")
    job.all("call", "close")
    assert all(report.ok for report in ray_ckpt.verify(job.url))
    claims = {c.step for c in log.list_claims(store)}
    assert claims == {4, 8, 9, 10}


def kept(job: Job) -> set[int]:
    """Steps with any file of data or index."""
    return {int(name.split(".")[1].removeprefix("ckpt-")) for name in job.files("model.ckpt-*")}


def test_threads_and_files_of_a_closed_checkpointer_are_given_back(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=1)
    counts = []
    for round_ in range(3):
        job.start(1, hosts=[1])
        job.all("restore")
        job.all("train", 2 * round_ + 1, 2 * round_ + 2)
        job.all("call", "close")
        counts.append(job.on(0, "do", open_things))
        job.end()
    assert counts[2][0] == [], f"threads are left: {counts}"
    assert counts[2][1] == counts[1][1] == 0, f"segments are left open: {counts}"


def open_things(worker: object) -> tuple[list[str], int]:
    """This package's threads, and its segments that are mapped, in this process."""
    import threading

    maps = Path("/proc/self/maps").read_text().splitlines()
    threads = [t.name for t in threading.enumerate() if t.name.startswith("ray-ckpt")]
    return threads, sum(".segment" in line for line in maps)


def test_ray_forgets_nothing_else(ray_cluster: object) -> None:
    # Ray's own libraries have named actors, too.
    ours = [a for a in list_named_actors(True) if a["name"].startswith(("coordinator:", "agent:"))]
    assert {a["namespace"] for a in ours} <= {NAMESPACE}
    assert get(ray.put(states.SHAPE)) == states.SHAPE
