"""One Ray cluster of four hosts on this machine, shared by all tests of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from tenacity import Retrying, stop_after_attempt

from ray_ckpt.coordinator import run_id
from ray_ckpt.snapshot import default_folder
from tests.system.job import Crew, Job

ROOT = Path(__file__).parents[2]
HOSTS = 4
_STORE_NBYTES = 80_000_000
RUNS: set[str] = set()
"""Ids of all runs that tests have made."""


@pytest.fixture(scope="session")
def ray_cluster(short_tmp: Path) -> Iterator[Cluster]:
    """Four raylets; this process is connected to them."""
    # Ray workers import what tests pass to them by its name.
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["RAY_TMPDIR"] = str(short_tmp)
    for attempt in Retrying(stop=stop_after_attempt(3), reraise=True):
        with attempt:
            cluster = _start()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    for run in RUNS:
        # The agents died with their hosts, before they could give the memory back.
        for folder in default_folder(run).parent.glob(f"{run}*"):
            shutil.rmtree(folder)


def _start() -> Cluster:
    settings: dict[str, Any] = {"num_cpus": 4, "object_store_memory": _STORE_NBYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    try:
        for _ in range(HOSTS - 1):
            cluster.add_node(num_cpus=4, object_store_memory=_STORE_NBYTES)
        ray.init(address=cluster.address, log_to_driver=False)
    except BaseException:
        ray.shutdown()
        cluster.shutdown()
        raise
    return cluster


@pytest.fixture(scope="session")
def crew(ray_cluster: Cluster) -> Crew:
    """Workers for all tests; the first host is the head."""
    nodes = [n for n in ray.nodes() if n["Alive"]]
    nodes.sort(key=lambda n: "node:__internal_head__" not in n["Resources"])
    return Crew([n["NodeID"] for n in nodes])


@pytest.fixture
def make_job(crew: Crew, tmp_path: Path) -> Iterator[Any]:
    """``make_job(**settings)``: a job on this test's directory; every call is another start of it."""
    jobs: list[Job] = []

    def make(path: Path | None = None, **settings: Any) -> Job:
        jobs.append(Job(crew, path or tmp_path / "run", settings))
        RUNS.add(run_id(jobs[-1].url))
        return jobs[-1]

    yield make
    for job in jobs:
        job.end()
