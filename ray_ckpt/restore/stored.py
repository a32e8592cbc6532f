"""A checkpoint that is open for reading: its index and its own description, both verified."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_ckpt.bundle import STRING, Index, StoredTensor, content_crc, decode_strings, index_name, shard_name
from ray_ckpt.errors import DamagedError, UsageError
from ray_ckpt.metadata import Metadata, decode
from ray_ckpt.restore.collector import collector_paused
from ray_ckpt.storage import Reader, Store
from ray_ckpt.types import CHUNK_NBYTES, METADATA_KEY, Checkpoint

logger = logging.getLogger(__name__)

_CRC_NBYTES = 4
_HEAD_THREADS = 16
_NOWHERE = (0, "")

ChunkCrcs = Mapping[tuple[int, int], memoryview]
"""(shard number, offset of a piece) -> uint32 crc32c of each of the piece's chunks."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """One checkpoint's index and metadata; the data is read from ``store`` on demand.

    ``metadata`` is None where plain TensorFlow wrote it. ``chunk_crcs``: see `ChunkCrcs`; a piece that it
    lacks can only be verified as a whole.
    """

    store: Reader
    prefix: str
    index: Index
    metadata: Metadata | None
    chunk_crcs: ChunkCrcs

    @property
    def where(self) -> str:
        """URL of the prefix, for messages."""
        return f"{self.store.url}/{self.prefix}"

    @property
    def names(self) -> list[str]:
        """The names of the tensors, sorted, without the checkpoint's own metadata."""
        return [name for name in self.index.tensors if name != METADATA_KEY]

    def tensor(self, name: str) -> StoredTensor:
        """The tensor of this name.

        Raises:
            UsageError: there is none; names the most similar ones.
        """
        found = self.index.tensors.get(name)
        if found is None:
            similar = difflib.get_close_matches(name, self.names, n=3)
            hint = f"did you mean {', '.join(map(repr, similar))}?" if similar else "see `ray-ckpt show`"
            raise UsageError(f"{self.where} has no tensor {name!r} among its {len(self.names)}: {hint}")
        return found

    def shard_path(self, shard_id: int) -> str:
        """Path of a data shard in the store."""
        return shard_name(self.prefix, shard_id, self.index.num_shards)


def open_checkpoint(store: Store, which: Checkpoint | str) -> StoredCheckpoint:
    """Read and verify the index and the metadata of a checkpoint, given as a log entry or a prefix.

    Raises:
        ObjectMissingError: the index or the metadata's shard is not there (any more): read the log again.
        DamagedError: the index or the metadata fails its checksums, or its step is not the log entry's.
        CheckpointError: a newer version of this package wrote it.
    """
    prefix = which if isinstance(which, str) else which.prefix
    index = open_index(store, prefix)
    metadata = _read_metadata(store, prefix, index)
    # The step of a foreign one is only a guess from its name.
    if isinstance(which, Checkpoint) and metadata and not which.foreign and metadata.step != which.step:
        raise DamagedError(
            f"the log of {store.url} lists step {which.step} at {prefix!r}, but the checkpoint there says that it is"
            f" step {metadata.step}: its files or the log were changed; restore another checkpoint"
        )
    return StoredCheckpoint(store, prefix, index, metadata, chunk_table(index, metadata))


def open_index(store: Store, prefix: str) -> Index:
    """The index alone. Raises as `open_checkpoint` does."""
    path = index_name(prefix)
    raw = store.read(path)
    with collector_paused():
        return Index.parse(raw, f"{store.url}/{path}")


