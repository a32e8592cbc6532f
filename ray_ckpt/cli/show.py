"""``ray-ckpt show``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ckpt.bundle import StoredTensor
from ray_ckpt.catalog import open_for_reading, select
from ray_ckpt.cli.options import Json, Step, StorageOptions, Url, parse_storage_options
from ray_ckpt.cli.output import moment, print_json, print_table, shape_text, size, stdout
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.types import Box, Checkpoint

_MAX_SLICES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class _Shard:
    """One data shard: what the index names in it, and who wrote it, where the metadata says so."""

    shard_id: int
    path: str
    bytes: int
    tensors: int
    host: str | None
    seconds: float | None


def show(
    url: Url,
    step: Step = None,
    as_json: Json = False,
    storage_option: StorageOptions = None,
) -> None:
    """Show a checkpoint (default: the newest): tensors with dtypes, shapes and slices, shards and writers."""
    store = open_for_reading(url, parse_storage_options(storage_option))
    found = select(store, step)
    checkpoint = ([c for c in found if not c.superseded] or found)[-1]
    stored = open_checkpoint(store, checkpoint)
    tensors = [stored.tensor(name) for name in stored.names]
    shards = list(_shards(stored))
    if as_json:
        print_json(_document(stored, checkpoint, tensors, shards))
        return
    _print_head(stored, checkpoint)
    columns = ("tensor", "dtype", "shape", ">size", "slices", "shards")
    print_table("tensors", columns, map(_tensor_row, tensors))
    columns = (">shard", ">size", ">tensors", "host", ">seconds", "file")
    print_table("shards", columns, map(_shard_row, shards))


def _shards(stored: StoredCheckpoint) -> Iterator[_Shard]:
    nbytes: dict[int, int] = {}
    names: dict[int, set[str]] = {}
    for tensor in stored.index.tensors.values():
        for piece in tensor.pieces:
            nbytes[piece.shard_id] = nbytes.get(piece.shard_id, 0) + piece.nbytes
            names.setdefault(piece.shard_id, set()).add(tensor.name)
    notes = {note.shard_id: note for note in stored.metadata.writers} if stored.metadata else {}
    for shard_id in sorted(nbytes):
        note = notes.get(shard_id)
        yield _Shard(
            shard_id,
            stored.shard_path(shard_id),
            nbytes[shard_id],
            len(names[shard_id]),
            note.host if note else None,
            note.seconds_s if note else None,
        )


def _nbytes(tensor: StoredTensor) -> int:
    return sum(piece.nbytes for piece in tensor.pieces)


def _document(
    stored: StoredCheckpoint, checkpoint: Checkpoint, tensors: list[StoredTensor], shards: list[_Shard]
) -> dict[str, object]:
    metadata = stored.metadata
    return {
        "url": stored.store.url,
        "step": checkpoint.step,
        "prefix": checkpoint.prefix,
        "time": checkpoint.time,
        "bytes": checkpoint.nbytes,
        "world_size": checkpoint.world_size,
        "generation": checkpoint.generation,
        "attempt": checkpoint.attempt,
        "superseded": checkpoint.superseded,
        "foreign": checkpoint.foreign,
        "format_version": metadata.format_version if metadata else None,
        "num_shards": stored.index.num_shards,
        "tensors": [_tensor_document(stored, tensor) for tensor in tensors],
        "shards": shards,
    }


def _tensor_document(stored: StoredCheckpoint, tensor: StoredTensor) -> dict[str, object]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "bytes": _nbytes(tensor),
        "kind": stored.metadata.kind(tensor.name) if stored.metadata else None,
        "slices": [
            {
                "offset": piece.box.offset,
                "shape": piece.box.shape,
                "shard_id": piece.shard_id,
                "bytes": piece.nbytes,
            }
            for piece in tensor.pieces
        ],
    }


def _print_head(stored: StoredCheckpoint, checkpoint: Checkpoint) -> None:
    lines = [
        f"step {checkpoint.step}, {moment(checkpoint.time)}, {size(checkpoint.nbytes)} at {stored.where}",
        f"{len(stored.names)} tensors; at most {stored.index.num_shards} shards",
    ]
    if stored.metadata is None:
        lines.append("written by TensorFlow")
    else:
        meta = stored.metadata
        lines.append(
            f"{meta.world_size} ranks, generation {meta.generation}, attempt {meta.attempt},"
            f" format version {meta.format_version}"
        )
    if checkpoint.superseded:
        lines.append("superseded: the job was restarted from an older step since")
    stdout().print("\n".join(lines), markup=False)


def _tensor_row(tensor: StoredTensor) -> tuple[object, ...]:
    boxes = [piece.box for piece in tensor.pieces]
    shards = sorted({piece.shard_id for piece in tensor.pieces})
    return (
        tensor.name,
        tensor.dtype,
        shape_text(tensor.shape),
        size(_nbytes(tensor)),
        _slices_text(boxes) if len(boxes) > 1 else "",
        ", ".join(map(str, shards)),
    )


def _slices_text(boxes: list[Box]) -> str:
    shown = [
        "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(box.offset, box.shape, strict=True)) + "]"
        for box in boxes[:_MAX_SLICES_SHOWN]
    ]
    more = len(boxes) - len(shown)
    return f"{len(boxes)}: " + " ".join(shown) + (f" and {more} more" if more else "")


def _shard_row(shard: _Shard) -> tuple[object, ...]:
    seconds = "" if shard.seconds is None else f"{shard.seconds:.2f}"
    return shard.shard_id, size(shard.bytes), shard.tensors, shard.host or "", seconds, shard.path
