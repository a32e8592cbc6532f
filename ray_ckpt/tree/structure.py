"""The containers of a state seen before, which are quick to go through again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_ckpt.leaves.base import PerWorker
from ray_ckpt.tree.nodes import BUILTIN, LEAVES, node_of


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
    node = node_of(value, "")
    if node is None:
        return None
    inner = [None if type(child) in LEAVES else _see(child) for child in node.children]
    kinds = list(map(type, node.children))
    # Of a marker, the type does not tell whether it is a leaf.
    plain = not any(inner) and PerWorker not in kinds
    return _Seen(type(value), _keys(value, node.parts), kinds, [] if plain else inner)


def _revisit(value: Any, seen: _Seen, found: list[Any]) -> bool:
    """Append the leaves under ``value``; False if it is not what was seen. Its type has been compared."""
    if seen.kind in BUILTIN and value is not None:
        children = list(value.values()) if isinstance(value, dict) else value
        keys = _keys(value, None)
    else:
        node = node_of(value, "")
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
        elif type(child) is PerWorker and node_of(child, "") is not None:
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
