"""The layout of a state that was seen before: the same object where nothing changed, the right one where it did."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ray_ckpt import PerWorker, Slice
from ray_ckpt.errors import StateError
from ray_ckpt.leaves.layout import Layouts, layout_of


class Pair(NamedTuple):
    a: Any
    b: Any


class OtherPair(NamedTuple):
    a: Any
    b: Any


@dataclass
class Record:
    x: Any


def make() -> dict[Any, Any]:
    return {
        "plain": {f"w{i}": np.zeros((2, 3), np.float32) for i in range(5)},
        "list": [np.zeros(2), (1, 2.5)],
        "pair": Pair(np.zeros(2), {"deep": np.zeros(1)}),
        "record": Record(np.zeros(3)),
        "ordered": OrderedDict(a=1),
        "none": None,
        "rng": PerWorker(np.zeros(4)),
        "marked": PerWorker({"k": np.zeros(4)}),
        "slice": Slice(np.zeros((2, 2)), (4, 2), (0, 0)),
        "text": np.array(["a", "b"], object),
        "jax": jnp.zeros((2, 2)),
        1: 5,
    }


def changed(path: str, value: Any) -> Callable[[dict[Any, Any]], None]:
    def change(state: dict[Any, Any]) -> None:
        state[path] = value

    return change


def swap_keys(state: dict[Any, Any]) -> None:
    state["plain"] = dict(reversed(state["plain"].items()))


CHANGES = {
    "dtype": lambda s: s["plain"].update(w3=np.zeros((2, 3), np.float16)),
    "byte order": lambda s: s["plain"].update(w3=np.zeros((2, 3), ">f4")),
    "shape": lambda s: s["plain"].update(w3=np.zeros((3, 2), np.float32)),
    "new leaf": lambda s: s["plain"].update(w9=np.zeros((2, 3), np.float32)),
    "lost leaf": lambda s: s["plain"].pop("w3"),
    "order of keys": swap_keys,
    "leaf to container": lambda s: s["plain"].update(w3={"in": np.zeros((2, 3), np.float32)}),
    "container to leaf": changed("pair", np.zeros(2)),
    "longer list": lambda s: s["list"].append(np.zeros(2)),
    "list to tuple": changed("list", (np.zeros(2), (1, 2.5))),
    "other namedtuple": changed("pair", OtherPair(np.zeros(2), {"deep": np.zeros(1)})),
    "other dict": changed("ordered", {"a": 1}),
    "deep": lambda s: s["pair"].b.update(more=np.zeros(1)),
    "field": changed("record", Record(np.zeros(4))),
    "none to leaf": changed("none", np.zeros(1)),
    "python type": changed(1, 5.0),
    "rule of a marker": changed("rng", PerWorker(np.zeros(4), "first")),
    "marked leaf": changed("rng", PerWorker(np.zeros(5))),
    "marked leaf to container": changed("rng", PerWorker({"k": np.zeros(4)})),
    "marked container to leaf": changed("marked", PerWorker(np.zeros(4))),
    "other container in a marker": changed("marked", PerWorker([np.zeros(4)])),
    "inside a marker": changed("marked", PerWorker({"j": np.zeros(4)})),
    "offset": changed("slice", Slice(np.zeros((2, 2)), (4, 2), (2, 0))),
    "global shape": changed("slice", Slice(np.zeros((2, 2)), (6, 2), (0, 0))),
    "text to bytes": changed("text", np.array([b"a", b"b"], object)),
    "jax dtype": changed("jax", jnp.zeros((2, 2), jnp.bfloat16)),
    "jax to numpy": changed("jax", np.zeros((2, 2), np.float32)),
}


def values_only(state: dict[Any, Any]) -> None:
    state["plain"]["w3"] = np.ones((2, 3), np.float32)
    state["list"][1] = (7, 0.5)
    state["jax"] = jnp.ones((2, 2))
    state["rng"] = PerWorker(np.ones(4))
    state["text"] = np.array(["ccc", "d"], object)


def test_the_same_layout_comes_back_while_only_values_change() -> None:
    layouts = Layouts(1, 2)
    first, _ = layouts.of(make())
    state = make()
    values_only(state)
    again, values = layouts.of(state)
    assert again is first
    expected_layout, expected = layout_of(state, 1, 2)
    assert again == expected_layout
    assert [id(value) for value in values if isinstance(value, np.ndarray)] == [
        id(value) for value in expected if isinstance(value, np.ndarray)
    ]
    assert len(values) == len(expected)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_is_seen(change: Callable[[dict[Any, Any]], None]) -> None:
    layouts = Layouts(0, 2)
    first, _ = layouts.of(make())
    state = make()
    change(state)
    found, values = layouts.of(state)
    expected, _ = layout_of(state, 0, 2)
    assert found == expected
    assert len(values) == len(expected.leaves)
    assert layouts.of(make())[0] == first


def test_keys_that_are_equal_but_of_other_types_are_told_apart() -> None:
    layouts = Layouts(0, 1)
    layouts.of({1: np.zeros(1)})
    assert [leaf.name for leaf in layouts.of({True: np.zeros(1)})[0].leaves] == ["True"]
    layouts.of({0.0: np.zeros(1)})
    assert [leaf.name for leaf in layouts.of({-0.0: np.zeros(1)})[0].leaves] == ["-0.0"]


def test_what_cannot_be_saved_any_more_is_an_error() -> None:
    layouts = Layouts(0, 1)
    state = {"x": jnp.zeros(8), "n": 1}
    layouts.of(state)
    state["x"].delete()
    with pytest.raises(StateError, match=r"x: the jax\.Array is deleted"):
        layouts.of(state)
    with pytest.raises(StateError, match="does not fit int64"):
        layouts.of({"x": jnp.zeros(8), "n": 1 << 70})
    cyclic: dict[str, Any] = {"x": jnp.zeros(8), "n": 1}
    layouts.of({"x": {"n": 1}})
    cyclic["x"] = cyclic
    with pytest.raises(StateError, match="contains itself"):
        layouts.of(cyclic)


def test_another_sharding_is_another_layout() -> None:
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    layouts = Layouts(0, 1)
    for spec in (jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()):
        state = {"x": jax.device_put(np.zeros((8, 2), np.float32), jax.sharding.NamedSharding(mesh, spec))}
        assert layouts.of(state)[0] == layout_of(state, 0, 1)[0]
