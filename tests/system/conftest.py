"""Workers on the hosts of the test cluster, and jobs of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS
from tests.system.job import Crew, Job


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
