"""Reading every byte of a checkpoint only to verify it, and listing all that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ckpt.bundle import Index, StoredTensor, combine, index_name, nbytes_of
from ray_ckpt.errors import CheckpointError, DamagedError, ObjectMissingError
from ray_ckpt.restore.engine import DEFAULT_BUDGET_NBYTES, DEFAULT_THREADS, Progress, run_jobs
from ray_ckpt.restore.jobs import PieceJob
from ray_ckpt.restore.stored import StoredCheckpoint, chunk_crc, open_checkpoint, open_index, too_short
from ray_ckpt.storage import Store
from ray_ckpt.types import CHUNK_NBYTES, METADATA_KEY, Checkpoint


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: the file, the tensor it concerns ("" for a whole file) and what was found."""

    path: str
    tensor: str
    text: str


def check_bytes(
    store: Store,
    which: Checkpoint | str,
    *,
    threads: int = DEFAULT_THREADS,
    budget_nbytes: int = DEFAULT_BUDGET_NBYTES,
    progress: Progress | None = None,
) -> tuple[Index | None, list[Damage]]:
    """The index of a checkpoint, or None if it cannot be read, and all damage to any byte that it names.

    Given as a log entry or a prefix; what a log entry says must agree with the checkpoint's own metadata.

    Raises:
        StorageError: the storage failed, so that nothing is known.
    """
    prefix = which if isinstance(which, str) else which.prefix
    path = index_name(prefix)
    try:
        index = open_index(store, prefix)
    except ObjectMissingError:
        return None, [Damage(path, "", f"{path!r} in {store.url} is missing")]
    except DamagedError as error:
        return None, [Damage(path, "", str(error))]
    stored = StoredCheckpoint(store, prefix, index, None, {})
    found: list[Damage] = []
    sizes = _sizes(stored, found)
    jobs = list(_readable(stored, sizes, found))

    def note(job: PieceJob, error: DamagedError) -> None:
        found.append(Damage(stored.shard_path(job.piece.shard_id), job.name, str(error)))

    run_jobs(stored, jobs, threads, budget_nbytes, progress, note)
    if not any(damage.tensor in ("", METADATA_KEY) for damage in found):
        found += _check_metadata(store, which)
    return index, sorted(found, key=lambda damage: (damage.path, damage.tensor))


def _sizes(stored: StoredCheckpoint, found: list[Damage]) -> dict[int, int]:
    """Sizes of the data shards that the index names and that are there."""
    tensors: dict[int, set[str]] = {}
    for tensor in stored.index.tensors.values():
        for piece in tensor.pieces:
            tensors.setdefault(piece.shard_id, set()).add(tensor.name)
    sizes = {}
    url = stored.store.url
    for shard_id, names in sorted(tensors.items()):
        path = stored.shard_path(shard_id)
        try:
            sizes[shard_id] = stored.store.size(path)
        except ObjectMissingError:
            text = f"{path!r} in {url} is missing; it holds {len(names)} tensors ({min(names)!r} ...)"
            found.append(Damage(path, "", text))
    return sizes


def _readable(stored: StoredCheckpoint, sizes: dict[int, int], found: list[Damage]) -> Iterator[PieceJob]:
    """The pieces that are inside a file that is there."""
    for tensor in stored.index.tensors.values():
        for piece in tensor.pieces:
            size, stop = sizes.get(piece.shard_id), piece.offset + piece.nbytes
            if size is not None and stop > size:
                text = str(too_short(stored, piece.shard_id, tensor.name, stop, size))
                found.append(Damage(stored.shard_path(piece.shard_id), tensor.name, text))
            elif size is not None:
                yield PieceJob(tensor.name, tensor.dtype, piece)


def _check_metadata(store: Store, which: Checkpoint | str) -> Iterator[Damage]:
    """The checkpoint's own description: readable, and in agreement with the log and the index."""
    path = index_name(which if isinstance(which, str) else which.prefix)
    try:
        stored = open_checkpoint(store, which)
    except DamagedError as error:
        yield Damage(path, METADATA_KEY, str(error))
        return
    except CheckpointError:
        # A newer format: its bytes are sound, and what they mean is not ours to judge.
        return
    for tensor in stored.index.tensors.values():
        yield from _check_chunks(stored, tensor)


def _check_chunks(stored: StoredCheckpoint, tensor: StoredTensor) -> Iterator[Damage]:
    if nbytes_of(tensor.dtype, 1) is None:
        # The crc of a string tensor's entry covers other bytes than the stored ones.
        return
    for piece in tensor.pieces:
        crcs = stored.chunk_crcs.get((piece.shard_id, piece.offset))
        if crcs is None:
            continue
        total = 0
        for chunk, at in enumerate(range(0, piece.nbytes, CHUNK_NBYTES)):
            length = min(CHUNK_NBYTES, piece.nbytes - at)
            total = combine(total, chunk_crc(crcs, chunk), length)
        if total != piece.crc:
            text = f"tensor {tensor.name!r}: the checksums of its chunks do not add up to that of the whole"
            yield Damage(stored.shard_path(piece.shard_id), tensor.name, text)
