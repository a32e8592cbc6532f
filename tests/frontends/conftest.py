"""What the tests of hooks share: a run's directory, a TensorFlow that remembers nothing of other tests, the hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ray_ckpt
from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A run's directory, not made yet; what it leaves in memory is cleared at the end of all tests."""
    path = str(tmp_path / "run")
    RUNS.add(run_id(path))
    return path


@pytest.fixture
def fresh_tf() -> Iterator[None]:
    """A new default graph, and event files that are closed in the end."""
    import tensorflow as tf

    with tf.Graph().as_default():
        yield
    tf.compat.v1.summary.FileWriterCache.clear()


@pytest.fixture
def fake_job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of `Checkpointer`: the class `FakeJob`."""
    from ray_ckpt.frontends.tensorflow import session_saves
    from tests.frontends.fake_job import FakeJob

    class Job(FakeJob):
        """Of this test alone."""

        jobs: list[FakeJob] = []  # noqa: RUF012 (each test has its own class)

    monkeypatch.setattr(session_saves, "Checkpointer", Job)
    return Job


def tensorflows_hook(*args: Any, steps_per_run: int = 1, **kwargs: Any) -> Any:
    """TensorFlow's own, which is told of the steps a run by a setter."""
    import tensorflow as tf

    hook = tf.compat.v1.train.CheckpointSaverHook(*args, **kwargs)
    hook._set_steps_per_run(steps_per_run)
    return hook


MAKERS: dict[str, Callable[..., Any]] = {
    "tensorflow": tensorflows_hook,
    "ours": ray_ckpt.CheckpointSaverHook,
    "async": ray_ckpt.AsyncCheckpointSaverHook,
}


@pytest.fixture(params=["tensorflow", "ours"])
def make_hook(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The class of a hook: a test that uses it holds for TensorFlow's hook and for ours."""
    if request.param != "tensorflow" and "ray_cluster" not in request.fixturenames:
        request.getfixturevalue("fake_job")
    return MAKERS[request.param]


@pytest.fixture(params=["tensorflow", "ours", "async"])
def make_any_hook(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """As `make_hook`, and the asynchronous one."""
    if request.param != "tensorflow" and "ray_cluster" not in request.fixturenames:
        request.getfixturevalue("fake_job")
    return MAKERS[request.param]
