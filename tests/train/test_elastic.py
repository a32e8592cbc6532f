"""Ray Train's own resizes, while a run goes on: hosts come, hosts go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, Result

import ray_ckpt
from tests.train import loops
from tests.train.background import fitting, while_fitting
from tests.train.fits import Run
from tests.train.hosts import added

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(900)]


def test_more_and_then_fewer_workers_go_on_from_the_last_commit(ray_cluster: Cluster, run: Run) -> None:
    def committed_by(start: int) -> Callable[[], bool]:
        return lambda: any(info.generation == start for info in ray_ckpt.checkpoints(run.data))

    def fit() -> Result:
        return run.fit(
            loops.until_start,
            (1, 3),
            failures=FailureConfig(max_failures=3),
            scaling={"resources_per_worker": {"slot": 1}, "elastic_resize_monitor_interval_s": 1},
            last=3,
        )

    with added(ray_cluster, {"slot": 1}), fitting(fit) as future:
        while_fitting(future, committed_by(1), "a commit of one worker")
        with added(ray_cluster, {"slot": 2}, allow_graceful=False):
            while_fitting(future, committed_by(2), "a commit of three workers")
        pointer = ray_ckpt.from_train(future.result(120).checkpoint)

    assert [[note["world"] for note in run.noted(start)] for start in (1, 2, 3)] == [[1], [3, 3, 3], [1]]
    for start in (2, 3):
        before = [info.step for info in ray_ckpt.checkpoints(run.data) if info.generation == start - 1]
        assert all(note["good"] for note in run.noted(start))
        assert {note["restored"] for note in run.noted(start)} == {before[-1]}
    assert (pointer.step, pointer.generation) == (run.noted(3)[0]["restored"] + 4, 3)
