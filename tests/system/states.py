"""States that training processes hold in tests: one function of (rank, world size, step)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ray_ckpt import PerWorker, Slice
from ray_ckpt.types import Box
from tests.restore.make import grid

SHAPE = (24, 12)


def whole(step: int) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that the ranks of `mixed` hold together at a step."""
    table = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + np.float32(step) / 8
    return {"table": table, "bf16": (table % 251).astype(ml_dtypes.bfloat16)}


def box(rank: int, world: int, axis: int = 0) -> Box:
    """A rank's part of an array of `SHAPE` that is cut along one axis."""
    return grid(SHAPE, (world, 1) if axis == 0 else (1, world))[rank]


def mixed(rank: int, world: int, step: int, axis: int = 0) -> dict[str, Any]:
    """Slices, replicas, each worker's own, and Python's values."""
    mine = box(rank, world, axis)
    return {
        **{name: Slice(array[mine.slices].copy(), SHAPE, mine.offset) for name, array in whole(step).items()},
        "layers": [np.full((5, 7), step, np.float64), np.arange(1000, dtype=np.int32) * step],
        "rng": PerWorker(np.array([rank, step], np.uint32), on_resize="first"),
        "step": step,
        "name": f"after {step}",
        "rate": 0.1,
        "done": False,
    }


def small(rank: int, world: int, step: int) -> dict[str, Any]:
    """A replica, a rank's own part and the step."""
    return {
        "w": np.full(64, step, np.float32),
        "part": Slice(np.full((1, 16), 100 * rank + step, np.int64), (world, 16), (rank, 0)),
        "step": step,
    }


def large(rank: int, world: int, step: int, nbytes: int = 16 << 20) -> dict[str, Any]:
    """A rank's own part of ``nbytes``."""
    columns = nbytes // 4
    return {"w": Slice(np.full((1, columns), step + rank, np.float32), (world, columns), (rank, 0)), "step": step}


def zeros_like(state: dict[str, Any]) -> dict[str, Any]:
    """A target of the same structure with none of the values."""

    def zero(value: Any) -> Any:
        if isinstance(value, Slice):
            return Slice(np.zeros_like(value.array), value.global_shape, value.offset)
        if isinstance(value, PerWorker):
            return PerWorker(zero(value.value), value.on_resize)
        if isinstance(value, list):
            return [zero(v) for v in value]
        return np.zeros_like(value) if isinstance(value, np.ndarray) else type(value)()

    return {name: zero(value) for name, value in state.items()}


def plain(state: Any) -> Any:
    """The same with every array as (dtype, shape, bytes), so that ``==`` compares bits."""
    if isinstance(state, Slice):
        return ("Slice", plain(state.array), tuple(state.global_shape), tuple(state.offset))
    if isinstance(state, PerWorker):
        return ("PerWorker", plain(state.value))
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    if isinstance(state, np.ndarray):
        return str(state.dtype), state.shape, state.tobytes()
    return type(state).__name__, state