def chunk_table(index: Index, metadata: Metadata | None) -> ChunkCrcs:
    """Where the chunk checksums of each large piece are; a shard's are left out if their number is wrong."""
    if metadata is None or not metadata.chunks:
        return {}
    large: dict[int, set[tuple[int, int]]] = {}
    for tensor in index.tensors.values():
        for piece in tensor.pieces:
            if piece.nbytes > CHUNK_NBYTES and piece.shard_id in metadata.chunks:
                large.setdefault(piece.shard_id, set()).add((piece.offset, piece.nbytes))
    table: dict[tuple[int, int], memoryview] = {}
    for shard_id, extents in large.items():
        crcs = memoryview(metadata.chunks[shard_id])
        counts = [(offset, -(-nbytes // CHUNK_NBYTES)) for offset, nbytes in sorted(extents)]
        if len(crcs) != _CRC_NBYTES * sum(count for _, count in counts):
            logger.warning("shard %d: the chunk checksums do not fit its entries; not used", shard_id)
            continue
        for offset, count in counts:
            table[shard_id, offset] = crcs[: _CRC_NBYTES * count]
            crcs = crcs[_CRC_NBYTES * count :]
    return table


def chunk_crc(crcs: memoryview, chunk: int) -> int:
    """The checksum of one chunk of a piece."""
    return int.from_bytes(crcs[_CRC_NBYTES * chunk : _CRC_NBYTES * (chunk + 1)], "little")


def check_extents(stored: StoredCheckpoint, names: Iterable[str]) -> None:
    """Check that every byte of these tensors is inside its file, before memory is set aside for them.

    Raises:
        ObjectMissingError: a data shard is not there (any more).
        DamagedError: a shard is too short.
    """
    last: dict[int, tuple[int, str]] = {}
    for name in names:
        for piece in stored.tensor(name).pieces:
            stop = piece.offset + piece.nbytes
            if stop > last.get(piece.shard_id, _NOWHERE)[0]:
                last[piece.shard_id] = stop, name
    sizes = shard_sizes(stored, last)
    for shard_id, (stop, name) in last.items():
        if stop > sizes[shard_id]:
            raise too_short(stored, shard_id, name, stop, sizes[shard_id])


def shard_sizes(stored: StoredCheckpoint, shard_ids: Iterable[int]) -> dict[int, int]:
    """Bytes in these shard files. Raises `ObjectMissingError`."""
    ids = list(shard_ids)
    with ThreadPoolExecutor(_HEAD_THREADS, "ray-ckpt-size") as pool:
        return dict(zip(ids, pool.map(lambda i: stored.store.size(stored.shard_path(i)), ids), strict=True))


def too_short(stored: StoredCheckpoint, shard_id: int, name: str, stop: int, found: int) -> DamagedError:
    """The error for a shard file that ends before a tensor's bytes do."""
    return DamagedError(
        f"{stored.shard_path(shard_id)!r} in {stored.store.url} is truncated: tensor {name!r} ends at byte"
        f" {stop}, the file has {found} bytes; restore another checkpoint"
    )


def _read_metadata(store: Store, prefix: str, index: Index) -> Metadata | None:
    tensor = index.tensors.get(METADATA_KEY)
    if tensor is None:
        return None
    where = f"{store.url}/{index_name(prefix)}: tensor {METADATA_KEY!r}"
    if tensor.dtype != STRING or tensor.shape != ():
        raise DamagedError(
            f"{where} should be a scalar string, is {tensor.dtype} of shape {tensor.shape}; restore another checkpoint"
        )
    piece = tensor.pieces[0]
    path = shard_name(prefix, piece.shard_id, index.num_shards)
    if piece.offset + piece.nbytes > store.size(path):
        raise DamagedError(f"{where} ends beyond the end of {path!r}; restore another checkpoint")
    raw = store.read_range(path, piece.offset, piece.nbytes)
    try:
        found = content_crc(STRING, 1, raw)
        if found != piece.crc:
            raise DamagedError(f"crc32c {found:08x}, should be {piece.crc:08x}")
    except DamagedError as error:
        raise DamagedError(f"{where} in {path!r}: {error}; restore another checkpoint") from None
    return decode(decode_strings(raw, 1)[0], f"{store.url}/{prefix}")
