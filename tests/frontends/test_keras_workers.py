"""Two workers that train replicas of one model: one checkpoint of both, with what each has of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("keras")

import ray

import ray_ckpt
from ray_ckpt.frontends.keras import load_variables
from tests.frontends.keras_fits import make_frozen_model, retention_leaves, run_dir
from tests.system.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


@ray.remote(num_cpus=1, max_retries=0)
def work(path: str, rank: int, seed: int, interrupt: tuple[int, int] | None) -> Any:
    """One worker: the outcome of its training, and what it drew from Python's random numbers in each epoch."""
    import random

    import keras

    from tests.frontends.keras_fits import fit, outcome

    # Ray may give the ranks processes that have built unequally many models, whose layers Keras has counted.
    keras.utils.clear_session()
    drawn: list[float] = []

    class Draw(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            # Else both workers would draw the same.
            random.seed(100 * seed + rank)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            drawn.append(random.random())

    settings: Any = {"rank": rank, "world_size": 2, "delete_checkpoint": False}
    callbacks = [Draw(), ray_ckpt.BackupAndRestore(path, 2, **settings)]
    del settings["delete_checkpoint"]
    callbacks.append(ray_ckpt.ModelCheckpoint(f"{path}/models", "loss", max_to_keep=1, **settings))
    return outcome(fit(callbacks, seed=seed, interrupt=interrupt)), drawn


def start(path: Path, seed: int = 1, interrupt: tuple[int, int] | None = None) -> list[Any]:
    for name in ("", "models", "models/best"):
        run_dir(path / name)
    found: list[Any] = ray.get([work.remote(str(path), rank, seed, interrupt) for rank in (0, 1)], timeout=250)
    return found


@ray.remote(num_cpus=1, max_retries=0)
def work_on_own_data(path: str, rank: int, interrupt: tuple[int, int] | None) -> Any:
    """One worker with data and dropout of its own."""
    import keras

    from tests.frontends.keras_fits import data, fit, make_frozen_model, outcome

    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = make_frozen_model()
    if interrupt is not None:
        # The dropout's.
        model.layers[1].seed_generator.state.assign([rank, 7])

    def dataset() -> Any:
        import tensorflow as tf

        x, y = data()
        return tf.data.Dataset.from_tensor_slices((x + rank, y)).batch(8)

    settings: Any = {"rank": rank, "world_size": 2}
    saves = [
        ray_ckpt.BackupAndRestore(path, 1, delete_checkpoint=False, **settings),
        ray_ckpt.ModelCheckpoint(f"{path}/models", keep_best=False, **settings),
    ]
    fit(saves, model=model, dataset=dataset, interrupt=interrupt)
    return outcome(model)


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_that_see_other_data(tmp_path: Path) -> None:
    def start(path: Path, interrupt: tuple[int, int] | None) -> list[Any]:
        for name in ("", "models"):
            run_dir(path / name)
        jobs = [work_on_own_data.remote(str(path), rank, interrupt) for rank in (0, 1)]
        found: list[Any] = ray.get(jobs, timeout=250)
        return found

    # To the end, as no worker is asked to stop beyond it.
    whole = start(tmp_path / "whole", interrupt=(9, 0))
    assert whole[0] != whole[1]
    start(tmp_path / "run", interrupt=(1, 1))
    assert start(tmp_path / "run", interrupt=None) == whole
    # Of what each has, this takes the first one's.
    model = make_frozen_model()
    load_variables(model, str(tmp_path / "run" / "models"))
    assert [v.numpy().tobytes() for v in (*model.variables, *model.optimizer.variables)] == whole[0][0]


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_resume(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    assert whole[0][0] == whole[1][0]
    start(tmp_path / "run", interrupt=(1, 2))
    resumed = start(tmp_path / "run", seed=2)
    assert [outcome for outcome, _ in resumed] == [outcome for outcome, _ in whole]
    for (_, drawn), (_, expected) in zip(resumed, whole, strict=True):
        # The resumed epoch draws before it takes its state up, the last one after.
        assert drawn[-1] == expected[-1]
    models = tmp_path / "run" / "models"
    retention_leaves(models, [12])
    eventually(lambda: len(ray_ckpt.checkpoints(models / "best")) == 1, "one checkpoint is the best")
    for path in (models, models / "best"):
        assert [info.world_size for info in ray_ckpt.checkpoints(path)] == [2]
