"""Names of leaves, and states back from them."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves import PerWorker, Slice
from ray_ckpt.tree import flatten, rebuild, unflatten

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True, slots=True)
class Config:
    rate: float
    layers: list[Any] = field(default_factory=list)


def names(state: Any) -> list[str]:
    return [name for name, _ in flatten(state).leaves]


def test_names_follow_the_containers_in_their_order() -> None:
    state = {"b": [1, (2, 3)], "a": Point(4, {"k": 5}), "c": Config(0.5, [6]), "none": None, "empty": {}}
    assert flatten(state).leaves == [
        ("b/0", 1),
        ("b/1/0", 2),
        ("b/1/1", 3),
        ("a/x", 4),
        ("a/y/k", 5),
        ("c/rate", 0.5),
        ("c/layers/0", 6),
    ]


def test_special_characters_are_escaped() -> None:
    state = {"a/b": 1, "50%": 2, "\0\n\x7f": 3, "": 4, "ünï": 5, "%-": 6}
    assert names(state) == ["a%2Fb", "50%25", "%00%0A%7F", "%-", "ünï", "%25-"]


def test_keys_of_other_types_are_named_as_printed() -> None:
    assert names({3: 0, True: 0, 0.5: 0, None: 0}) == ["3", "True", "0.5", "None"]


def test_a_single_leaf_has_a_name() -> None:
    assert flatten(7).leaves == [("%root", 7)]
    assert unflatten(0, {"%root": 9}) == 9
    assert rebuild(flatten(7).tree, {"%root": 9}) == 9


def test_equal_names_are_an_error_with_both_paths() -> None:
    with pytest.raises(StateError, match=r"'m/1'.*state\['m'\]\[1\].*state\['m'\]\['1'\]"):
        flatten({"m": {1: 0, "1": 0}})


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": {(1, 2): 0}}, r"a is a dict with the key \(1, 2\) of type tuple"),
        ({b"k": 0}, "type bytes"),
        ({"_ray_ckpt": 0}, "belongs to the checkpoint's metadata"),
        ({"\ud800": 0}, "not valid UTF-8"),
    ],
)
def test_bad_keys_are_errors(state: Any, text: str) -> None:
    with pytest.raises(StateError, match=text):
        flatten(state)


def test_a_state_that_contains_itself_is_an_error() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(StateError, match="contains itself"):
        flatten(state)


def test_the_structure_does_not_depend_on_insertion_order() -> None:
    assert flatten({"a": 1, "b": 2}).tree == flatten({"b": 2, "a": 1}).tree
    assert flatten({"a": 1}).tree != flatten({"a": [1]}).tree
    assert flatten([1]).tree != flatten((1,)).tree


def test_unflatten_keeps_the_types_of_like() -> None:
    like = {
        "p": Point(0, 0),
        "c": Config(0.0, [0]),
        "o": OrderedDict(z=0, a=0),
        "d": defaultdict(list, {"k": 0}),
        "t": (0, None, [0]),
    }
    got = unflatten(like, {name: i for i, name in enumerate(names(like))})
    assert got == {
        "p": Point(0, 1),
        "c": Config(2, [3]),
        "o": OrderedDict(z=4, a=5),
        "d": {"k": 6},
        "t": (7, None, [8]),
    }
    assert type(got["p"]) is Point
    assert type(got["o"]) is OrderedDict
    assert got["d"]["new"] == []
    assert like["c"].rate == 0.0


def test_missing_values_are_listed() -> None:
    with pytest.raises(MismatchError, match=r"2 leaves.*a, b/0"):
        unflatten({"a": 0, "b": [0], "c": 0}, {"c": 1})
    with pytest.raises(MismatchError, match="'b/0'"):
        rebuild(flatten({"b": [0]}).tree, {})


@pytest.mark.parametrize("state", [{"n": Point(1, 2)}, {"n": Config(1.0)}])
def test_rebuild_without_like_refuses_other_containers(state: Any) -> None:
    with pytest.raises(StateError, match=r"n was saved as a (namedtuple|dataclass) .*`like`"):
        rebuild(flatten(state).tree, dict(flatten(state).leaves))


keys = st.text(st.characters(codec="utf-8"), max_size=4) | st.integers() | st.booleans() | st.none()
states = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.none()
    ),
    max_leaves=12,
)


def has_equal_keys(state: Any) -> bool:
    if isinstance(state, dict):
        inner = state.values()
        return len({str(key) for key in state}) < len(state) or any(map(has_equal_keys, inner))
    return isinstance(state, (list, tuple)) and any(map(has_equal_keys, state))


@given(states)
def test_any_builtin_state_comes_back(state: Any) -> None:
    assume(not has_equal_keys(state))
    flat = flatten(state)
    values = dict(flat.leaves)
    assert len(values) == len(flat.leaves)
    assert unflatten(state, values) == state
    assert rebuild(flat.tree, values) == state
    json.loads(flat.tree)
    assert all(name and "\0" not in name for name in values)


def test_a_marker_around_a_container_moves_to_its_leaves() -> None:
    state = {"it": PerWorker({"epoch": 3, "seed": [1]}, on_resize="first")}
    flat = flatten(state)
    assert [name for name, _ in flat.leaves] == ["it/epoch", "it/seed/0"]
    assert all(isinstance(leaf, PerWorker) and leaf.on_resize == "first" for _, leaf in flat.leaves)
    back = unflatten(state, {"it/epoch": PerWorker(4), "it/seed/0": PerWorker(2)})
    assert isinstance(back["it"], PerWorker)
    assert back["it"].value == {"epoch": 4, "seed": [2]}
    assert back["it"].on_resize == "first"
    assert flat.tree == flatten({"it": {"epoch": 0, "seed": [0]}}).tree


def test_slices_are_leaves() -> None:
    part = Slice([1, 2], (4,), (0,))
    assert flatten({"w": part}).leaves == [("w", part)]


def test_registered_jax_nodes_are_containers() -> None:
    jax = pytest.importorskip("jax")

    @jax.tree_util.register_pytree_with_keys_class
    class Node:
        def __init__(self, w: Any, label: str) -> None:
            self.w, self.label = w, label

        def tree_flatten_with_keys(self) -> Any:
            return [(jax.tree_util.GetAttrKey("w"), self.w)], self.label

        @classmethod
        def tree_unflatten(cls, label: str, children: Any) -> Any:
            return cls(*children, label)

    node = Node({"k": 1}, "static")
    assert flatten([node]).leaves == [("0/w/k", 1)]
    (back,) = unflatten([node], {"0/w/k": 5})
    assert (back.w, back.label) == ({"k": 5}, "static")
    with pytest.raises(StateError, match="JAX node"):
        rebuild(flatten([node]).tree, {"0/w/k": 5})


def test_fields_that_jax_was_told_are_static_are_no_leaves() -> None:
    jax = pytest.importorskip("jax")

    @dataclass
    class Module:
        w: int
        name: str

    jax.tree_util.register_dataclass(Module, data_fields=["w"], meta_fields=["name"])
    assert flatten(Module(1, "dense")).leaves == [("w", 1)]
    assert unflatten(Module(1, "dense"), {"w": 2}) == Module(2, "dense")
