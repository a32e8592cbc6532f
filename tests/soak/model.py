"""What a soak's job trains: a state that is a function of (seed, step), and the same as an outsider computes it.

The job advances its arrays in place, one step after the other; the outsider has them in closed form. So a step that is
lost or done twice shows, and so do bytes that are copied while the next step changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ray_ckpt import PerWorker, Slice

Array = np.ndarray[Any, Any]

ROWS = 840
"""Of the array that the ranks share: it divides by all numbers of ranks up to 8."""

BIAS = 1500


@dataclass(frozen=True)
class Model:
    """The state of one run. ``columns``: of the shared int32 array of `ROWS` rows; its size is the state's."""

    seed: int
    columns: int

    def table(self, step: int) -> Array:
        """The array of which each rank holds some rows; numbers wrap around."""
        first, increment = _table(self.seed, self.columns)
        return first + np.int32(step) * increment

    def bias(self, step: int) -> Array:
        """An array that all ranks hold; its numbers are whole, so that sums are exact."""
        return np.arange(BIAS, dtype=np.float64) * (step + self.seed % 97)

    def tensors(self, step: int, world: int) -> dict[str, Any]:
        """What a checkpoint of ``world`` ranks holds, by the names of its tensors."""
        own = {f"rng/.per_worker/{r:05d}-of-{world:05d}": self.rng(r, step) for r in range(world)}
        return {
            "model/table": self.table(step),
            "model/bias": self.bias(step),
            "history": history(self.seed, step),
            "note": f"after {step}".encode(),
            "step": step,
            **own,
        }

    def rng(self, rank: int, step: int) -> Array:
        """What each rank has of its own."""
        return np.array([rank, step & 0xFFFFFFFF, self.seed & 0xFFFFFFFF], np.uint32)

    def state(self, rank: int, world: int, step: int) -> dict[str, Any]:
        """What a rank holds after a step. Of its own part a resized job takes rank 0's, see `digest`."""
        rows = ROWS // world
        part = self.table(step)[rank * rows : (rank + 1) * rows].copy()
        return {
            "model": {"table": Slice(part, (ROWS, self.columns), (rank * rows, 0)), "bias": self.bias(step)},
            "history": history(self.seed, step),
            "rng": PerWorker(self.rng(rank, step), on_resize="first"),
            "note": f"after {step}",
            "step": step,
        }

    def advance(self, state: dict[str, Any], rank: int) -> None:
        """Train one step, in place as far as numpy can."""
        step = state["step"] + 1
        part = state["model"]["table"]
        first = part.offset[0]
        part.array[...] += _table(self.seed, self.columns)[1][first : first + len(part.array)]
        state["model"]["bias"] += np.arange(BIAS, dtype=np.float64)
        state["history"][...] = _next(state["history"], step)
        state["rng"].value[...] = self.rng(rank, step)
        state["step"], state["note"] = step, f"after {step}"


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of a rank's state, but for what a rank has of its own: that depends on who saved it."""
    summed = hashlib.sha256()
    part = state["model"]["table"]
    for array in (part.array, state["model"]["bias"], state["history"]):
        summed.update(f"{array.dtype} {array.shape}".encode())
        summed.update(np.ascontiguousarray(array).tobytes())
    summed.update(repr((tuple(part.offset), tuple(part.global_shape), state["note"], state["step"])).encode())
    return summed.hexdigest()


@lru_cache(maxsize=8)
def _table(seed: int, columns: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    first, increment = rng.integers(-(2**31), 2**31, (2, ROWS, columns), np.int32)
    return first, increment


_HISTORIES: dict[int, list[bytes]] = {}


def history(seed: int, step: int) -> Array:
    """uint8[32]: a hash over all steps since 0 in their order."""
    chain = _HISTORIES.setdefault(seed, [hashlib.sha256(str(seed).encode()).digest()])
    while len(chain) <= step:
        chain.append(_next(np.frombuffer(chain[-1], np.uint8), len(chain)).tobytes())
    return np.frombuffer(chain[step], np.uint8).copy()


def _next(before: Array, step: int) -> Array:
    return np.frombuffer(hashlib.sha256(before.tobytes() + step.to_bytes(8, "little")).digest(), np.uint8)
