"""A state as named leaves, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.tree.names import ROOT_NAME, join_name, part_of
from ray_ckpt.tree.nodes import LEAVES, Named, named_children, node_of
from ray_ckpt.tree.stored import reading_structure
from ray_ckpt.types import METADATA_KEY

_LEAF = "*"


@dataclass(frozen=True, slots=True)
class Flat:
    """The leaves of a state by name, in the order of its containers, and its structure as JSON."""

    leaves: list[tuple[str, Any]]
    tree: str


def flatten(state: Any) -> Flat:
    """All leaves of ``state`` with their names, and the structure that holds them.

    Raises:
        StateError: two leaves get the same name, a dict key cannot be named, a name is not UTF-8 or is
            reserved, or the state contains itself. The text gives the paths.
    """
    leaves: list[tuple[str, Any]] = []
    try:
        tree = _flatten(state, "", leaves)
    except RecursionError:
        raise _too_deep() from None
    _check_names(state, leaves)
    return Flat(leaves, json.dumps(tree, separators=(",", ":"), ensure_ascii=False))


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves alone, as `flatten` gives and checks them."""
    leaves: list[tuple[str, Any]] = []
    try:
        _collect(state, "", leaves)
    except RecursionError:
        raise _too_deep() from None
    _check_names(state, leaves)
    return dict(leaves)


def unflatten(like: Any, values: Mapping[str, Any]) -> Any:
    """The containers of ``like`` with the values of these names as leaves.

    Values that ``like`` has no place for are ignored.

    Raises:
        MismatchError: a leaf of ``like`` has no value; lists the names.
    """
    try:
        return _unflatten(like, "", values)
    except _NoValueError:
        missing = sorted(name for name in named_leaves(like) if name not in values)
    raise MismatchError(f"no value for {len(missing)} leaves of the target: {', '.join(missing[:20])}")


def rebuild(tree: str, values: Mapping[str, Any]) -> Any:
    """The state from the JSON of its structure alone, as dict, list, tuple, `Named` and None.

    Raises:
        StateError: the structure holds other containers: they need a state as ``like``.
        MismatchError: a leaf has no value.
        DamagedError: it is no structure.
    """
    with reading_structure():
        return _rebuild(json.loads(tree), "", values)


def _flatten(value: Any, name: str, leaves: list[tuple[str, Any]]) -> Any:
    """Append the leaves under ``value``; returns its JSON."""
    node = node_of(value, name)
    if node is None:
        leaves.append((name or ROOT_NAME, value))
        return _LEAF
    return node.describe([_flatten(child, child_name, leaves) for child_name, child in named_children(node, name)])


def _collect(value: Any, name: str, leaves: list[tuple[str, Any]]) -> None:
    """Append the leaves under ``value``."""
    node = node_of(value, name)
    if node is None:
        leaves.append((name or ROOT_NAME, value))
        return
    for child_name, child in named_children(node, name):
        if type(child) in LEAVES:
            leaves.append((child_name, child))
        else:
            _collect(child, child_name, leaves)


def _unflatten(like: Any, name: str, values: Mapping[str, Any]) -> Any:
    node = node_of(like, name)
    if node is None:
        return _value(values, name or ROOT_NAME)
    return node.combine(
        [
            _value(values, child_name) if type(child) in LEAVES else _unflatten(child, child_name, values)
            for child_name, child in named_children(node, name)
        ]
    )


class _NoValueError(Exception):
    """A leaf has no value."""


def _value(values: Mapping[str, Any], name: str) -> Any:
    try:
        return values[name]
    except KeyError:
        raise _NoValueError from None


def _rebuild(tree: Any, name: str, values: Mapping[str, Any]) -> Any:
    if tree is None:
        return None
    if tree == _LEAF:
        try:
            return values[name or ROOT_NAME]
        except KeyError:
            raise MismatchError(f"no value for the leaf {name or ROOT_NAME!r} of the stored structure") from None
    ((kind, items),) = tree.items()
    if kind == "dict":
        return {key: _rebuild(child, join_name(name, part_of(key, name)), values) for key, child in items}
    if kind in ("list", "tuple"):
        children = [_rebuild(child, join_name(name, str(i)), values) for i, child in enumerate(items)]
        return children if kind == "list" else tuple(children)
    if kind == "named":
        return Named((key, _rebuild(child, key, values)) for key, child in items)
    raise StateError(
        f"{name or 'the state'} was saved as a {kind}, which the checkpoint alone cannot make; "
        "pass a state of the same structure as `like`"
    )


def _too_deep() -> StateError:
    return StateError("the state contains itself or is nested too deep; save a tree of containers")


def _check_names(state: Any, leaves: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in leaves}
    if len(names) != len(leaves):
        _raise_duplicate(state)
    if METADATA_KEY in names:
        raise StateError(f"the name {METADATA_KEY!r} belongs to the checkpoint's metadata; rename that leaf")
    _check_utf8(names)


def _check_utf8(names: set[str]) -> None:
    for name in names:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError:
                raise StateError(f"the leaf name {name!a} is not valid UTF-8; rename that key") from None


def _raise_duplicate(state: Any) -> None:
    seen: dict[str, str] = {}
    for name, path in _paths(state, "", "state"):
        if name in seen:
            raise StateError(
                f"two leaves get the name {name!r}: {seen[name]} and {path}; keys of one dict must differ as text"
            )
        seen[name] = path


def _paths(value: Any, name: str, path: str) -> Iterator[tuple[str, str]]:
    """Each leaf's name, and its path as one would write it in Python."""
    node = node_of(value, name)
    if node is None:
        yield name or ROOT_NAME, path
        return
    if isinstance(value, dict):
        steps = [f"[{key!r}]" for key in value]
    elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        steps = [f"[{part}]" for part in node.parts]
    else:
        steps = [f".{part}" for part in node.parts]
    for (child_name, child), step in zip(named_children(node, name), steps, strict=True):
        yield from _paths(child, child_name, path + step)
