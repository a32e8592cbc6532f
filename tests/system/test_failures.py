"""Saves that fail: the storage breaks, replicas differ, structures disagree. Training and older checkpoints go on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_ckpt
from ray_ckpt.errors import SaveError, StateError, StorageError, UsageError
from tests.system import states
from tests.system.job import Job, get
from tests.system.waiting import eventually
from tests.system.worker import Worker

pytestmark = pytest.mark.xdist_group("ray")


def trained(job: Job, world: int, last: int, make: Any = states.small) -> Job:
    """A run that has restored nothing and trained up to a step, which is saved."""
    job.start(world)
    job.all("restore", make)
    job.all("train", 1, last, make)
    job.all("call", "wait")
    assert job.steps() == [last]
    return job


def break_shards(path: Path, step: int) -> None:
    """Where the shards of a step go (two writers, three tries, the coordinator's) folders lie: nothing can."""
    for shard in range(7):
        (path / f"model.ckpt-{step}.data-{shard:05d}-of-00007").mkdir()


def test_failed_saves_are_warned_about_and_then_stop_all_at_one_step(make_job: Callable[..., Job]) -> None:
    job = trained(make_job(save_steps=2, max_failures=2), 2, 2)
    break_shards(job.path, 4)
    job.all("train", 3, 5)
    job.all("train", 6, 6)
    for text in (eventually(lambda r=r: warnings(job, r), "a warning") for r in range(2)):
        assert "step 4 was not saved: shard of writer" in text[0]
        assert text[0].endswith("training goes on")
    job.until_committed(6)
    found = job.on(0, "call", "status")
    assert found.failures_in_a_row == 0
    assert found.last_error.startswith("save of step 4 failed: shard of writer")
    for step in range(8, 100, 2):
        break_shards(job.path, step)
    texts = []
    for ref in job.begin("train", 7, 500, states.small, 0.02):
        with pytest.raises(
            SaveError, match=r"all workers stop at step \d+: save of step \d+ failed: .* \(2 in a row\)"
        ) as e:
            get(ref)
        texts.append(str(e.value).rpartition("all workers stop at step")[2])
    assert texts[0] == texts[1]
    assert job.steps() == [2, 6]
    assert all(report.ok for report in ray_ckpt.verify(job.url))


def warnings(job: Job, rank: int) -> list[str]:
    """What a rank was warned about saves."""
    return [m for m in job.on(rank, "get", "messages") if "was not saved" in m]


@pytest.mark.slow
def test_on_error_raise_stops_after_the_first(make_job: Callable[..., Job]) -> None:
    job = trained(make_job(save_steps=2, on_error="raise"), 2, 2)
    break_shards(job.path, 4)
    for ref in job.begin("train", 3, 500, states.small, 0.02):
        with pytest.raises(SaveError, match="save of step 4 failed"):
            get(ref)


def test_a_directory_that_is_gone_for_a_while(make_job: Callable[..., Job]) -> None:
    job = trained(make_job(save_steps=2, max_failures=50), 1, 2)
    aside = job.path.with_name("aside")
    job.path.rename(aside)
    job.path.write_text("somebody else's file")
    job.all("train", 3, 7)
    job.path.unlink()
    aside.rename(job.path)
    job.all("train", 8, 30, states.small, 0.1)
    job.all("call", "close")
    assert job.steps()[-1] == 30
    assert all(report.ok for report in ray_ckpt.verify(job.url))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr!r}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def eight_mib(rank: int, world: int, step: int) -> dict[str, Any]:
    """Three of these do not fit on the tiny disk."""
    return states.large(rank, world, step, 8 << 20)


def test_a_full_disk(make_job: Callable[..., Job], tiny_disk: Path) -> None:
    job = make_job(tiny_disk / "run", save_steps=1, max_to_keep=None, max_failures=10).start(1)
    job.all("restore", eight_mib)
    for step in (1, 2):
        job.all("train", step, step, eight_mib)
        job.all("call", "wait")
    job.all("train", 3, 3, eight_mib)
    with pytest.raises(SaveError, match=r"step 3 was not saved: .*No space left"):
        job.all("call", "wait")
    assert job.steps() == [1, 2]
    assert all(report.ok for report in ray_ckpt.verify(job.url))
    (tiny_disk / "run" / job.files("model.ckpt-1.data-00000*")[0]).write_bytes(b"")
    job.all("train", 4, 4, eight_mib)
    job.all("call", "wait")
    assert job.steps() == [1, 2, 4]


