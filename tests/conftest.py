"""What holds for every test: a quiet, CPU-only environment, reproducible seeds, a short folder for Ray."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any import below: these are read once, when the libraries load, and child processes inherit them.
os.environ.update(
    TF_CPP_MIN_LOG_LEVEL="3",
    CUDA_VISIBLE_DEVICES="-1",
    JAX_PLATFORMS="cpu",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_DEDUP_LOGS="0",
    RAY_USAGE_STATS_ENABLED="0",
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
)

import pytest
from hypothesis import settings

SEED_VARIABLE = "RAY_CKPT_TEST_SEED"
"""Environment variable that moves every `seed` fixture to another set of examples."""

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def base_seed() -> int:
    """The run's seed: 0 unless the environment names another."""
    return int(os.environ.get(SEED_VARIABLE, "0"))


def seed_of(nodeid: str) -> int:
    """A test's own seed: the same on every machine, in any order and in any xdist worker."""
    return zlib.crc32(f"{base_seed()}:{nodeid}".encode())


def pytest_report_header() -> str:
    """Name the seed of the run on top of its report."""
    return f"seed: {SEED_VARIABLE}={base_seed()}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Attach to every failure the seeds that reproduce it."""
    report = yield
    if report.failed:
        text = f"{SEED_VARIABLE}={base_seed()} (seed fixture: {seed_of(item.nodeid)})"
        hypothesis_seed = getattr(item, "_hypothesis_seed", None)
        if hypothesis_seed is None:
            hypothesis_seed = getattr(getattr(item, "obj", None), "_hypothesis_internal_use_generated_seed", None)
        if hypothesis_seed is not None:
            text += f"\n--hypothesis-seed={hypothesis_seed}"
        report.sections.append(("seeds", text))
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed; the module-level generator of `random` starts from it too."""
    value = seed_of(request.node.nodeid)
    random.seed(value)
    return value


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder with a short path: Ray's socket names must fit in 107 bytes, too few for tmp_path's."""
    folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(short_tmp: Path) -> Iterator[Any]:
    """Four raylets; this process is connected to them. Tests that use them share the xdist group "ray"."""
    # Here, since most tests need no Ray.
    from tests.cluster import running

    with running(short_tmp) as cluster:
        yield cluster
