"""Names of a model's variables, and the batches that a resumed epoch skips: without Ray."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("keras")

from ray_ckpt.errors import UsageError
from ray_ckpt.frontends.keras import state
from ray_ckpt.frontends.keras.skip import Skip, skipping


def test_names_that_differ_by_keras_counters_only() -> None:
    own = ["model/sequential_3/dense_7/kernel", "optimizer/adam_3/sequential_3_dense_7_kernel_momentum"]
    stored = ["model/sequential/dense_1/kernel", "optimizer/adam/sequential_dense_1_kernel_momentum"]
    assert state.renamed(own, stored) == dict(zip(own, stored, strict=True))
    assert state.renamed(own, own) == {}
    assert state.renamed(own, stored[:1]) == {}
    assert state.renamed(own, [stored[0], "optimizer/sgd/iteration"]) == {}
    # Numbers within a name are the user's.
    assert state.renamed(["model/block2/kernel"], ["model/block3/kernel"]) == {}


def test_one_path_twice() -> None:
    twins = [SimpleNamespace(path="a/kernel"), SimpleNamespace(path="b"), SimpleNamespace(path="a/kernel")]
    model = SimpleNamespace(variables=twins, optimizer=None)
    assert list(state.variables(model)) == ["model/a/kernel", "model/b", "model/a/kernel.1"]


def test_random_states_survive_json() -> None:
    import json

    from ray_ckpt.frontends.keras.randomness import random_state, set_random_state

    np.random.seed(3)
    random.seed(4)
    random.gauss(0, 1)
    np.random.standard_normal()
    text = json.dumps(random_state())
    expected = random.gauss(0, 1), np.random.standard_normal(), np.random.rand(700).tolist(), random.random()
    set_random_state(json.loads(text))
    assert (random.gauss(0, 1), np.random.standard_normal(), np.random.rand(700).tolist(), random.random()) == expected


class Loop:
    """A model as a trainer's loop sees it; what was trained on is in ``trained``."""

    def __init__(self, steps_per_execution: int = 1) -> None:
        self.steps_per_execution = steps_per_execution
        self.history = object()
        self.trained: list[int] = []
        self.train_function: Any = self._train

    def _train(self, iterator: Iterator[int]) -> dict[str, float]:
        for _ in range(self.steps_per_execution):
            self.trained.append(next(iterator))
        return {"loss": 0.0}


def skip(model: Any, batches: int, ahead: int = 0) -> list[Any]:
    """Install a `Skip`; the list tells what it called."""
    calls: list[Any] = []
    last = lambda: calls.append("last")  # noqa: E731
    Skip(model, batches=batches, ahead=ahead, logs={"loss": 1.0}, first=calls.append, last=last)
    return calls


@pytest.mark.parametrize(("per_execution", "ahead"), [(1, 0), (2, 0), (1, 3)])
def test_skipped_batches_are_taken_and_not_trained_on(per_execution: int, ahead: int) -> None:
    model = Loop(per_execution)
    before = model.train_function
    calls = skip(model, 4, ahead)
    data = iter(range(100))
    for _ in range(4 // per_execution):
        assert model.train_function(data) == {"loss": 1.0}
        assert skipping(model)
    assert calls == [0, "last"]
    assert model.trained == []
    assert model.train_function(data) == {"loss": 0.0}
    assert model.train_function == before
    assert model.trained == list(range(ahead + 4, ahead + 4 + per_execution))


def test_the_state_of_jax_goes_through() -> None:
    model = Loop()
    skip(model, 1)
    assert model.train_function("weights", iter(range(3))) == ({"loss": 1.0}, "weights")


def test_data_that_ends() -> None:
    model = Loop()
    skip(model, 2)
    data = iter(range(1))
    model.train_function(data)
    with pytest.raises(StopIteration):
        model.train_function(data)
    model = Loop()
    skip(model, 2, ahead=4)
    with pytest.raises(UsageError, match="the data ended after 4 batches, expected more than 4"):
        model.train_function(iter(range(4)))
    model = Loop()
    skip(model, 0, ahead=4)
    with pytest.raises(UsageError, match="the data ended after 3 batches, expected more than 4"):
        model.train_function(iter(range(3)))


def test_nothing_but_batches_ahead() -> None:
    model = Loop()
    before = model.train_function
    calls: list[str] = []
    Skip(model, batches=0, ahead=3, logs={}, first=None, last=lambda: calls.append("last"))
    data = iter(range(100))
    # Callbacks hear of the batch that is trained on first.
    assert model.train_function(data) == {"loss": 0.0}
    assert not skipping(model)
    assert model.train_function == before
    assert (model.trained, calls) == ([3], ["last"])


def test_another_fit_is_not_skipped() -> None:
    model = Loop()
    skip(model, 2)
    model.history = object()
    model.train_function(iter(range(3)))
    assert model.trained == [0]
    assert not skipping(model)
