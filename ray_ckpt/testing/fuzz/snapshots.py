"""Segments whose headers and tables lie, under a digest that is right, and layouts beside them."""

from __future__ import annotations

import contextlib
from hashlib import blake2b
from pathlib import Path
from random import Random

from ray_ckpt.errors import RayCkptError
from ray_ckpt.snapshot import Segment
from ray_ckpt.snapshot.layouts import read_layouts
from ray_ckpt.snapshot.segment import HEADER_NBYTES
from ray_ckpt.storage import open_store
from ray_ckpt.testing.fuzz.hostile import edit_json, mangle, number
from ray_ckpt.writer import write_shard

_WORDS = 13
_TABLE_NBYTES_AT = 32
_DIGEST = slice(72, 88)
_SAVE_AT, _TRIES_AT = 104, 4096


def make_segment(rng: Random, raw: bytes) -> bytes:
    """A segment with another header, save id or table."""
    kind = rng.randrange(8)
    if kind == 0:
        return mangle(rng, raw)
    data = bytearray(raw)
    if kind == 1:
        at = 8 * rng.randrange(_WORDS)
        data[at : at + 8] = number(rng).to_bytes(8, "little")
    elif kind == 2:
        save = bytes(data[_SAVE_AT:].partition(b"}")[0] + b"}")
        text = edit_json(rng, save)[: _TRIES_AT - _SAVE_AT]
        data[_SAVE_AT : _SAVE_AT + len(text)] = text
        data[40:48] = len(text).to_bytes(8, "little")
    elif kind == 3:
        at = rng.randrange(_TRIES_AT, HEADER_NBYTES, 8)
        data[at : at + 8] = number(rng).to_bytes(8, "little")
    else:
        _replace_table(rng, data)
    return bytes(data)


def _replace_table(rng: Random, data: bytearray) -> None:
    nbytes = int.from_bytes(data[_TABLE_NBYTES_AT : _TABLE_NBYTES_AT + 8], "little")
    table = bytes(data[-nbytes:])
    head, _, entries = table.partition(b"\n")
    if rng.random() < 0.2:
        made = mangle(rng, table)
    elif rng.random() < 0.5:
        made = head + b"\n" + edit_json(rng, entries)
    else:
        made = edit_json(rng, head) + b"\n" + entries
    data[-nbytes:] = made
    data[_TABLE_NBYTES_AT : _TABLE_NBYTES_AT + 8] = len(made).to_bytes(8, "little")
    data[_DIGEST] = blake2b(made, digest_size=16).digest()


def make_layout(rng: Random, raw: bytes) -> bytes:
    """A layout that is another."""
    return mangle(rng, raw) if rng.random() < 0.3 else edit_json(rng, raw)


def read_snapshots(folder: Path) -> None:
    """As agents and writers do: what one file says does not keep the next from being read."""
    read_layouts(folder)
    for path in sorted(folder.glob("*.segment")):
        with contextlib.suppress(RayCkptError), Segment.open(path, writable=True) as segment:
            str((segment.state, segment.save, segment.fills, segment.sealed_at))
            segment.empty_if_abandoned()
            for read in (segment.digests, segment.table, lambda s=segment: s.next_try(0, 1)):
                with contextlib.suppress(RayCkptError):
                    read()
            _write(path, segment)


def _write(path: Path, segment: Segment) -> None:
    save = segment.table().save
    write_shard(
        path,
        generation=save.generation,
        step=save.step,
        plan_id=save.plan_id,
        writer=0,
        store=open_store("memory://fuzz/shards"),
        prefix="model.ckpt-5",
        shard_id=0,
        num_shards=2,
        attempt="e1-1",
        attempt_try=0,
    )
