"""JAX on simulated TPU v4 slices: Ray's own scheduling by topology, our agents and writers beside it, a lost slice."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_ckpt
from ray_ckpt.coordinator import find_or_start, run_id
from ray_ckpt.timeline import timelines
from tests.cluster import ROOT, RUNS
from tests.pods.pod_loop import SAVE_STEPS, noted, train
from tests.pods.slices import HOSTS, actors_of, labels, tpu_slice
from tests.system.draining import NOTICE_S
from tests.train.background import fitting, while_fitting

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]

pytest.importorskip("jax")


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    (tmp_path / "notes").mkdir()
    RUNS.add(run_id(str(tmp_path / "exp" / "ray_ckpt")))
    return tmp_path / "notes"


def fit(notes: Path, workers: int, *, failures: int = 0, endless: bool = False) -> Result:
    """A run on as many hosts of v4-16 slices."""
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return JaxTrainer(
        train,
        train_loop_config={"notes": str(notes), "last": SAVE_STEPS + 3, "endless": endless},
        jax_config=JaxConfig(use_tpu=True),
        scaling_config=ScalingConfig(num_workers=workers, use_tpu=True, topology="2x2x2", accelerator_type="TPU-V4"),
        run_config=RunConfig(
            name="exp",
            storage_path=str(notes.parent),
            failure_config=FailureConfig(max_failures=failures),
            worker_runtime_env={"env_vars": environment},
        ),
    ).fit()


def test_one_slice(ray_cluster: Cluster, notes: Path) -> None:
    """The job lies on the slice, and so do its agents and writers, without a chip of it."""
    with tpu_slice(ray_cluster, "slice-a") as found:
        seen = labels()
        assert [seen[node]["ray.io/tpu-worker-id"] for node in found.nodes] == ["0", "1"]
        assert {seen[node]["ray.io/tpu-slice-name"] for node in found.nodes} == {"slice-a"}
        result = fit(notes, HOSTS)
        began, saved = noted(notes, "began", 1), noted(notes, "saved", 1)
        assert {rank["node"] for rank in began} == set(found.nodes)
        assert [rank["chips"] for rank in began] == [[2, 4]] * HOSTS
        assert all(rank["good"] and rank["megascale"] == {} for rank in began)
        for rank in saved:
            assert rank["free"].get("TPU", 0) == 0, "the workers have all chips, so nothing of ours has one"
            assert rank["actors"]["Agent"] == sorted(found.nodes)
        url = str(notes.parent / "exp" / "ray_ckpt")
        assert [c.step for c in ray_ckpt.checkpoints(url)] == [SAVE_STEPS, SAVE_STEPS + 3]
        for timeline in timelines(url):
            written = {shard.rank: shard.nbytes for shard in timeline.shards}
            # Each host its half of the kernel, 64 x 64 floats, and one of them the replicated bias.
            assert sorted(written.values()) == [4 * 64 * 64 // 2, 4 * 64 * 64 // 2 + 4 * 64]
        assert ray_ckpt.from_train(result.checkpoint).step == SAVE_STEPS + 3


def test_the_coordinator_is_on_the_head(ray_cluster: Cluster, tmp_path: Path) -> None:
    """Whoever starts it: with a slice it would be lost."""
    url = str(tmp_path)
    RUNS.add(run_id(url))
    with tpu_slice(ray_cluster, "slice-a") as found:
        on_the_slice = NodeAffinitySchedulingStrategy(found.nodes[1], soft=False)
        ray.get(ray.remote(start_coordinator).options(scheduling_strategy=on_the_slice).remote(url))
        assert actors_of(run_id(url)) == {"Coordinator": [ray_cluster.head_node.node_id]}


def start_coordinator(url: str) -> None:
    """And wait until it is up."""
    ray.get(find_or_start(url, {}).status.remote())


@pytest.mark.slow
def test_the_example_on_a_slice(ray_cluster: Cluster, notes: Path) -> None:
    """The pod's config with another slice, model and pace: nothing but the config says that there are chips."""
    from examples.config import read
    from examples.jax_tpu_pod import Config, Hosts, Network, trainer

    pod = read(ROOT / "examples" / "configs" / "jax_v6e_16.yaml", Config)
    small = replace(
        pod,
        name="exp",
        storage=str(notes.parent),
        hosts=Hosts(HOSTS, "2x2x2", "TPU-V4"),
        # Each process of the tests has eight devices.
        model=Network(sequences=32),
        steps=6,
        save_steps=3,
        report_steps=3,
    )
    with tpu_slice(ray_cluster, "slice-a"):
        result = trainer(small).fit()
    assert result.metrics is not None
    assert result.metrics["step"] == 6
    pointer = ray_ckpt.from_train(result.checkpoint)
    assert (pointer.step, pointer.url) == (6, f"file://{notes.parent}/exp/ray_ckpt")
    assert pointer.load()["params/head/kernel"].shape == (96, 108)


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
def test_a_lost_slice_is_replaced_by_a_spare_one(ray_cluster: Cluster, notes: Path, slices: int) -> None:
    with contextlib.ExitStack() as stack:
        there = [stack.enter_context(tpu_slice(ray_cluster, f"slice-{i}")) for i in range(slices + 1)]
        with fitting(lambda: fit(notes, slices * HOSTS, failures=3, endless=True)) as future:
            while_fitting(future, lambda: len(noted(notes, "saved", 1)) == slices * HOSTS, "all have saved", 150)
            lost = noted(notes, "began", 1)[-1]["node"]
            next(found for found in there if lost in found.nodes).kill()
            result = future.result(300)
        began, resumed = (noted(notes, "began", start) for start in (1, 2))
        for rank in noted(notes, "saved", 1):
            assert rank["actors"]["Agent"] == sorted(r["node"] for r in began)
        assert {rank["node"] for rank in resumed} == {node for found in there for node in found.nodes}
        for ranks in (began, resumed):
            check_slices(ranks, slices)
        check_resumed(notes, result, resumed)


