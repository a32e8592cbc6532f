"""Checkpoints made straight from the bundle codec: no planner, writer or coordinator takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np

from ray_ckpt.bundle import (
    crc32c,
    dtype_name,
    encode_partitioned,
    encode_piece,
    encode_run,
    encode_strings,
    index_name,
    merge_index,
    piece_key,
    shard_name,
)
from ray_ckpt.log import append, put_claim, read_head
from ray_ckpt.metadata import Metadata, RankTree, WriterNote, encode
from ray_ckpt.storage import Store
from ray_ckpt.types import METADATA_KEY, Box, Checkpoint, Claim, Dying, LogRecord

CHUNK_NBYTES = 4 << 20

Array = np.ndarray[Any, Any]


@dataclass
class Shards:
    """The bytes of the data shards while they grow, and the entries and chunk checksums for them."""

    chunk_nbytes: int
    data: dict[int, bytearray] = field(default_factory=dict)
    chunks: dict[int, bytearray] = field(default_factory=dict)
    items: list[tuple[bytes, bytes]] = field(default_factory=list)

    def add(self, shard: int, name: str, box: Box, array: Array) -> None:
        """Append one box of an array to a shard."""
        part = np.ascontiguousarray(array[box.slices] if box.shape else array).reshape(box.shape)
        dtype = dtype_name(array.dtype)
        if dtype == "string":
            raw, crc = encode_strings(part, box.shape)
        else:
            raw = part.tobytes()
            crc = crc32c(raw)
        data = self.data.setdefault(shard, bytearray())
        value = encode_piece(dtype, box.shape, shard, len(data), len(raw), crc)
        self.items.append((piece_key(name, box, array.shape), value))
        data += raw
        if len(raw) > self.chunk_nbytes:
            for at in range(0, len(raw), self.chunk_nbytes):
                crc = google_crc32c.value(bytes(raw[at : at + self.chunk_nbytes]))
                self.chunks.setdefault(shard, bytearray()).extend(crc.to_bytes(4, "little"))


def make_checkpoint(
    store: Store,
    prefix: str,
    arrays: Mapping[str, Array],
    cuts: Mapping[str, Sequence[Box]] | None = None,
    *,
    num_shards: int = 4,
    metadata: Metadata | None = None,
    chunks: bool = True,
    chunk_nbytes: int = CHUNK_NBYTES,
) -> None:
    """Write a checkpoint: pieces go round the first shards, metadata (if any) to the last.

    ``cuts``: the boxes of the tensors that are stored in slices. ``chunks``: whether the metadata has the
    checksums of chunks.
    """
    shards = Shards(chunk_nbytes)
    number = 0
    for name, array in arrays.items():
        boxes = list((cuts or {}).get(name, (Box.whole(array.shape),)))
        for box in boxes:
            shards.add(number % (num_shards - 1), name, box, array)
            number += 1
        if boxes != [Box.whole(array.shape)]:
            entry = encode_partitioned(dtype_name(array.dtype), array.shape, boxes)
            shards.items.append((name.encode(), entry))
    if metadata is not None:
        if chunks:
            metadata = replace(metadata, chunks={i: bytes(crcs) for i, crcs in shards.chunks.items()})
        text = np.array(encode(metadata), object)
        shards.add(num_shards - 1, METADATA_KEY, Box.whole(()), text)
    for shard, data in shards.data.items():
        store.put(shard_name(prefix, shard, num_shards), data)
    store.put(index_name(prefix), merge_index([encode_run(sorted(shards.items))], num_shards))


def some_metadata(step: int = 500) -> Metadata:
    """Metadata as a commit of four ranks would have it."""
    return Metadata(
        step=step,
        attempt="e1-1",
        generation=1,
        world_size=4,
        time=1_700_000_000.0 + step,
        trees=(RankTree((0, 1, 2, 3), '{"w":"*"}'),),
        writers=(WriterNote(0, "host-a", 1000, 0.5), WriterNote(1, "host-b", 2000, 0.25)),
    )


def grid(shape: tuple[int, ...], parts: tuple[int, ...]) -> list[Box]:
    """Boxes that cut each dimension in so many parts, as even as can be."""
    boxes = [Box((), ())]
    for dim, count in zip(shape, parts, strict=True):
        edges = [dim * i // count for i in range(count + 1)]
        boxes = [
            Box((*box.offset, start), (*box.shape, stop - start)) for box in boxes for start, stop in pairwise(edges)
        ]
    return boxes


def flip(store: Store, path: str, at: int) -> None:
    """Damage one byte of an object."""
    data = bytearray(store.read(path))
    data[at] ^= 0x40
    store.put(path, data)


def truncate(store: Store, path: str, nbytes: int) -> None:
    """Cut an object short."""
    store.put(path, store.read(path)[:nbytes])


def same_bits(found: Array, expected: Array) -> bool:
    """Equal dtype, shape and bytes: NaNs and signed zeros count."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if found.dtype.hasobject:
        return bool(found.tolist() == expected.tolist())
    return np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


def random_bits(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> Array:
    """An array of random bytes, NaNs of all kinds among them; valid values where a type has invalid bytes."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype.hasobject:
        strings = np.empty(count, object)
        strings[:] = [rng.bytes(int(n)) for n in rng.integers(0, 20, count)]
        return strings.reshape(shape)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape).copy()


def commit(store: Store, step: int, arrays: Mapping[str, Array], **how: Any) -> Checkpoint:
    """Make a checkpoint at ``model.ckpt-<step>``, claimed and committed in the log as the newest."""
    prefix = f"model.ckpt-{step}"
    make_checkpoint(store, prefix, arrays, metadata=some_metadata(step), **how)
    nbytes = sum(info.nbytes for info in store.list("") if info.path.startswith(f"{prefix}."))
    made = Checkpoint(step, prefix, f"e1-{step}", 1, 1_700_000_000.0 + step, nbytes, 4, 4)
    put_claim(store, Claim(made.attempt, 1, 1, step, prefix, 4))
    head = read_head(store)
    record(store, [*(head.live if head else ()), made])
    return made


def record(store: Store, live: Sequence[Checkpoint], *, epoch: int = 1, dying: Sequence[Dying] = ()) -> LogRecord:
    """Append a record with these checkpoints to the log."""
    head = read_head(store)
    high_water = max([head.high_water if head else -1, *(checkpoint.step for checkpoint in live)])
    sequence = head.sequence + 1 if head else 1
    made = LogRecord(sequence, "commit", epoch, "test", 5.0, tuple(live), tuple(dying), None, high_water)
    assert append(store, made)[0]
    return made
