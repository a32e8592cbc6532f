"""Small trainings with Keras, and what interrupts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import ray_ckpt
from tests.system.waiting import eventually

BATCHES = 4
"""Batches in an epoch of `fit`."""
EPOCHS = 3
_BATCH = 8


class Interrupt(keras.callbacks.Callback):
    """Ends `fit` by an exception after this batch of this epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self._at = epoch, batch
        self._epoch = -1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (self._epoch, batch) == self._at:
            raise KeyboardInterrupt


class Listener(keras.callbacks.Callback):
    """Which batches were heard of, as (epoch, batch), and how often the model was trained before each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []
        self.iterations: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self.iterations.append(int(self.model.optimizer.iterations))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches.append((self._epoch, batch))


class Scores(keras.callbacks.Callback):
    """Puts a metric of these values into the logs, one for each epoch; None: it is missing."""

    def __init__(self, values: Sequence[float | None], name: str = "val_loss") -> None:
        super().__init__()
        self._values, self._name = values, name

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._values[epoch] is not None:
            logs[self._name] = self._values[epoch]


def data() -> tuple[Any, Any]:
    """float32 [32, 3] and [32]: the same in every process."""
    x = np.random.default_rng(0).normal(size=(BATCHES * _BATCH, 3)).astype(np.float32)
    return x, x.sum(1)


def make_model(units: int = 4, **compiled: Any) -> Any:
    """A model with all that a resumed training must find again: optimizer slots, moving averages, random layers."""
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((3,)),
            layers.Dense(units, activation="relu"),
            layers.Dropout(0.3),
            layers.GaussianNoise(0.1),
            layers.BatchNormalization(),
            layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"], **compiled)
    return model


def make_frozen_model() -> Any:
    """A model whose weights stay the same whatever its data and its dropout are."""
    layers = keras.layers
    model = keras.Sequential([layers.Input((3,)), layers.Dense(4), layers.Dropout(0.3), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    return model


def fit(
    callbacks: Sequence[Any] = (),
    *,
    seed: int = 1,
    epochs: int = EPOCHS,
    model: Any = None,
    dataset: Callable[[], Any] | None = None,
    interrupt: tuple[int, int] | None = None,
    **settings: Any,
) -> Any:
    """The fitted model, as a start of the job with this seed makes it; ``dataset`` instead of the arrays."""
    keras.utils.set_random_seed(seed)
    model = make_model() if model is None else model
    x, y = data()
    fed = {"x": dataset(), "shuffle": False} if dataset else {"x": x, "y": y, "batch_size": _BATCH, "shuffle": False}
    stop = [] if interrupt is None else [Interrupt(*interrupt)]
    try:
        model.fit(epochs=epochs, verbose=0, callbacks=[*callbacks, *stop], **{**fed, **settings})
    except KeyboardInterrupt:
        assert interrupt is not None
    return model


def outcome(model: Any) -> tuple[list[bytes], dict[str, list[float]], list[int]]:
    """All that two trainings must have in common, bit for bit."""
    found = [variable.numpy().tobytes() for variable in (*model.variables, *model.optimizer.variables)]
    return found, model.history.history, model.history.epoch


def run_dir(path: Path) -> str:
    """A run's directory whose snapshot memory goes with the tests."""
    from ray_ckpt.coordinator import run_id
    from ray_ckpt.storage import open_store
    from tests.cluster import RUNS

    url = open_store(path).url
    RUNS.add(run_id(url))
    return str(path)


def steps(path: Path) -> list[int]:
    """The steps of the checkpoints in a directory."""
    return [info.step for info in ray_ckpt.checkpoints(path)]


def retention_leaves(path: Path, expected: list[int]) -> None:
    """Wait for it: it acts after the commit that `fit` waits for."""
    eventually(lambda: steps(path) == expected, f"{expected}, found {steps(path)}")
