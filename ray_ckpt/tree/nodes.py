"""Containers: their parts, their children, and how to put children together."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ckpt.errors import StateError
from ray_ckpt.leaves.base import PerWorker, Slice, Slices, Variants
from ray_ckpt.tree.names import escape, part_of

LEAVES = frozenset({int, float, bool, complex, str, bytes, np.ndarray})
"""The commonest types of leaf, known without asking anybody: for speed only."""

_OWN_LEAVES = frozenset({Slice, Slices, Variants})


class Named(dict[str, Any]):
    """A whole state that is flat: the name of each leaf in the checkpoint, used as it is, and the leaf.

    Names that TensorFlow has made ("dense/kernel/.ATTRIBUTES/VARIABLE_VALUE") are not escaped. It is the root of a
    state and holds leaves only; anything else is a `StateError`, as is a name that is empty or begins with NUL.
    """


BUILTIN = frozenset({dict, Named, OrderedDict, defaultdict, list, tuple, type(None)})

_Combine = Callable[[list[Any]], Any]
_Json = Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True)
class Node:
    """One container: its parts and children, how to put children together, and its JSON.

    ``exact``: the parts are the names of the children.
    """

    parts: list[str]
    children: list[Any]
    combine: _Combine
    describe: _Json
    exact: bool = False


def named_children(node: Node, name: str) -> Iterator[tuple[str, Any]]:
    """The children of the container of this name, with their names."""
    names: Iterable[str] = node.parts if node.exact else map(escape, node.parts)
    return zip([f"{name}/{part}" for part in names] if name else names, node.children, strict=True)


def node_of(value: Any, name: str) -> Node | None:
    """``value`` as a container, or None for a leaf."""
    kind = type(value)
    if kind in LEAVES:
        return None
    if kind not in BUILTIN:
        if kind is PerWorker:
            return _per_worker_node(value, name)
        if kind in _OWN_LEAVES or isinstance(value, type):
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
        return Node([], [], lambda _: None, lambda _: None)
    if isinstance(value, dict):
        return _named_node(value, name) if isinstance(value, Named) else _dict_node(value, name)
    if isinstance(value, (list, tuple)):
        return _sequence_node(value)
    return _dataclass_node(value) if dataclasses.is_dataclass(value) else None


def _dict_node(value: dict[Any, Any], name: str) -> Node:
    parts = [part_of(key, name) for key in value]

    def combine(children: list[Any]) -> Any:
        out = copy.copy(value)
        out.update(zip(value, children, strict=True))
        return out

    def describe(children: list[Any]) -> Any:
        items = zip(parts, value, children, strict=True)
        return {"dict": [[_json_key(key), child] for _, key, child in sorted(items, key=_first)]}

    return Node(parts, list(value.values()), combine, describe)


def _named_node(value: Named, name: str) -> Node:
    if name:
        raise StateError(f"{name} is a Named, which is a whole state: its names cannot lie inside another container")
    items: dict[Any, Any] = value
    for key, child in items.items():
        if not isinstance(key, str) or not key or key.startswith("\0"):
            raise StateError(f"a Named has the key {key!r}; use names of tensors: str, not empty, without NUL in front")
        if type(child) not in LEAVES and node_of(child, key) is not None:
            raise StateError(f"{key}: a {type(child).__name__} in a Named, which holds leaves only; flatten it")
    keys = [str.__str__(key) for key in value]

    def describe(children: list[Any]) -> Any:
        return {"named": [[key, child] for key, child in sorted(zip(keys, children, strict=True), key=_first_part)]}

    return Node(
        keys, list(value.values()), lambda children: Named(zip(value, children, strict=True)), describe, exact=True
    )


def _first_part(item: tuple[str, Any]) -> str:
    return item[0]


def _first(item: tuple[str, Any, Any]) -> tuple[str, str]:
    return item[0], type(item[1]).__name__


def _json_key(key: Any) -> Any:
    return str.__str__(key) if isinstance(key, str) else key


def _sequence_node(value: list[Any] | tuple[Any, ...]) -> Node:
    kind: Any = type(value)
    label = "list" if isinstance(value, list) else "tuple"
    parts = [str(i) for i in range(len(value))]
    return Node(parts, list(value), kind, lambda children: {label: children})


def _namedtuple_node(value: Any) -> Node:
    kind, fields = type(value), list(value._fields)
    return Node(fields, list(value), kind._make, _other("namedtuple", kind, fields))


def _dataclass_node(value: Any) -> Node:
    fields = dataclasses.fields(value)
    names = [field.name for field in fields]

    def combine(children: list[Any]) -> Any:
        # Past __init__, which may have other parameters or compute: every field is known.
        out = copy.copy(value)
        for field, child in zip(names, children, strict=True):
            object.__setattr__(out, field, child)
        return out

    return Node(names, [getattr(value, field) for field in names], combine, _other("dataclass", type(value), names))


def _per_worker_node(value: PerWorker, name: str) -> Node | None:
    """A marker around a container: the marker moves to each of its leaves."""
    if isinstance(value.value, Named):
        raise StateError(f"{name or 'the state'} is a PerWorker of a Named, which is a whole state: mark its leaves")
    inner = node_of(value.value, name)
    if inner is None:
        return None

    def combine(children: list[Any]) -> Any:
        bare = [child.value if isinstance(child, PerWorker) else child for child in children]
        return dataclasses.replace(value, value=inner.combine(bare))

    marked = [dataclasses.replace(value, value=child) for child in inner.children]
    return Node(inner.parts, marked, combine, inner.describe)


def _jax_node(value: Any, name: str) -> Node | None:
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
    return Node(parts, [child for _, child in pairs], treedef.unflatten, _other("JAX node", type(value), parts))


def _jax_part(key: Any, name: str) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return part_of(getattr(key, attribute), name)
    return str(key)


def _other(label: str, kind: type, parts: Any) -> _Json:
    """JSON of a container that only a ``like`` can rebuild."""
    title = f"{label} {kind.__module__}.{kind.__qualname__}"
    return lambda children: {title: [[part, child] for part, child in zip(parts, children, strict=True)]}
