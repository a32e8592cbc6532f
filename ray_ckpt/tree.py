"""A user's state as named leaves and back.

Containers are dict, list, tuple, namedtuple, dataclass, None (no leaves) and whatever JAX has registered as a
pytree node; everything else is a leaf. A leaf's name is its path, escaped part by part and joined by "/":

- dict keys: a str as it is; int, bool, float and None as Python prints them ("3", "True", "0.5", "None").
  Other types of key are refused;
- list and tuple items: the index; namedtuple and dataclass items: the field's name; other nodes: JAX's key;
- in each part "%" becomes "%25", "/" becomes "%2F" and control characters become "%00" to "%1F" and "%7F". An
  empty part becomes "%-", and a state that is itself one leaf is named "%root": neither can come from another
  key, as "%" is otherwise followed by two digits.

Leaves come in the order in which their containers hold them. The JSON of the structure sorts dict items by
their part, so that it does not depend on the order of insertion.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves.base import PerWorker, Slice
from ray_ckpt.types import METADATA_KEY

ROOT_NAME = "%root"
_EMPTY_PART = "%-"
_LEAF = "*"
_SPECIAL = re.compile(r"[%/\x00-\x1f\x7f]")
_LEAVES = frozenset({int, float, bool, complex, str, bytes, np.ndarray})
"""The commonest types of leaf, known without asking anybody: for speed only."""

_BUILTIN = frozenset({dict, OrderedDict, defaultdict, list, tuple, type(None)})

_Combine = Callable[[list[Any]], Any]
_Json = Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True)
class Flat:
    """The leaves of a state by name, in the order of its containers, and its structure as JSON."""

    leaves: list[tuple[str, Any]]
    tree: str


@dataclass(frozen=True, slots=True)
class _Node:
    """One container: its parts and children, how to put children together, and its JSON."""

    parts: list[str]
    children: list[Any]
    combine: _Combine
    describe: _Json


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
    """The state from the JSON of its structure alone, as dict, list, tuple and None.

    Raises:
        StateError: the structure holds other containers: they need a state as ``like``.
        MismatchError: a leaf has no value.
    """
    return _rebuild(json.loads(tree), "", values)


def join_name(parent: str, part: str) -> str:
    """The name of a child; ``part`` is not escaped yet."""
    escaped = _escape(part)
    return f"{parent}/{escaped}" if parent else escaped


def _escape(part: str) -> str:
    # The commonest keys have nothing to escape, which this tells sooner than a search does.
    if part.isidentifier():
        return part
    if not part:
        return _EMPTY_PART
    return _SPECIAL.sub(lambda match: f"%{ord(match[0]):02X}", part)


def _flatten(value: Any, name: str, leaves: list[tuple[str, Any]]) -> Any:
    """Append the leaves under ``value``; returns its JSON."""
    node = _node(value, name)
    if node is None:
        leaves.append((name or ROOT_NAME, value))
        return _LEAF
    return node.describe([_flatten(child, child_name, leaves) for child_name, child in _named_children(node, name)])


def _collect(value: Any, name: str, leaves: list[tuple[str, Any]]) -> None:
    """Append the leaves under ``value``."""
    node = _node(value, name)
    if node is None:
        leaves.append((name or ROOT_NAME, value))
        return
    for child_name, child in _named_children(node, name):
        if type(child) in _LEAVES:
            leaves.append((child_name, child))
        else:
            _collect(child, child_name, leaves)


def _unflatten(like: Any, name: str, values: Mapping[str, Any]) -> Any:
    node = _node(like, name)
    if node is None:
        return _value(values, name or ROOT_NAME)
    return node.combine(
        [
            _value(values, child_name) if type(child) in _LEAVES else _unflatten(child, child_name, values)
            for child_name, child in _named_children(node, name)
        ]
    )


class _NoValueError(Exception):
    """A leaf has no value."""


def _value(values: Mapping[str, Any], name: str) -> Any:
    try:
        return values[name]
    except KeyError:
        raise _NoValueError from None


def _named_children(node: _Node, name: str) -> Iterator[tuple[str, Any]]:
    """The children of the container of this name, with their names."""
    names = map(_escape, node.parts)
    return zip([f"{name}/{part}" for part in names] if name else names, node.children, strict=True)


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
        return {key: _rebuild(child, join_name(name, _part(key, name)), values) for key, child in items}
    if kind in ("list", "tuple"):
        children = [_rebuild(child, join_name(name, str(i)), values) for i, child in enumerate(items)]
        return children if kind == "list" else tuple(children)
    raise StateError(
        f"{name or 'the state'} was saved as a {kind}, which the checkpoint alone cannot make; "
        "pass a state of the same structure as `like`"
    )


def _node(value: Any, name: str) -> _Node | None:
    """``value`` as a container, or None for a leaf."""
    kind = type(value)
    if kind in _LEAVES:
        return None
    if kind not in _BUILTIN:
        if kind is PerWorker:
            return _per_worker_node(value, name)
        if kind is Slice or isinstance(value, type):
            return None
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return _namedtuple_node(value)
        if kind.__module__.startswith("jaxlib"):
            # Arrays: JAX itself, which takes longer to say so, has no containers there.
            return None
        registered = _jax_node(value, name)
        if registered is not None:
            return registered
    if value is None:
        return _Node([], [], lambda _: None, lambda _: None)
    if isinstance(value, dict):
        return _dict_node(value, name)
    if isinstance(value, (list, tuple)):
        return _sequence_node(value)
    return _dataclass_node(value) if dataclasses.is_dataclass(value) else None


def _dict_node(value: dict[Any, Any], name: str) -> _Node:
    parts = [_part(key, name) for key in value]

    def combine(children: list[Any]) -> Any:
        out = copy.copy(value)
        out.update(zip(value, children, strict=True))
        return out

    def describe(children: list[Any]) -> Any:
        items = zip(parts, value, children, strict=True)
        return {"dict": [[_json_key(key), child] for _, key, child in sorted(items, key=_first)]}

    return _Node(parts, list(value.values()), combine, describe)


def _first(item: tuple[str, Any, Any]) -> tuple[str, str]:
    return item[0], type(item[1]).__name__


def _json_key(key: Any) -> Any:
    return str.__str__(key) if isinstance(key, str) else key


def _part(key: Any, name: str) -> str:
    """A dict key as text.

    Raises:
        StateError: a type of key that has no rule.
    """
    if type(key) is str:
        return key
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or type(key) in (int, bool, float):
        return repr(key)
    raise StateError(
        f"{name or 'the state'} is a dict with the key {key!r} of type {type(key).__name__}; "
        "use str, int, bool, float or None"
    )


def _sequence_node(value: list[Any] | tuple[Any, ...]) -> _Node:
    kind: Any = type(value)
    label = "list" if isinstance(value, list) else "tuple"
    parts = [str(i) for i in range(len(value))]
    return _Node(parts, list(value), kind, lambda children: {label: children})


def _namedtuple_node(value: Any) -> _Node:
    kind, fields = type(value), list(value._fields)
    return _Node(fields, list(value), kind._make, _other("namedtuple", kind, fields))


def _dataclass_node(value: Any) -> _Node:
    fields = dataclasses.fields(value)
    names = [field.name for field in fields]

    def combine(children: list[Any]) -> Any:
        # Past __init__, which may have other parameters or compute: every field is known.
        out = copy.copy(value)
        for field, child in zip(names, children, strict=True):
            object.__setattr__(out, field, child)
        return out

    return _Node(names, [getattr(value, field) for field in names], combine, _other("dataclass", type(value), names))


def _per_worker_node(value: PerWorker, name: str) -> _Node | None:
    """A marker around a container: the marker moves to each of its leaves."""
    inner = _node(value.value, name)
    if inner is None:
        return None

    def combine(children: list[Any]) -> Any:
        bare = [child.value if isinstance(child, PerWorker) else child for child in children]
        return dataclasses.replace(value, value=inner.combine(bare))

    marked = [dataclasses.replace(value, value=child) for child in inner.children]
    return _Node(inner.parts, marked, combine, inner.describe)


def _jax_node(value: Any, name: str) -> _Node | None:
    """What JAX has registered, if this process uses JAX at all."""
    jax: Any = sys.modules.get("jax")
    registry = getattr(getattr(jax, "tree_util", None), "default_registry", None)
    if registry is None:
        return None
    found = registry.flatten_one_level_with_keys(value)
    if found is None:
        return None
    pairs, _ = found
    treedef = jax.tree_util.tree_structure(value, is_leaf=lambda x: x is not value)
    parts = [_jax_part(key, name) for key, _ in pairs]
    return _Node(parts, [child for _, child in pairs], treedef.unflatten, _other("JAX node", type(value), parts))


def _jax_part(key: Any, name: str) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return _part(getattr(key, attribute), name)
    return str(key)


def _other(label: str, kind: type, parts: Any) -> _Json:
    """JSON of a container that only a ``like`` can rebuild."""
    title = f"{label} {kind.__module__}.{kind.__qualname__}"
    return lambda children: {title: [[part, child] for part, child in zip(parts, children, strict=True)]}


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
    node = _node(value, name)
    if node is None:
        yield name or ROOT_NAME, path
        return
    if isinstance(value, dict):
        steps = [f"[{key!r}]" for key in value]
    elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        steps = [f"[{part}]" for part in node.parts]
    else:
        steps = [f".{part}" for part in node.parts]
    for part, step, child in zip(node.parts, steps, node.children, strict=True):
        yield from _paths(child, join_name(name, part), path + step)


class Structure:
    """The containers of a state seen before: gives the leaves of an equal one in a fraction of `flatten`'s time."""

    def __init__(self, state: Any) -> None:
        self._seen = _see(state)

    def leaves(self, state: Any) -> list[Any] | None:
        """The leaves in the order of `flatten`; None unless names and containers are the same as before."""
        if self._seen is None or type(state) is not self._seen.kind:
            return None
        found: list[Any] = []
        try:
            return found if _revisit(state, self._seen, found) else None
        except RecursionError:
            return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """One container: its type, its keys, the types of its children; ``inner`` has None for a leaf.

    ``inner`` is empty where all children are leaves for good.
    """

    kind: type
    keys: list[Any]
    kinds: list[type]
    inner: list[_Seen | None]


