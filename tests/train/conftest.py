"""A run of Ray Train on the test cluster; its controller looks at the workers more often than every two seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.train.fits import Run


@pytest.fixture
def run(ray_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """An experiment whose storage is this test's folder."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    return Run(tmp_path)
