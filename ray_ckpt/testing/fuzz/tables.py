"""Indexes of a bundle with lies in them, whose checksums are right all the same."""

from __future__ import annotations

from random import Random
from typing import Any

from google.protobuf.message import DecodeError

from ray_ckpt.bundle import crc32c, mask
from ray_ckpt.bundle.coding import varint
from ray_ckpt.bundle.entry import HEADER_KEY, encode_header, encode_partitioned, encode_piece, piece_key
from ray_ckpt.bundle.schema import BundleEntryProto, BundleHeaderProto
from ray_ckpt.bundle.table import Pair, read_table, write_table
from ray_ckpt.testing.fuzz.hostile import PATHS, mangle, number
from ray_ckpt.types import Box

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_SIGNED = (-1, 0, 1, 2, 4, 254, 2**31 - 1, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))


def mutate_index(rng: Random, raw: bytes, others: list[bytes]) -> bytes:
    """An index that differs in its bytes, in the structure of its blocks, or in what its entries say."""
    kind = rng.randrange(10)
    if rng.random() < 0.002:
        return _many_slices(rng)
    if kind == 0:
        return mangle(rng, raw, others)
    pairs = read_table(raw)
    if kind < 7:
        return write_table(_mutated_pairs(rng, pairs))
    return _blocks(rng, pairs)


def _mutated_pairs(rng: Random, pairs: list[Pair]) -> list[Pair]:
    """Sorted, with unique keys: as a table must be."""
    found = dict(pairs)
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice(list(found))
        kind = rng.randrange(10)
        if kind < 5:
            found[key] = _mutated_message(rng, key, found[key])
        elif kind == 5:
            found[key] = mangle(rng, found[key], list(found.values()))
        elif kind == 6 and len(found) > 1:
            del found[key]
        elif kind == 7:
            found[mangle(rng, key, list(found))] = found[key]
        elif kind == 8:
            found[rng.choice(PATHS).encode("utf-8", "surrogatepass")] = found[key]
        else:
            found[key] = found[rng.choice(list(found))]
    return sorted(found.items())


def _mutated_message(rng: Random, key: bytes, value: bytes) -> bytes:
    message = (BundleHeaderProto if key == HEADER_KEY else BundleEntryProto)()
    try:
        message.ParseFromString(value)
    except DecodeError:
        # Its last mutation was of bytes.
        return mangle(rng, value)
    if key == HEADER_KEY:
        _set(rng, message, rng.choice(("num_shards", "num_shards", "endianness")))
        if rng.random() < 0.3:
            _set(rng, message.version, rng.choice(("producer", "min_consumer")))
        if rng.random() < 0.1:
            message.version.bad_consumers.extend([rng.choice((0, 1, -1))] * rng.choice((1, 5000)))
    else:
        _mutate_entry(rng, message)
    return bytes(message.SerializeToString())


def _mutate_entry(rng: Random, entry: Any) -> None:
    for field in rng.sample(("dtype", "shard_id", "offset", "size", "shape", "slices"), rng.choice((1, 1, 2, 3))):
        if field == "shape":
            _mutate_shape(rng, entry)
        elif field == "slices":
            _mutate_slices(rng, entry)
        elif field == "dtype":
            entry.dtype = rng.choice((0, 1, 3, 7, 7, 14, 20, 21, 21, 29, 34, 101, 127, 128, -1, 2**31 - 1))
        else:
            _set(rng, entry, field)


def _mutate_shape(rng: Random, entry: Any) -> None:
    kind = rng.randrange(4)
    if kind == 0 and entry.shape.dim:
        entry.shape.dim[rng.randrange(len(entry.shape.dim))].size = rng.choice(_SIGNED)
    elif kind == 1:
        for _ in range(rng.choice((1, 8, 260, 20_000))):
            entry.shape.dim.add(size=rng.choice((0, 1, 1, 2, 2**62)))
    elif kind == 2:
        entry.shape.unknown_rank = True
    else:
        del entry.shape.dim[:]