def _see(value: Any) -> _Seen | None:
    node = _node(value, "")
    if node is None:
        return None
    inner = [None if type(child) in _LEAVES else _see(child) for child in node.children]
    kinds = list(map(type, node.children))
    # Of a marker, the type does not tell whether it is a leaf.
    plain = not any(inner) and PerWorker not in kinds
    return _Seen(type(value), _keys(value, node.parts), kinds, [] if plain else inner)


def _revisit(value: Any, seen: _Seen, found: list[Any]) -> bool:
    """Append the leaves under ``value``; False if it is not what was seen. Its type has been compared."""
    if seen.kind in _BUILTIN and value is not None:
        children = list(value.values()) if isinstance(value, dict) else value
        keys = _keys(value, None)
    else:
        node = _node(value, "")
        if node is None:
            return False
        children, keys = node.children, _keys(value, node.parts)
    if keys != seen.keys or list(map(type, children)) != seen.kinds:
        return False
    if not seen.inner:
        found.extend(children)
        return True
    for child, inner in zip(children, seen.inner, strict=True):
        if inner is not None:
            if not _revisit(child, inner, found):
                return False
        elif type(child) is PerWorker and _node(child, "") is not None:
            return False
        else:
            found.append(child)
    return True


def _keys(value: Any, parts: list[str] | None) -> list[Any]:
    """What tells a container from another of its type; equal keys of a dict (1, True; 0.0, -0.0) are told apart."""
    if isinstance(value, PerWorker):
        return [type(value.value), *_keys(value.value, parts)]
    if isinstance(value, dict):
        kinds = list(map(type, value))
        return [*value, *kinds, *(map(repr, value) if float in kinds else ())]
    return [len(value)] if isinstance(value, (list, tuple)) else parts or []