def unequal(rank: int, world: int, step: int) -> dict[str, Any]:
    """Replicas that differ on rank 1."""
    return {"same": np.ones(5), "model": {"bias": np.full(8, rank == 1, np.float32)}, "step": step}


def test_replicas_that_differ_stop_the_job(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=2).start(3)
    job.all("restore", unequal)
    for ref in job.begin("train", 1, 500, unequal, 0.02):
        with pytest.raises(SaveError, match=r"model/bias.* different values on rank 0 and rank 1.*PerWorker"):
            get(ref)
    assert job.steps() == []


def grown(rank: int, world: int, step: int) -> dict[str, Any]:
    """`states.small` with a leaf more from step 4 on."""
    return states.small(rank, world, step) | ({"more": np.arange(step)} if step >= 4 else {})


def grown_on_one(rank: int, world: int, step: int) -> dict[str, Any]:
    """The same on rank 1 alone, and only at step 4; the leaf has another shape than elsewhere."""
    state = states.small(rank, world, step)
    return state | {"w": np.zeros(65, np.float32)} if rank == 1 and step == 4 else state


@pytest.mark.slow
def test_a_structure_may_change_at_one_step_on_all_ranks(make_job: Callable[..., Job]) -> None:
    job = trained(make_job(save_steps=2), 2, 2, grown)
    job.all("train", 3, 6, grown)
    job.all("call", "wait")
    assert job.steps() == [2, 4, 6]
    assert [ray_ckpt.load(job.url, s).get("more", np.empty(0)).size for s in job.steps()] == [0, 4, 6]


@pytest.mark.slow
def test_a_structure_that_changes_on_one_rank_is_an_error(make_job: Callable[..., Job]) -> None:
    job = trained(make_job(save_steps=2), 2, 2, grown_on_one)
    texts = []
    for ref in job.begin("train", 3, 500, grown_on_one, 0.02):
        with pytest.raises((StateError, SaveError)) as caught:
            get(ref)
        texts.append(str(caught.value))
    assert all(re.search(r"\bw\b.* must be the same on every rank", text) for text in texts), texts
    assert job.steps() == [2]
    assert all(report.ok for report in ray_ckpt.verify(job.url))


def test_a_leaf_that_cannot_be_saved_is_named(make_job: Callable[..., Job]) -> None:
    def break_it(worker: Worker, step: int, leaf: Any) -> None:
        worker.ckpt.save(step, {**states.small(0, 1, step), "bad": {"leaf": leaf}})

    job = trained(make_job(save_steps=2), 1, 2)
    for step, leaf in enumerate([np.array([{}], object), object(), lambda: 0, 2**70], start=3):
        with pytest.raises(StateError, match="bad/leaf"):
            job.on(0, "do", break_it, step, leaf)
    job.all("train", 8, 8)
    job.all("call", "wait")
    assert job.steps() == [2, 8]


def test_a_directory_that_cannot_be_used(make_job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        make_job(tmp_path / "file").start(1)
    if os.geteuid():
        (tmp_path / "mine").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="mine"):
            make_job(tmp_path / "mine").start(1)


@pytest.mark.slow
def test_what_lies_there_already_is_left_alone(make_job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "model.ckpt-2.index").write_text("not an index")
    job = trained(make_job(save_steps=2, max_to_keep=1), 1, 2)
    job.all("train", 3, 6)
    job.all("call", "close")
    eventually(lambda: job.steps() == [6], "older ones are deleted")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_state_that_does_not_fit_into_memory(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(memory_dir=str(tmp_path)).start(1)
    with pytest.raises((StorageError, UsageError), match="free"):
        job.on(0, "do", too_large)


def too_large(worker: Worker) -> None:
    """Save an array that takes no memory here and 4 TiB in a snapshot."""
    array = np.broadcast_to(np.float32(0), (1 << 40,))
    worker.ckpt.save(1, {"w": array})
