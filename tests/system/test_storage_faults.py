"""A job on a bucket whose server has bad times: saves fail or wait as they should, training and older ones go on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import SaveError, StorageError
from ray_ckpt.testing.servers import gcs_server
from tests.cluster import RUNS
from tests.storage.faults import ALWAYS, Line, Strike, line_to, writes
from tests.system import states
from tests.system.job import Crew, Job, get
from tests.system.waiting import eventually

pytestmark = pytest.mark.xdist_group("ray")

_TIMEOUT_S = 40.0


@pytest.fixture(scope="module")
def module_line() -> Iterator[Line]:
    with gcs_server() as server, line_to(server) as line:
        yield line


@pytest.fixture
def line(module_line: Line) -> Iterator[Line]:
    yield module_line
    module_line.clear()


@dataclass
class BucketJob(Job):
    """A job on a directory of a bucket, which it reaches through the line."""

    bucket_url: str = ""

    @property
    def url(self) -> str:
        return self.bucket_url

    def steps(self) -> list[int]:
        return [c.step for c in ray_ckpt.checkpoints(self.url, storage_options=self.settings["storage_options"])]

    def sound(self) -> bool:
        """Whether every byte of every checkpoint is as it was saved."""
        reports = ray_ckpt.verify(self.url, storage_options=self.settings["storage_options"])
        return all(report.ok for report in reports)

    def warnings(self, rank: int) -> list[str]:
        """What a rank was warned about saves."""
        return [m for m in self.on(rank, "get", "messages") if "was not saved" in m]


@pytest.fixture
def bucket_job(crew: Crew, line: Line) -> Iterator[Callable[..., BucketJob]]:
    """``bucket_job(**settings)``: a job on this test's directory; every call is another start of it."""
    url = f"{line.url}/{uuid.uuid4().hex[:12]}"
    jobs: list[BucketJob] = []

    def make(timeout_s: float = _TIMEOUT_S, **settings: Any) -> BucketJob:
        job = BucketJob(crew, Path(), {"storage_options": line.options(timeout_s), **settings}, bucket_url=url)
        jobs.append(job)
        RUNS.add(run_id(url))
        return job

    yield make
    line.clear()
    for job in jobs:
        job.end()


def trained(job: BucketJob, world: int, last: int) -> BucketJob:
    """A run that has restored nothing and trained up to a step, which is saved."""
    job.start(world)
    job.all("restore")
    job.all("train", 1, last)
    job.all("call", "wait")
    assert job.steps() == [last]
    return job


def test_a_storm_and_a_lost_permission(bucket_job: Callable[..., BucketJob], line: Line) -> None:
    job = trained(bucket_job(save_steps=2, max_failures=5), 2, 2)
    storm = Strike("503", writes(r"model\.ckpt-4\."), times=4)
    line.meeting(storm)
    job.all("train", 3, 4)
    job.all("call", "wait")
    assert job.steps() == [2, 4]
    assert storm.struck == 4

    line.meeting(Strike("403", writes(r"model\.ckpt-6\.data"), times=ALWAYS))
    job.all("train", 5, 7)
    for rank in range(2):
        text = eventually(lambda rank=rank: job.warnings(rank), "a warning")[0]
        assert "step 6 was not saved: shard of writer" in text
        assert "model.ckpt-6.data-0000" in text
        assert f"in {job.url}: not permitted: give this user" in text
    for ref in job.begin("call", "wait"):
        with pytest.raises(SaveError, match="step 6 was not saved"):
            get(ref)
    assert job.steps() == [2, 4]

    line.clear()
    job.all("train", 8, 8)
    job.all("call", "wait")
    assert job.steps() == [2, 4, 8]
    assert job.sound()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reset", "drop", "429"])
def test_a_connection_that_breaks_at_every_object(bucket_job: Callable[..., BucketJob], line: Line, what: str) -> None:
    job = trained(bucket_job(save_steps=2), 2, 2)
    strike = Strike(what, writes(r"(model\.ckpt|_ray_ckpt)"), times=6)
    line.meeting(strike)
    for step in (3, 5):
        job.all("train", step, step + 1)
        job.all("call", "wait")
    assert strike.struck == 6
    assert job.steps() == [2, 4, 6]
    assert job.sound()


@pytest.mark.slow
def test_a_writer_that_is_held_up_gets_a_second_try(bucket_job: Callable[..., BucketJob], line: Line) -> None:
    """The first request for one shard never gets an answer; its storage would wait 60 s before it asks again."""
    job = trained(bucket_job(timeout_s=240.0, save_steps=2), 2, 2)
    held = Strike("hold", writes(r"model\.ckpt-4\.data-00001-of"), times=ALWAYS)
    line.meeting(held)
    job.all("train", 3, 4)
    job.until_committed(4, timeout_s=50.0)
    assert held.struck == 1
    found = ray_ckpt.checkpoints(job.url, storage_options=job.settings["storage_options"])[-1]
    names = [info.path.rpartition("/")[2] for info in line.beside.list(job.url.rpartition("/")[2])]
    shards = [name for name in names if name.startswith("model.ckpt-4.data")]
    assert found.num_shards == 7
    assert "model.ckpt-4.data-00001-of-00007" not in shards
    assert "model.ckpt-4.data-00003-of-00007" in shards
    line.clear()
    job.all("train", 5, 6)
    job.all("call", "wait")
    assert job.steps() == [2, 4, 6]
    assert job.sound()


@pytest.mark.slow
def test_a_restore_from_a_server_that_hangs_names_the_object(bucket_job: Callable[..., BucketJob], line: Line) -> None:
    job = trained(bucket_job(save_steps=2), 1, 2)
    job.all("call", "close")
    job.end()
    again = bucket_job(timeout_s=3.0).start(1)
    line.meeting(Strike("hold", lambda _, path: "data-0000" in path and "alt=media" in path, times=ALWAYS))
    told = rf"read 'model\.ckpt-2\.data-\d+-of-\d+' in {again.url}: still failing after \d+ tr"
    with pytest.raises(StorageError, match=told):
        get(again.begin("restore")[0])
    again.end()
    line.clear()
    again = bucket_job().start(1)
    assert again.all("restore") == [2]
    assert again.on(0, "get", "state") == states.plain(states.small(0, 1, 2))
