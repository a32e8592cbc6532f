"""Where Ray Train stores: a bucket, a place that cannot be written, workers that do not agree."""

from __future__ import annotations

from typing import Any

import fsspec
import numpy as np
import pytest
import ray.train
from pyarrow.fs import FSSpecHandler, GcsFileSystem, PyFileSystem

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.testing.servers import Server, gcs_server
from tests.cluster import RUNS
from tests.system.states import whole
from tests.train import loops
from tests.train.fits import Run

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def native(server: Server) -> Any:
    """The file system of pyarrow itself."""
    return GcsFileSystem(anonymous=True, endpoint_override=server.endpoint.removeprefix("http://"), scheme="http")


def wrapped(server: Server) -> Any:
    """That of gcsfs."""
    inner = fsspec.filesystem("gcs", **server.storage_options, use_listings_cache=False, skip_instance_cache=True)
    return PyFileSystem(FSSpecHandler(inner))


@pytest.mark.parametrize("filesystem", [native, wrapped])
def test_a_run_in_a_bucket_needs_no_more_than_ray_has(run: Run, filesystem: Any) -> None:
    with gcs_server() as server:
        # A name of its own: the coordinator of a run is found by its URL, and outlives the run and its server a while.
        bucket = f"bucket-{filesystem.__name__}"
        url = f"{server.make_bucket(bucket)}/runs/exp/ray_ckpt"
        RUNS.add(run_id(url))
        where = {"storage_path": f"{bucket}/runs", "storage_filesystem": filesystem(server)}
        for steps in (3, 5):
            result = run.fit(loops.train, steps=steps, settings={"save_steps": 2}, report_at=[steps], run_config=where)
        assert [note["restored"] for note in run.noted(2)] == [3, 3]
        pointer = ray_ckpt.from_train(result.checkpoint)
        assert (pointer.url, pointer.step) == (url, 5)
        np.testing.assert_array_equal(pointer.load()["table"], whole(5)["table"])


def test_a_place_that_cannot_be_written_is_named(run: Run) -> None:
    run.data.parent.mkdir()
    run.data.touch()
    with pytest.raises(ray.train.TrainingFailedError, match=f"StorageError: .*{run.data}.* is a file, not a directory"):
        run.fit(loops.train, steps=1)


def test_workers_that_do_not_agree_are_told(run: Run) -> None:
    with pytest.raises(ray.train.TrainingFailedError, match="rank 1 was started with save_steps=2 against 1 elsewhere"):
        run.fit(loops.disagreeing, steps=1)


def test_without_workers_of_its_own_ray_names_no_place(run: Run) -> None:
    with pytest.raises(ray_ckpt.errors.UsageError, match=r"num_workers=0 it has no storage.*give Checkpointer"):
        run.fit(loops.train, 0, steps=1)


def test_without_workers_of_its_own_a_given_place_is_reported(run: Run) -> None:
    result = run.fit(
        loops.train, 0, steps=2, url=[str(run.data)], settings={"save_steps": 1}, report_at=[1], wait_at=[1]
    )
    assert ray_ckpt.from_train(result.checkpoint).step == 2
