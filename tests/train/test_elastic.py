"""Ray Train's own resizes, while a run goes on: hosts come, hosts go."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray.cluster_utils import Cluster
from ray.train import FailureConfig

import ray_ckpt
from tests.system.waiting import eventually
from tests.train import loops
from tests.train.fits import Run

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def test_more_and_then_fewer_workers_go_on_from_the_last_commit(ray_cluster: Cluster, run: Run) -> None:
    def committed_by(start: int) -> Callable[[], bool]:
        return lambda: any(info.generation == start for info in ray_ckpt.checkpoints(run.data))

    nodes = [ray_cluster.add_node(num_cpus=4, resources={"slot": 1}, object_store_memory=80_000_000)]
    with ThreadPoolExecutor(1) as pool:
        try:
            result = pool.submit(
                run.fit,
                loops.until_start,
                (1, 3),
                failures=FailureConfig(max_failures=3),
                scaling={"resources_per_worker": {"slot": 1}, "elastic_resize_monitor_interval_s": 1},
                last=3,
            )
            eventually(committed_by(1), "a commit of one worker", 100)
            nodes.append(ray_cluster.add_node(num_cpus=4, resources={"slot": 2}, object_store_memory=80_000_000))
            eventually(committed_by(2), "a commit of three workers", 100)
            ray_cluster.remove_node(nodes.pop(), allow_graceful=False)
            pointer = ray_ckpt.from_train(result.result(100).checkpoint)
        finally:
            for node in nodes:
                ray_cluster.remove_node(node)

    assert [[note["world"] for note in run.noted(start)] for start in (1, 2, 3)] == [[1], [3, 3, 3], [1]]
    for start in (2, 3):
        before = [info.step for info in ray_ckpt.checkpoints(run.data) if info.generation == start - 1]
        assert all(note["good"] for note in run.noted(start))
        assert {note["restored"] for note in run.noted(start)} == {before[-1]}
    assert (pointer.step, pointer.generation) == (run.noted(3)[0]["restored"] + 4, 3)