@pytest.mark.slow
def test_a_drained_slice_costs_no_step_and_no_failure(ray_cluster: Cluster, notes: Path) -> None:
    with tpu_slice(ray_cluster, "slice-0") as a, tpu_slice(ray_cluster, "slice-1") as b:
        with fitting(lambda: fit(notes, HOSTS, failures=0, endless=True)) as future:
            while_fitting(future, lambda: len(noted(notes, "saved", 1)) == HOSTS, "all have saved", 150)
            going = a if noted(notes, "began", 1)[0]["node"] in a.nodes else b
            going.drain(NOTICE_S)
            result = future.result(300)
        began, resumed, stopped = noted(notes, "began", 1), noted(notes, "began", 2), noted(notes, "stopped", 1)
        hosts = {rank["node"] for rank in resumed}
        assert hosts in ({*a.nodes}, {*b.nodes})
        assert hosts.isdisjoint(rank["node"] for rank in began)
        assert {rank["restored"] for rank in resumed} == {rank["step"] for rank in stopped}
        assert len(stopped) == HOSTS
        check_resumed(notes, result, resumed)


def check_slices(ranks: list[dict[str, Any]], slices: int) -> None:
    """All hosts are one JAX of two devices each, and know of their slices where there are several."""
    assert [rank["chips"] for rank in ranks] == [[2, 2 * HOSTS * slices]] * HOSTS * slices
    numbers = [rank["megascale"].get("MEGASCALE_SLICE_ID") for rank in ranks]
    assert sorted(numbers) == ["0", "0", "1", "1"] if slices > 1 else numbers == [None] * HOSTS
    assert {rank["megascale"].get("MEGASCALE_NUM_SLICES") for rank in ranks} == {"2" if slices > 1 else None}


def check_resumed(notes: Path, result: Result, resumed: list[dict[str, Any]]) -> None:
    """All ranks went on at one commit of the first start, and with its values; the run then ended well."""
    assert result.error is None
    steps = {rank["restored"] for rank in resumed}
    assert len(steps) == 1
    step = steps.pop()
    assert step >= SAVE_STEPS
    assert all(rank["good"] for rank in resumed)
    url = str(notes.parent / "exp" / "ray_ckpt")
    committed = [c for c in ray_ckpt.checkpoints(url) if c.generation == 1]
    assert committed[-1].step == step, "it went on at an older one"
    assert ray_ckpt.from_train(result.checkpoint).step == step + SAVE_STEPS + 3
