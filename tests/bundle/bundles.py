"""Checkpoints for the tests: one description, written by this package or by TensorFlow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ray_ckpt.bundle import (
    Index,
    StoredTensor,
    content_crc,
    crc32c,
    decode_strings,
    dtype_name,
    dtype_of,
    encode_partitioned,
    encode_piece,
    encode_run,
    encode_strings,
    index_name,
    merge_index,
    piece_key,
    shard_name,
)
from ray_ckpt.types import Box, Shape

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Part:
    """One rectangle of a tensor of ``shape``, with its values."""

    name: str
    array: Array
    shape: Shape
    box: Box

    @classmethod
    def whole(cls, name: str, array: Array) -> Part:
        return cls(name, array, array.shape, Box.whole(array.shape))


def cut(name: str, array: Array, boxes: Sequence[Box]) -> list[Part]:
    """The parts of an array that the boxes name."""
    return [Part(name, array[box.slices], array.shape, box) for box in boxes]


def rows(shape: Shape, count: int) -> list[Box]:
    """``count`` boxes that cut the first dimension as evenly as it goes."""
    edges = [shape[0] * i // count for i in range(count + 1)]
    return [Box((lo,) + (0,) * (len(shape) - 1), (hi - lo, *shape[1:])) for lo, hi in itertools.pairwise(edges)]


def write_bundle(prefix: Path, shards: Sequence[Sequence[Part]]) -> None:
    """Write a checkpoint with this package; within a shard, the parts' bytes follow each other."""
    runs: list[bytes] = []
    partitioned: dict[str, tuple[str, Shape, list[Box]]] = {}
    for shard_id, parts in enumerate(shards):
        data, entries = b"", []
        for part in parts:
            dtype = dtype_name(part.array.dtype)
            raw, crc = encode(part.array)
            value = encode_piece(dtype, part.box.shape, shard_id, len(data), len(raw), crc)
            entries.append((piece_key(part.name, part.box, part.shape), value))
            data += raw
            if part.box.shape != part.shape:
                partitioned.setdefault(part.name, (dtype, part.shape, []))[2].append(part.box)
        runs.append(encode_run(sorted(entries)))
        Path(shard_name(str(prefix), shard_id, len(shards))).write_bytes(data)
    full = ((name.encode(), encode_partitioned(*what)) for name, what in partitioned.items())
    runs.append(encode_run(sorted(full)))
    Path(index_name(str(prefix))).write_bytes(merge_index(runs, len(shards)))


def encode(array: Array) -> tuple[bytes, int]:
    """An array's stored bytes and their crc32c."""
    if array.dtype == object:
        return encode_strings(array, array.shape)
    raw = array.tobytes()
    return raw, crc32c(raw)


def read_bundle(prefix: Path) -> dict[str, tuple[str, Array]]:
    """{name: (dtype, values)} of every tensor but variants, read and verified with this package."""
    index = Index.parse(Path(index_name(str(prefix))).read_bytes(), str(prefix))
    return {
        name: (tensor.dtype, read_tensor(prefix, index.num_shards, tensor)) for name, tensor in index.tensors.items()
    }


def read_tensor(prefix: Path, num_shards: int, tensor: StoredTensor) -> Array:
    """One tensor put together from its pieces; a variant's elements stay bytes of its file."""
    dtype = dtype_of("string" if tensor.dtype == "variant" else tensor.dtype)
    out = np.empty(tensor.shape, dtype)
    for piece in tensor.pieces:
        with Path(shard_name(str(prefix), piece.shard_id, num_shards)).open("rb") as file:
            file.seek(piece.offset)
            raw = file.read(piece.nbytes)
        count = math.prod(piece.box.shape)
        assert content_crc(tensor.dtype, count, raw) == piece.crc, tensor.name
        if tensor.dtype == "variant":
            continue
        if tensor.dtype == "string":
            flat = np.empty(count, object)
            flat[:] = decode_strings(raw, count)
        else:
            flat = np.frombuffer(raw, dtype)
        # With the dots: without an index NumPy would put a scalar's array into the array.
        out[(*piece.box.slices, ...)] = flat.reshape(piece.box.shape)
    return out


def random_array(rng: np.random.Generator, dtype: str, shape: Shape) -> Array:
    """Random values; floats and complex are random bits, so that NaNs carry payloads."""
    count = math.prod(shape)
    kind = dtype_of(dtype)
    if dtype == "string":
        flat = np.empty(count, object)
        flat[:] = [rng.bytes(int(n)) for n in rng.integers(0, 300, count)]
        return flat.reshape(shape)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype in ("int2", "uint2", "int4", "uint4"):
        info = ml_dtypes.iinfo(kind)
        return rng.integers(int(info.min), int(info.max) + 1, shape).astype(np.int8).astype(kind)
    if dtype == "float4_e2m1fn":
        return rng.integers(0, 16, shape).astype(np.uint8).view(kind)
    return np.frombuffer(rng.bytes(count * kind.itemsize), kind).reshape(shape)


def same_bits(a: Array, b: Array) -> bool:
    """Equal shape, type and every bit: NaN equals the same NaN, -0 does not equal 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()
