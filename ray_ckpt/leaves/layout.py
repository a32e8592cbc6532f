"""A rank's whole state as a layout: all leaves described, and a digest of it."""

from __future__ import annotations

import hashlib
from typing import Any

from ray_ckpt.leaves import describe
from ray_ckpt.tree import flatten
from ray_ckpt.types import Box, Layout, LeafSpec


def layout_of(state: Any, rank: int, world_size: int) -> tuple[Layout, list[Any]]:
    """The layout of this rank's state, and its leaves in the same order (views, nothing is copied).

    Raises:
        StateError: the state or one of its leaves cannot be saved.
    """
    flat = flatten(state)
    leaves = tuple(describe(name, value, rank, world_size) for name, value in flat.leaves)
    return Layout(leaves, flat.tree, fingerprint(leaves, flat.tree)), [value for _, value in flat.leaves]


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
