"""A function as the target: what it would make, without making it. JAX's side is in `test_jax`."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from ray_ckpt.errors import StateError
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import Store, open_store
from ray_ckpt.target.abstract import is_function

from ..restore.make import make_checkpoint
from .saving import restore, same, save

STATE = {"w": np.arange(6, dtype=np.int16).reshape(2, 3), "step": 3, "more": [1.5, ("x", b"y", None), True]}


def never(*_: Any) -> NoReturn:
    raise AssertionError("the function was called")


class Maker:
    def make(self) -> NoReturn:
        never()


@pytest.mark.parametrize("make", [never, Maker().make, functools.partial(never, 1), Maker, functools.lru_cache(never)])
def test_it_is_not_called(make: Any) -> None:
    stored = save([STATE, STATE])
    for rank, world_size in ((0, 2), (2, 3)):
        same(restore(stored, make, rank, world_size), dict(sorted(STATE.items())))


def test_containers_and_leaves_are_no_functions() -> None:
    class Callable(dict):  # type: ignore[type-arg]
        def __call__(self) -> None: ...

    assert not any(map(is_function, (Callable(), 1, "x", np.zeros(2), None, [never])))


@pytest.fixture
def foreign() -> Store:
    store = open_store("memory://plain-tensorflow")
    graph = np.array(b"graph", object)
    counter = np.array(1)
    make_checkpoint(
        store,
        "ckpt-1",
        {
            "w/.ATTRIBUTES/VARIABLE_VALUE": np.arange(3.0),
            "_CHECKPOINTABLE_OBJECT_GRAPH": graph,
            "save_counter/.ATTRIBUTES/VARIABLE_VALUE": counter,
        },
    )
    return store


def test_checkpoints_of_plain_tensorflow(foreign: Store) -> None:
    stored = open_checkpoint(foreign, "ckpt-1")
    got = restore(stored, {"w": np.zeros(3)}, rename=lambda name: f"{name}/.ATTRIBUTES/VARIABLE_VALUE")
    assert got["w"].tolist() == [0, 1, 2]
    for like in (never, None):
        with pytest.raises(StateError, match=r"was not written by ray_ckpt and holds no structure.*: pass a state"):
            restore(stored, like)


CHILD = """
import sys
from collections import namedtuple
import numpy as np
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import PerWorker, Slice
from tests.target.saving import restore, save
Pair = namedtuple("Pair", "a b")
whole = Slice(np.zeros(2), (2,), (0,))
for state, world_size in (({"p": Pair(1, 2)}, 1), ({"s": whole}, 1), ({"n": PerWorker(1)}, 2)):
    try:
        restore(save([state]), lambda: state, 0, world_size)
    except StateError as error:
        print(error)
got = restore(save([{"n": PerWorker(7, "first")}]), lambda: 1 / 0, 1, 2)["n"]
assert (got.value, got.on_resize) == (7, "first")
assert "jax" not in sys.modules
"""


def test_without_jax_it_needs_a_state() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, why in zip(
        lines,
        (
            "holds containers that it cannot make (namedtuple __main__.Pair)",
            "holds s, which was a Slice",
            "holds n, a value of each of 1 workers, not 2",
        ),
        strict=True,
    ):
        assert f"{why}, and a function is not called where there is a checkpoint: pass a state, or an abstract" in line