def _mutate_slices(rng: Random, entry: Any) -> None:
    if entry.slices and rng.random() < 0.7:
        listed = rng.choice(entry.slices)
        if listed.extent and rng.random() < 0.8:
            _set(rng, rng.choice(listed.extent), rng.choice(("start", "length")))
        else:
            listed.extent.add(start=rng.choice(_SIGNED))
    else:
        for _ in range(rng.choice((1, 3, 3000))):
            listed = entry.slices.add()
            for _ in range(rng.choice((0, 1, 2, 9, 64))):
                listed.extent.add(start=rng.choice((0, 1, 2)), length=rng.choice((1, 2, 2**40)))


def _set(rng: Random, message: Any, field: str) -> None:
    """An extreme value, as far as the field can hold it."""
    try:
        setattr(message, field, rng.choice(_SIGNED))
    except ValueError:
        setattr(message, field, rng.choice((-1, 0, 1, 2, 2**31 - 1, -(2**31))))


def _many_slices(rng: Random) -> bytes:
    """A small file whose slices would take gigabytes to check, though each is where it should be."""
    rank, count = rng.choice(((8, 12_000), (8, 200), (9, 50), (1, 20_000)))
    shape = (count,) + (2,) * (rank - 1)
    boxes = [Box((i,) + (i % 2,) * (rank - 1), (1,) * rank) for i in range(count)]
    pairs = [(piece_key("x", box, shape), encode_piece("int8", box.shape, 0, i, 1, 0)) for i, box in enumerate(boxes)]
    pairs += [(HEADER_KEY, encode_header(1)), (b"x", encode_partitioned("int8", shape, boxes))]
    return write_table(sorted(pairs))


def _blocks(rng: Random, pairs: list[Pair]) -> bytes:
    """A table built from the ground, so that prefixes, lengths, restarts and handles can lie."""
    per_block = rng.choice((1, 3, len(pairs)))
    file = bytearray()
    handles: list[tuple[bytes, bytes]] = []
    for at in range(0, len(pairs), per_block):
        group = pairs[at : at + per_block]
        handles.append((group[-1][0], _handle(rng, len(file), body := _block(rng, group))))
        file += _sealed(rng, body)
    meta = _block(rng, [])
    meta_handle = _handle(rng, len(file), meta)
    file += _sealed(rng, meta)
    index = _block(rng, handles)
    index_handle = _handle(rng, len(file), index)
    file += _sealed(rng, index)
    return bytes(file) + (meta_handle + index_handle)[:40].ljust(40, b"\0") + _MAGIC


def _block(rng: Random, pairs: list[Pair]) -> bytes:
    parts: list[bytes] = []
    last = b""
    for key, value in pairs:
        shared = 0
        while shared < min(len(key), len(last)) and key[shared] == last[shared]:
            shared += 1
        lengths = [shared, len(key) - shared, len(value)]
        own = key[shared:]
        if rng.random() < 0.05:
            lengths[rng.randrange(3)] = number(rng)
        if rng.random() < 0.01:
            # A small file whose keys would be huge: each takes over all of the last one.
            parts += [varint(0), varint(9), varint(0), b"k" * 9]
            parts += [varint(9), varint(1), varint(0), b"k"] * 2000
        parts += [*map(varint, lengths), own, value]
        last = key
    body = b"".join(parts)
    count = number(rng) & 0xFFFFFFFF if rng.random() < 0.05 else 1
    return body + bytes(4) + count.to_bytes(4, "little")


def _handle(rng: Random, offset: int, body: bytes) -> bytes:
    if rng.random() < 0.05:
        return varint(number(rng)) + varint(number(rng))
    return varint(offset) + varint(len(body))


def _sealed(rng: Random, body: bytes) -> bytes:
    """The block with its type and a checksum that is right."""
    body += bytes((rng.choice((0,) * 40 + (1, 2, 255)),))
    return body + mask(crc32c(body)).to_bytes(4, "little")
