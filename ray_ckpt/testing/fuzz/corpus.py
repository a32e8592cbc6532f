"""Real files to start from: two checkpoints of ours, one of plain TensorFlow's form, and a sealed snapshot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ray_ckpt.bundle import (
    VARIANT,
    dtype_name,
    encode_objects,
    encode_partitioned,
    encode_piece,
    encode_run,
    encode_state_file,
    index_name,
    merge_index,
    piece_key,
    shard_name,
)
from ray_ckpt.bundle.crc import crc32c
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.log.codec import encode_claim, encode_record
from ray_ckpt.log.records import record_path
from ray_ckpt.metadata import Metadata, RankTree, WriterNote, encode
from ray_ckpt.plan import make_plan
from ray_ckpt.snapshot import SaveId, Segment, needed_nbytes, take_snapshot
from ray_ckpt.snapshot.layouts import keep_layout
from ray_ckpt.tree import flatten
from ray_ckpt.types import CHUNK_NBYTES, METADATA_KEY, PRIVATE_DIR, Box, Checkpoint, Claim, Dying, Generation, LogRecord

Files = dict[str, bytes]
_SHARDS = 3


def state() -> dict[str, Any]:
    """A state with leaves of many kinds, some nested."""
    return {
        "w": np.arange(48, dtype=np.float32).reshape(8, 6),
        "names": np.array([b"a", b"", b"longer"], object),
        "flags": np.array([True, False]),
        "opt": {"m": [np.zeros((2, 0), np.int16), np.float64(2.5)], "count": 7, "label": "text", "raw": b"\0\1"},
    }


@cache
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """The same as tensors by name, and one that is larger than a chunk of checksums."""
    return {
        **{name: np.asarray(value, object if isinstance(value, str | bytes) else None) for name, value in _leaves()},
        "large": np.zeros(CHUNK_NBYTES // 4 + 100, np.int32),
    }


def _leaves() -> Sequence[tuple[str, Any]]:
    return flatten(state()).leaves


def metadata(step: int, chunks: Mapping[int, bytes]) -> bytes:
    """What the checkpoint says of itself."""
    kinds = {"opt/count": "int", "opt/label": "str", "opt/raw": "bytes", "opt/m/1": "numpy:scalar"}
    trees = (RankTree((0, 1), flatten(state()).tree),)
    writers = (WriterNote(0, "host-a", 1000, 0.5), WriterNote(1, "host-b", 2000, 0.25))
    return encode(Metadata(step, f"e1-{step}", 1, 2, 1.7e9 + step, trees, kinds, chunks, writers))


class _Shards:
    """Data shards and their entries while they grow."""

    def __init__(self) -> None:
        self.data = [bytearray() for _ in range(_SHARDS)]
        self.chunks: dict[int, bytes] = {}
        self.items: list[tuple[bytes, bytes]] = []

    def add(self, shard: int, name: str, dtype: str, box: Box, shape: tuple[int, ...], part: Any) -> None:
        """Append one box of a tensor."""
        if dtype in ("string", VARIANT):
            raw, crc = encode_objects(dtype, part, box.shape)
        else:
            raw = part.tobytes()
            crc = crc32c(raw)
        data = self.data[shard]
        self.items.append(
            (piece_key(name, box, shape), encode_piece(dtype, box.shape, shard, len(data), len(raw), crc))
        )
        data += raw
        if len(raw) > CHUNK_NBYTES:
            crcs = [crc32c(raw[at : at + CHUNK_NBYTES]) for at in range(0, len(raw), CHUNK_NBYTES)]
            self.chunks[shard] = b"".join(crc.to_bytes(4, "little") for crc in crcs)

    def files(self, prefix: str) -> Files:
        """The shards and their index."""
        found = {shard_name(prefix, i, _SHARDS): bytes(data) for i, data in enumerate(self.data)}
        return {**found, index_name(prefix): merge_index([encode_run(sorted(self.items))], _SHARDS)}


def bundle(prefix: str, step: int | None, *, large: bool = False, described: bytes | None = None) -> Files:
    """The files of one checkpoint; without a step as plain TensorFlow would leave them.

    ``described``: what it says of itself in place of its `metadata`.
    """
    shards = _Shards()
    for number, (name, array) in enumerate(arrays().items()):
        if name == "large" and not large:
            continue
        dtype, shape = dtype_name(array.dtype), array.shape
        boxes = [Box((at, 0), (2, 6)) for at in range(0, 8, 2)] if name == "w" else [Box.whole(shape)]
        for at, box in enumerate(boxes):
            shards.add((number + at) % 2, name, dtype, box, shape, array[box.slices] if shape else array)
        if len(boxes) > 1:
            shards.items.append((name.encode(), encode_partitioned(dtype, shape, boxes)))
    shards.add(1, "iterator", VARIANT, Box((0,), (2,)), (2,), [b"one", b"two"])
    if step is not None:
        shards.add(2, METADATA_KEY, "string", Box.whole(()), (), [described or metadata(step, shards.chunks)])
    return shards.files(prefix)


def checkpoint(step: int, prefix: str, **marks: Any) -> Checkpoint:
    """An entry of the log."""
    return Checkpoint(step, prefix, f"e1-{step}", 1, 1.7e9 + step, 5000, _SHARDS, 2, **marks)


def record(sequence: int) -> LogRecord:
    """A record that lists two checkpoints, and one that is being removed."""
    live = (checkpoint(500, "model.ckpt-500"), checkpoint(600, "e1-600/model.ckpt-600"))
    dying = (Dying(checkpoint(400, "model.ckpt-400", preserved=True), 1.7e9),)
    return LogRecord(sequence, "commit", 1, "host:1:2", 1.7e9, live, dying, Generation(1, 2, 500), 600, "e1-600", 600)


def claim(step: int, prefix: str) -> Claim:
    """The claim of an attempt."""
    return Claim(f"e1-{step}", 1, 1, step, prefix, _SHARDS)


@cache
def directory(kind: str) -> Files:
    """A whole directory: "ours", "large" (with one tensor of several chunks) or "foreign"."""
    if kind == "foreign":
        state_file = encode_state_file("model.ckpt-7", ["model.ckpt-3", "model.ckpt-7"], [1.0, 2.0])
        return {"checkpoint": state_file, **bundle("model.ckpt-3", None), **bundle("model.ckpt-7", None)}
    timeline = {"step": 500, "generation": 1, "attempt": "e1-500", "prefix": "model.ckpt-500", "opened": 1.0}
    span = {"rank": 0, "due": 1.0, "sealed": 2.0, "trigger": "steps"}
    shard = {"writer": 0, "rank": 0, "host": "a", "try": 0, "nbytes": 9, "began": 1.0, "seconds": 0.5}
    timeline |= {"committed": 2.0, "snapshots": [span], "shards": [shard]}
    live = record(2).live
    return {
        **bundle("model.ckpt-500", 500, large=kind == "large"),
        **bundle("e1-600/model.ckpt-600", 600),
        "checkpoint": encode_state_file(live[-1].prefix, [c.prefix for c in live], [c.time for c in live]),
        "model.ckpt-700.data-00000-of-00003": b"orphan",
        record_path(1): encode_record(record(1)),
        record_path(2): encode_record(record(2)),
        f"{PRIVATE_DIR}/claims/model.ckpt-500": encode_claim(claim(500, "model.ckpt-500")),
        f"{PRIVATE_DIR}/claims/e1-600%2Fmodel.ckpt-600": encode_claim(claim(600, "e1-600/model.ckpt-600")),
        f"{PRIVATE_DIR}/pins/model.ckpt-500.{'0' * 32}": pin(),
        f"{PRIVATE_DIR}/events/e1-500.json": json.dumps(timeline).encode(),
    }


def pin() -> bytes:
    """A reader's pin that has not expired for a long time."""
    return json.dumps({"prefix": "model.ckpt-500", "by": "pid 1 on a", "expires": 4e9}).encode()


def snapshot(folder: Path) -> Path:
    """A sealed segment with its layout beside it."""
    layout, values = layout_of(state(), 0, 1)
    plan = make_plan([layout])
    path = folder / "00000-0.segment"
    save = SaveId("run", 2, 5, 0, 1, plan.plan_id, "steps", layout.fingerprint, 1, 0, 1, 1.7e9)
    with Segment.create(path, needed_nbytes(plan.ranks[0], layout, values)) as segment:
        take_snapshot(segment, plan.ranks[0], layout, values, save)
    keep_layout(folder, layout)
    return path
