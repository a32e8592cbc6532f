"""One Ray cluster of four hosts on this machine, shared by all tests of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from tenacity import Retrying, stop_after_attempt

from ray_ckpt.snapshot import default_folder

ROOT = Path(__file__).parents[1]
HOSTS = 4
_STORE_NBYTES = 80_000_000
RUNS: set[str] = set()
"""Ids of all runs that tests have made: what is left of them on tmpfs goes at the end."""


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Four raylets, whose files lie in this folder of a short path; this process is connected to them."""
    # Ray workers import what tests pass to them by its name.
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["RAY_TMPDIR"] = str(folder)
    for attempt in Retrying(stop=stop_after_attempt(3), reraise=True):
        with attempt:
            cluster = _start()
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    for run in RUNS:
        # The agents died with their hosts, before they could give the memory back.
        for left in default_folder(run).parent.glob(f"{run}*"):
            shutil.rmtree(left)


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
