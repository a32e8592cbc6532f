"""A host of a fit is drained: one save of all, and Ray Train goes on elsewhere, at the next step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

import ray_ckpt
from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS
from tests.system.draining import NOTICE_S, drain
from tests.system.states import mixed, zeros_like
from tests.system.waiting import pause
from tests.train.background import fitting, while_fitting
from tests.train.hosts import added

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(900)]

AFTER = 5
"""Steps of the start after the drain."""


def loop(config: dict[str, Any]) -> None:
    """What a user would write: train until told to stop; the start after that makes a few steps."""
    with ray_ckpt.Checkpointer() as ckpt:
        rank, world = ckpt.rank, ckpt.world_size
        ckpt.restore(zeros_like(mixed(rank, world, 0)))
        first = (ckpt.restored_step or 0) + 1
        start = {"node": ray.get_runtime_context().get_node_id(), "first": first}
        Path(config["notes"], f"{ckpt.generation}-{rank}.json").write_text(json.dumps(start))
        last = first + AFTER - 1 if ckpt.restored_step else 100_000
        for step in range(first, last + 1):
            ckpt.step(step, mixed(rank, world, step))
            if ckpt.should_stop:
                break
            pause(0.02)


@pytest.fixture
def seats(ray_cluster: Cluster) -> Iterator[None]:
    """Three more hosts with room for one worker each."""
    with added(ray_cluster, *[{"seat": 1}] * 3):
        yield


def noted(folder: Path, start: int) -> list[dict[str, Any]]:
    """What the two ranks of a start left; empty until both have."""
    paths = sorted(folder.glob(f"{start}-*.json"))
    texts = [path.read_text() for path in paths]
    return [json.loads(text) for text in texts] if len(texts) == 2 and all(texts) else []


def test_a_drained_host_costs_no_step_and_no_failure(seats: None, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    data = tmp_path / "exp" / "ray_ckpt"
    RUNS.add(run_id(str(data)))
    trainer = DataParallelTrainer(
        loop,
        train_loop_config={"notes": str(notes)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1, "seat": 1}),
        run_config=RunConfig(name="exp", storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=0)),
    )
    with fitting(trainer.fit) as future:
        first = while_fitting(future, lambda: noted(notes, 1), "both ranks have begun")
        drain(first[1]["node"], NOTICE_S)
        second = while_fitting(future, lambda: noted(notes, 2), "both ranks have begun again")
        assert future.result(120).error is None
    assert first[1]["node"] not in [start["node"] for start in second]
    steps = [c.step for c in ray_ckpt.checkpoints(data)]
    assert [start["first"] for start in second] == [steps[0] + 1] * 2
    assert steps == [steps[0], steps[0] + AFTER]
