"""What is taken from Ray Train's context, and the errors where it says too little. No cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
import ray.train
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor

import ray_ckpt
from ray_ckpt.errors import PreemptedError, UsageError
from ray_ckpt.train import Place, Reporter, hand_over, home, identity


class Context:
    """A context of V2 that knows what it was made with."""

    def __init__(self, rank: Any = 1, world: Any = 2, storage: Any = None) -> None:
        self._known = (rank, world, storage)

    def _tell(self, index: int) -> Any:
        found = self._known[index]
        if isinstance(found, Exception):
            raise found
        return found

    def get_world_rank(self) -> Any:
        return self._tell(0)

    def get_world_size(self) -> Any:
        return self._tell(1)

    def get_storage(self) -> Any:
        return self._tell(2)


Context.__module__ = "ray.train.v2.api.context"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``use(context)``: what `ray.train.get_context` returns or raises."""

    def use(found: Any) -> None:
        def get_context() -> Any:
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(ray.train, "get_context", get_context)

    return use


def storage(filesystem: Any = None, path: str = "/runs/exp") -> Any:
    """Ray Train's storage of an experiment."""
    return SimpleNamespace(storage_filesystem=filesystem or pyarrow.fs.LocalFileSystem(), experiment_fs_path=path)


def test_a_worker_knows_its_rank_and_its_run(use: Any) -> None:
    use(Context(1, 2, storage()))
    assert identity() == (1, 2)
    assert home() == Place("file:///runs/exp/ray_ckpt")


@pytest.mark.parametrize("outside", [RuntimeError("outside"), DeprecationWarning("a function of Ray Tune")])
def test_a_driver_is_no_worker(use: Any, outside: Exception) -> None:
    use(outside)
    assert identity() is None
    hand_over("gs://bucket/run", 3, "a host is drained")
    with pytest.raises(UsageError, match=r"not in a training function.*give Checkpointer the run's directory or URL"):
        ray_ckpt.Checkpointer()
    with pytest.raises(UsageError, match=r"outside of Ray Train there is nobody to report to"):
        Reporter().report({}, None, None)


def test_the_real_one_outside_of_any_fit_is_no_worker() -> None:
    assert identity() is None


def test_a_context_of_v1_outside_of_a_session_is_not_taken_for_rank_0_of_1(use: Any) -> None:
    from ray.train.context import TrainContext

    use(TrainContext())
    assert identity() is None


def test_v1_in_a_session_gives_ranks_but_no_run(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.train._internal.session.get_session", object)
    monkeypatch.setattr(Context, "__module__", "ray.train.context")
    use(Context(1, 2, storage()))
    assert identity() == (1, 2)
    with pytest.raises(UsageError, match=r"needs Ray Train V2.*set RAY_TRAIN_V2_ENABLED=1"):
        home()
    with pytest.raises(UsageError, match=r"ckpt\.report\(\) needs Ray Train V2"):
        Reporter().report({}, None, None)


def test_an_incomplete_context_is_told(use: Any) -> None:
    use(Context(RuntimeError("TrainContext has not been initialized.")))
    with pytest.raises(UsageError, match=r"does not know its rank.*give rank= and world_size="):
        identity()
    use(Context(0, 1, NotImplementedError("Local storage context not yet implemented.")))
    with pytest.raises(UsageError, match=r"with num_workers=0 it has no storage\): give Checkpointer"):
        home()
    use(Context(1, 2, SimpleNamespace(storage_filesystem=SimpleNamespace(), experiment_fs_path="b/exp")))
    with pytest.raises(
        UsageError, match=r"rank 1: storage on a SimpleNamespace at 'b/exp/ray_ckpt'.*; give Checkpointer"
    ):
        home()


@pytest.mark.parametrize("metrics", [None, 3, [("loss", 1)]])
def test_metrics_that_are_none_are_told(use: Any, metrics: Any) -> None:
    use(Context())
    with pytest.raises(UsageError, match="takes a dict of metrics by name"):
        Reporter().report(metrics, None, None)


def test_what_a_preempted_worker_raises_is_ours_here_and_rays_where_the_run_is_controlled(use: Any) -> None:
    use(Context())
    with pytest.raises(PreemptedError, match=r"gs://bucket/run: a host is drained; .* goes on from step 3") as raised:
        hand_over("gs://bucket/run", 3, "a host is drained")
    assert _is_preempted_actor(raised.value)
    sent = ray.cloudpickle.loads(ray.cloudpickle.dumps(raised.value))
    assert type(sent) is RayActorError, "this package need not be installed there"
    assert _is_preempted_actor(sent)
    assert str(sent).startswith("PreemptedError: gs://bucket/run: a host is drained")
    with pytest.raises(PreemptedError, match="nothing was committed"):
        hand_over("gs://bucket/run", None, "a host is drained")
