"""The states that are saved: the same names, shapes and bytes for every subject."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """``shapes`` are global; with ``world_size`` > 1 each rank holds an equal part of every tensor's axis 0.

    Of those in ``replicated`` each rank holds the whole. ``hosts``: each rank is a host of its own, as far as one
    machine can be several.
    """

    name: str
    title: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    world_size: int = 1
    replicated: frozenset[str] = frozenset()
    hosts: bool = False

    @property
    def nbytes(self) -> int:
        """Of the whole state; all tensors are float32."""
        return sum(4 * int(np.prod(shape)) for _, shape in self.shapes)

    def part(self, name: str, shape: tuple[int, ...], rank: int) -> tuple[int, tuple[int, ...]]:
        """(first row, shape) of what ``rank`` holds of a tensor."""
        if name in self.replicated:
            return 0, shape
        rows = shape[0] // self.world_size
        return rank * rows, (rows, *shape[1:])

    def array(self, number: int, rank: int = 0, seed: int = 0) -> np.ndarray:
        """What ``rank`` holds of a tensor: random, so that no compressor shrinks it by much, as with real weights."""
        name, shape = self.shapes[number]
        rng = np.random.default_rng((seed, number, 0 if name in self.replicated else rank))
        return rng.random(self.part(name, shape, rank)[1], dtype=np.float32) - np.float32(0.5)

    def arrays(self, rank: int = 0, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """All that ``rank`` holds, by name."""
        for number, (name, _) in enumerate(self.shapes):
            yield name, self.array(number, rank, seed)


def _big(count: int, shape: tuple[int, ...], small: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    weights = tuple((f"w{i:02d}", shape) for i in range(count))
    return weights + tuple((f"s{i:03d}", (2048,)) for i in range(small))


_WEIGHTS = _big(24, (2720, 4096), 500)
_REPLICATED = frozenset(name for name, _ in _WEIGHTS if name.startswith("s") or name >= "w18")
"""A quarter of the weights, and what is small: norms and biases are replicated in most meshes."""

CASES = {
    case.name: case
    for case in (
        Case("big", "1 GiB in 24 big and 500 small tensors", _WEIGHTS),
        Case("small", "20,000 tensors of 1 KiB", tuple((f"t{i:05d}", (16, 16)) for i in range(20_000))),
        Case("workers", "4 workers of 256 MiB", _WEIGHTS, world_size=4),
        Case("hosts", "4 hosts, 768 MiB sharded and 256 MiB replicated", _WEIGHTS, 4, _REPLICATED, hosts=True),
        Case("quick", "256 MiB in 6 big and 125 small tensors", _big(6, (2720, 4096), 125)),
    )
}
