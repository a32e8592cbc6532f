"""Actors that nobody calls: they do what is left to do, and end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from ray_ckpt.agent import find_or_start_agent
from ray_ckpt.coordinator import find_or_start, run_id
from ray_ckpt.snapshot import default_folder
from tests.system.job import get
from tests.system.waiting import eventually

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in ("agent", "coordinator"):
        monkeypatch.setattr(sys.modules[f"ray_ckpt.{package}.find"], "LEASE_S", 2.0)
    return


def named(url: Path) -> list[str]:
    """The run's actors that Ray knows."""
    return sorted(a["name"].split(":")[0] for a in list_named_actors(True) if run_id(str(url)) in a["name"])


@pytest.mark.usefixtures("short_leases")
@pytest.mark.parametrize("called", [False, True])
def test_actors_that_nobody_calls_end(ray_cluster: Cluster, tmp_path: Path, called: bool) -> None:
    node = ray.get_runtime_context().get_node_id()
    coordinator = find_or_start(str(tmp_path), {})
    agent = find_or_start_agent(str(tmp_path), {}, node_id=node)
    pids = get([coordinator.pid.remote(), agent.pid.remote()])
    assert named(tmp_path) == ["agent", "coordinator"]
    if called:
        # Ray restarts them, and then nobody calls any more.
        get([coordinator.status.remote(), agent.prepare.remote(0, 4096, 1)])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: named(tmp_path) == [], "both have ended", timeout_s=100)
    assert not list(default_folder(f"{run_id(str(tmp_path))}-{node[:12]}").glob("*"))
