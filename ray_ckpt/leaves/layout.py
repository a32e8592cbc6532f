"""A rank's whole state as a layout: all leaves described, and a digest of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ray_ckpt.leaves import describe, token
from ray_ckpt.tree import Flat, Structure, flatten
from ray_ckpt.types import Box, Layout, LeafSpec


def layout_of(state: Any, rank: int, world_size: int) -> tuple[Layout, list[Any]]:
    """The layout of this rank's state, and its leaves in the same order (views, nothing is copied).

    Raises:
        StateError: the state or one of its leaves cannot be saved.
    """
    flat = flatten(state)
    return _layout_of(flat, rank, world_size), [value for _, value in flat.leaves]


def _layout_of(flat: Flat, rank: int, world_size: int) -> Layout:
    leaves = tuple(describe(name, value, rank, world_size) for name, value in flat.leaves)
    return Layout(leaves, flat.tree, fingerprint(leaves, flat.tree))


class Layouts:
    """The layouts of a state that is saved again and again: they seldom change, which is quick to see."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._last: _Remembered | None = None

    def of(self, state: Any) -> tuple[Layout, list[Any]]:
        """As `layout_of`."""
        last = self._last
        values = last.structure.leaves(state) if last is not None else None
        if last is not None and values is not None and self._same(last, values):
            return last.layout, values
        self._last = None
        flat = flatten(state)
        layout = _layout_of(flat, self._rank, self._world_size)
        names, values = [name for name, _ in flat.leaves], [value for _, value in flat.leaves]
        self._last = _Remembered(layout, Structure(state), names, [token(value) for value in values])
        return layout, values

    def _same(self, last: _Remembered, values: list[Any]) -> bool:
        tokens = [token(value) for value in values]
        return tokens == last.tokens and all(
            describe(last.names[i], values[i], self._rank, self._world_size) == last.layout.leaves[i]
            for i, known in enumerate(tokens)
            if known is None
        )


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A layout and what to compare with: ``names`` and ``tokens`` of the leaves, in its order."""

    layout: Layout
    structure: Structure
    names: list[str]
    tokens: list[Any]


def fingerprint(leaves: tuple[LeafSpec, ...], tree: str) -> str:
    """A digest over everything that a layout says: 32 hexadecimal digits."""
    digest = hashlib.blake2b(tree.encode(), digest_size=16)
    # States repeat few shapes: their text is made once.
    texts: dict[tuple[Box, ...], str] = {}
    lines = []
    for leaf in leaves:
        boxes = texts.get(leaf.boxes)
        if boxes is None:
            boxes = texts[leaf.boxes] = repr([(box.offset, box.shape) for box in leaf.boxes])
        # NUL cannot occur in a name.
        lines.append(f"{leaf.name}\0{leaf.dtype}\0{leaf.shape}\0{leaf.kind}\0{boxes}")
    digest.update("\n".join(lines).encode())
    return digest.hexdigest()
