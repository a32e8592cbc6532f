"""What a directory holds, its arrays, and whether they are sound: without Ray and without any framework."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ray_ckpt.bundle import STRING, VARIANT, dtype_of, nbytes_of
from ray_ckpt.errors import (
    DamagedError,
    NoCheckpointError,
    ObjectMissingError,
    StorageError,
    UnavailableError,
    UsageError,
)
from ray_ckpt.log import live_checkpoints, pin, read_last_good
from ray_ckpt.restore import Damage, StoredCheckpoint, check_bytes, check_extents, open_checkpoint, read_boxes
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import METADATA_KEY, Box, Checkpoint

T = TypeVar("T")
Url = str | os.PathLike[str]
Options = Mapping[str, Any]
Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One committed checkpoint of a directory.

    ``prefix`` is relative to the directory, ``time`` in seconds since the epoch, ``bytes`` its size with the
    index. ``superseded``: a later start restored an older step on purpose, so it is never taken by default.
    ``foreign``: plain TensorFlow wrote it; then ``attempt`` is empty, ``generation`` and ``world_size`` are 0.
    """

    step: int
    prefix: str
    time: float
    bytes: int
    num_shards: int
    world_size: int
    generation: int
    attempt: str
    superseded: bool
    foreign: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found in one checkpoint.

    ``tensors`` and ``bytes``: how many its index names, without the checkpoint's own metadata.
    """

    step: int
    prefix: str
    tensors: int
    bytes: int
    seconds_s: float
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """True where every byte is there and matches its checksum."""
        return not self.damage


VerifyProgress = Callable[[CheckpointInfo, int, int], None]
"""Called with the checkpoint that is being verified, the bytes that are done and those it has in all."""


def checkpoints(url: Url, *, storage_options: Options | None = None) -> list[CheckpointInfo]:
    """The committed checkpoints of a directory, newest last; [] if there are none.

    A directory that only plain TensorFlow wrote lists what its `checkpoint` file names.

    Raises:
        UsageError, MissingExtraError: not a URL that can be opened.
        CheckpointError: the log is damaged, or of a newer version.
        StorageError: the storage failed.
    """
    return [_info(checkpoint) for checkpoint in live_checkpoints(open_for_reading(url, storage_options))]


def load(
    url: Url,
    step: int | None = None,
    *,
    names: Iterable[str] | None = None,
    storage_options: Options | None = None,
) -> dict[str, Array]:
    """The tensors of a checkpoint by name: the newest one, or that of ``step``.

    Numbers come in numpy's dtype of the same name (bfloat16 and smaller from ``ml_dtypes``), strings as
    object arrays of bytes, scalars as arrays of shape (). TensorFlow's "variant" tensors (states of iterators) come
    as object arrays of serialized VariantTensorDataProto. ``names`` limits it to these tensors. Every byte is
    verified. If the newest checkpoint is damaged, a warning is logged and the next older one is taken; a
    ``step`` that was asked for is not replaced.

    Raises:
        NoCheckpointError: there is none, or not this step.
        DamagedError: the step asked for is damaged, or all are.
        CheckpointError: a newer version of this package wrote it.
        UsageError: no tensor of that name, or a URL that cannot be opened.
        StorageError: the storage failed.
    """
    wanted = None if names is None else list(names)
    store = open_for_reading(url, storage_options)
    return with_checkpoint(store, step, lambda stored: _arrays(stored, wanted))


def verify(
    url: Url,
    step: int | None = None,
    *,
    storage_options: Options | None = None,
    progress: VerifyProgress | None = None,
) -> list[Report]:
    """Read every byte of all checkpoints, or of one step, and compare the checksums; newest last.

    Damage is reported, not raised. A checkpoint that retention deletes meanwhile is left out.

    Raises:
        NoCheckpointError: there is none, or not this step.
        CheckpointError, StorageError, UsageError: as `checkpoints`.
    """
    store = open_for_reading(url, storage_options)
    reports = (_verify_one(store, checkpoint, progress) for checkpoint in select(store, step))
    return [report for report in reports if report is not None]


def open_for_reading(url: Url, storage_options: Options | None) -> Store:
    """The store of a directory, on any file system: only coordinators need exclusive creation."""
    return open_store(url, storage_options=storage_options, single_coordinator=True)


def select(store: Store, step: int | None) -> list[Checkpoint]:
    """The live checkpoints, newest last: all of them, or the newest one of ``step``.

    Raises:
        NoCheckpointError: there is none, or not this step; says what was found where.
    """
    live = live_checkpoints(store)
    if not live:
        raise NoCheckpointError(f"no checkpoint in {store.url}: {_what_is_there(store)}")
    if step is None:
        return live
    found = [checkpoint for checkpoint in live if checkpoint.step == step]
    if not found:
        there = ", ".join(str(other) for other in sorted({checkpoint.step for checkpoint in live}))
        raise NoCheckpointError(f"step {step} is not in {store.url}, which has {there}")
    return found[-1:]


def with_checkpoint(store: Store, step: int | None, use: Callable[[StoredCheckpoint], T]) -> T:
    """What ``use`` makes of the newest sound checkpoint, or that of ``step``, which is pinned meanwhile.

    A damaged one is warned about and the next older one is taken, unless ``step`` names it.

    Raises:
        NoCheckpointError, DamagedError, CheckpointError, StorageError: as `load`.
    """
    for _ in range(_ROUNDS):
        candidates = [c for c in select(store, step) if step is not None or not c.superseded]
        if not candidates:
            raise NoCheckpointError(
                f"no checkpoint in {store.url} but such as a restart from an older one superseded: name a step"
            )
        result = _first_sound(store, candidates[::-1], step is not None, use)
        if result:
            return result[0]
    raise UnavailableError(
        f"the checkpoints of {store.url} were deleted faster than they could be read, {_ROUNDS} times: let"
        " the job keep more"
    )


def _first_sound(
    store: Store, candidates: Sequence[Checkpoint], strict: bool, use: Callable[[StoredCheckpoint], T]
) -> tuple[T] | None:
    """The result for the first candidate that can be read; None if one was deleted meanwhile."""
    for i, checkpoint in enumerate(candidates):
        try:
            with _pinned(store, checkpoint):
                return (use(open_checkpoint(store, checkpoint)),)
        except ObjectMissingError as error:
            if not _is_live(store, checkpoint):
                return None
            damage = DamagedError(f"a file of step {checkpoint.step} is missing: {error}")
        except DamagedError as error:
            damage = error
        if strict:
            raise damage
        rest = candidates[i + 1 :]
        what = f"step {checkpoint.step} in {store.url} is damaged"
        if not rest:
            raise DamagedError(f"{what}, and no other checkpoint is left: {damage}") from damage
        logger.warning("%s, trying step %d instead: %s", what, rest[0].step, damage)
    return None


def _is_live(store: Store, checkpoint: Checkpoint) -> bool:
    """Whether the log still lists it; its marks may have changed."""
    return any((c.prefix, c.attempt) == (checkpoint.prefix, checkpoint.attempt) for c in live_checkpoints(store))


def _arrays(stored: StoredCheckpoint, names: Sequence[str] | None) -> dict[str, Array]:
    if names is None:
        names = [name for name in stored.names if _has_numpy_form(stored, name)]
    check_extents(stored, names)
    arrays = {name: _allocate(stored, name) for name in names}
    read_boxes(stored, [(name, Box.whole(array.shape), array) for name, array in arrays.items()])
    return arrays


def _has_numpy_form(stored: StoredCheckpoint, name: str) -> bool:
    dtype = stored.tensor(name).dtype
    if dtype in (STRING, VARIANT) or nbytes_of(dtype, 1) is not None:
        return True
    logger.info("%s: tensor %r is left out, numpy has no %s", stored.where, name, dtype)
    return False


def _allocate(stored: StoredCheckpoint, name: str) -> Array:
    tensor = stored.tensor(name)
    dtype = dtype_of(tensor.dtype)
    try:
        return np.empty(tensor.shape, dtype)
    except (MemoryError, ValueError) as error:
        raise UsageError(
            f"{stored.where}: no memory for tensor {name!r}, {dtype.name} of shape {tensor.shape} ({error}):"
            " load fewer tensors by names=, or restore it in slices"
        ) from None


def _verify_one(store: Store, checkpoint: Checkpoint, progress: VerifyProgress | None) -> Report | None:
    info = _info(checkpoint)
    started = time.monotonic()

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(info, done, total)

    with _pinned(store, checkpoint):
        index, damage = check_bytes(store, checkpoint, progress=tell)
    if damage and not _is_live(store, checkpoint):
        return None
    tensors = [] if index is None else [t for t in index.tensors.values() if t.name != METADATA_KEY]
    return Report(
        step=checkpoint.step,
        prefix=checkpoint.prefix,
        tensors=len(tensors),
        bytes=sum(piece.nbytes for tensor in tensors for piece in tensor.pieces),
        seconds_s=time.monotonic() - started,
        damage=tuple(damage),
    )


@contextmanager
def _pinned(store: Store, checkpoint: Checkpoint) -> Iterator[None]:
    """Keep retention away while the block reads; where this user may not write, say so and go on."""
    with ExitStack() as stack:
        if not checkpoint.foreign:
            by = f"pid {os.getpid()} on {socket.gethostname()}"
            try:
                stack.enter_context(pin(store, checkpoint.prefix, by))
            except StorageError as error:
                logger.warning("step %d is read without a pin: %s", checkpoint.step, error)
        yield


def _what_is_there(store: Store) -> str:
    head = read_last_good(store)
    if head is not None:
        return f"its log of {head.sequence} records lists none that is committed"
    found = store.list("")
    if not found:
        return "the directory is empty or does not exist"
    return f"neither a commit log nor TensorFlow's `checkpoint` is among its {len(found)} files"


def _info(checkpoint: Checkpoint) -> CheckpointInfo:
    return CheckpointInfo(
        step=checkpoint.step,
        prefix=checkpoint.prefix,
        time=checkpoint.time,
        bytes=checkpoint.nbytes,
        num_shards=checkpoint.num_shards,
        world_size=checkpoint.world_size,
        generation=checkpoint.generation,
        attempt=checkpoint.attempt,
        superseded=checkpoint.superseded,
        foreign=checkpoint.foreign,
    )
