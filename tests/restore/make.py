"""Checkpoints made straight from the bundle codec: no planner, writer or coordinator takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from ray_ckpt.metadata import Metadata, RankTree, WriterNote, encode
from ray_ckpt.storage import Store
from ray_ckpt.types import METADATA_KEY, Box

CHUNK_NBYTES = 4 << 20

Array = np.ndarray[Any, Any]


@dataclass
class Shards:
    """The bytes of the data shards while they grow, and the entries and chunk checksums for them."""

    count: int
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
        if len(raw) > CHUNK_NBYTES:
            for at in range(0, len(raw), CHUNK_NBYTES):
                crc = google_crc32c.value(bytes(raw[at : at + CHUNK_NBYTES]))
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
) -> None:
    """Write a checkpoint: pieces go round the first shards, metadata (if any) to the last.

    ``cuts``: the boxes of the tensors that are stored in slices. ``chunks``: whether the metadata has the
    checksums of chunks.
    """
    shards = Shards(num_shards)
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
            Box((*box.offset, start), (*box.shape, stop - start))
            for box in boxes
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
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
