"""Flat states whose keys are the names in the checkpoint."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves import PerWorker, Slice, Slices, Variants
from ray_ckpt.leaves.layout import Layouts, layout_of
from ray_ckpt.tree import Named, Structure, flatten, named_leaves, rebuild, unflatten

KEY = "dense/kernel/.ATTRIBUTES/VARIABLE_VALUE"
names = st.text(min_size=1).filter(lambda s: s[0] != "\0" and s != "_ray_ckpt" and s.isprintable())


def test_keys_are_the_names_as_they_are() -> None:
    state = Named({KEY: 1, "a%b": 2, "%root": 3, "a": 4, "a/b": 5, "table-keys": 6})
    assert flatten(state).leaves == list(state.items())
    assert named_leaves(state) == dict(state)


@given(st.dictionaries(names, st.integers()))
def test_there_and_back(values: dict[str, int]) -> None:
    state = Named(values)
    flat = flatten(state)
    assert dict(flat.leaves) == values
    for back in (unflatten(state, dict(flat.leaves)), rebuild(flat.tree, dict(flat.leaves))):
        assert type(back) is Named
        assert back == values


def test_the_structure_does_not_depend_on_insertion_order() -> None:
    assert flatten(Named(b=1, a=2)).tree == flatten(Named(a=1, b=2)).tree == '{"named":[["a","*"],["b","*"]]}'
    assert json.loads(flatten(Named()).tree) == {"named": []}


def test_values_without_a_name_are_ignored_and_names_without_a_value_are_told() -> None:
    assert unflatten(Named(a=0), {"a": 1, "b": 2}) == {"a": 1}
    with pytest.raises(MismatchError, match="no value for 1 leaves of the target: a/b"):
        unflatten(Named({"a/b": 0}), {})
    with pytest.raises(MismatchError, match="no value for the leaf 'a/b'"):
        rebuild(flatten(Named({"a/b": 0})).tree, {})


def test_any_kind_of_leaf_may_be_in_it() -> None:
    part = Slice(np.zeros(2), (4,), (0,))
    state = Named(a=np.zeros(2), b="text", c=part, d=Slices((part,)), e=Variants([b"x"], (1,)), f=PerWorker(1))
    assert flatten(state).leaves == list(state.items())


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"x": Named(a=1)}, "x is a Named, which is a whole state"),
        ([Named()], "0 is a Named"),
        (Named(a=Named(b=1)), "a is a Named"),
        (PerWorker(Named(a=1)), "the state is a PerWorker of a Named"),
        (Named({"a/b": [1]}), "a/b: a list in a Named, which holds leaves only"),
        (Named(a=None), "a: a NoneType in a Named"),
        (Named(a=PerWorker({"b": 1})), "a: a PerWorker in a Named"),
        (Named({"": 1}), "a Named has the key ''"),
        (Named({"\0a": 1}), "a Named has the key"),
        (Named({3: 1}), "a Named has the key 3"),  # type: ignore[dict-item]
        (Named({"_ray_ckpt": 1}), "belongs to the checkpoint's metadata"),
        (Named({"\ud800": 1}), "not valid UTF-8"),
    ],
)
def test_what_cannot_be_named_is_an_error(state: Any, text: str) -> None:
    for take in (flatten, named_leaves):
        with pytest.raises(StateError, match=text):
            take(state)


def test_an_equal_one_is_known_again_without_asking_its_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Named({KEY: np.zeros(3), "b": 1, "c": "text"})
    structure = Structure(state)
    monkeypatch.setattr("ray_ckpt.tree.structure.node_of", lambda *_: pytest.fail("asked"))
    other = Named({KEY: np.ones(4), "b": 2, "c": ""})
    assert structure.leaves(other) == list(other.values())
    for changed in (
        Named({"b": 1, KEY: np.zeros(3), "c": ""}),
        Named({KEY: np.zeros(3), "b": 1}),
        Named({KEY: np.zeros(3), "b": 1.0, "c": ""}),
        {KEY: np.zeros(3), "b": 1, "c": ""},
    ):
        assert structure.leaves(changed) is None


def test_its_layout_is_known_again_and_follows_a_change() -> None:
    layouts = Layouts(0, 1)
    first = layouts.of(Named({KEY: np.zeros(3)}))[0]
    assert [leaf.name for leaf in first.leaves] == [KEY]
    assert layouts.of(Named({KEY: np.ones(3)}))[0] is first
    changed = Named({KEY: np.ones(4)})
    assert layouts.of(changed)[0] == layout_of(changed, 0, 1)[0]
