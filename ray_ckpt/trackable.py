"""`tf.train.Checkpoint` objects: what TensorFlow itself would save of one, and having TensorFlow restore it.

The object graph is walked by TensorFlow's own code (``TrackableSaver`` in tensorflow/python/checkpoint/checkpoint.py),
so keys, values and the graph's description are those of `tf.train.Checkpoint.write`. Restoring is not pluggable
there: TensorFlow reads the files, which are verified before, from the checkpoint's directory or a local copy.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray_ckpt.bundle import index_name
from ray_ckpt.bundle.coding import read_varint
from ray_ckpt.bundle.slice_spec import parse_slice_spec
from ray_ckpt.errors import DamagedError, MismatchError, StateError, StorageError
from ray_ckpt.leaves import Slice, Slices, Variants
from ray_ckpt.restore import StoredCheckpoint, check_bytes
from ray_ckpt.storage import Store, open_store
from ray_ckpt.tree import Named

logger = logging.getLogger(__name__)

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_COUNTER = "save_counter/.ATTRIBUTES/VARIABLE_VALUE"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_PLAIN_VARIABLES = "tensorflow.python.ops.resource_variable_ops"
"""The module of the class of variables that are one array on one device."""

_COPY_THREADS = 8
_COPY_NBYTES = 64 << 20


def is_trackable(state: Any) -> bool:
    """True for a `tf.train.Checkpoint`, and for other roots of TensorFlow's objects, which `gather` refuses."""
    tf = sys.modules.get("tensorflow")
    # Both are missing while another thread is still importing TensorFlow.
    tracking = getattr(getattr(tf, "__internal__", None), "tracking", None)
    root = getattr(tracking, "AutoTrackable", None) or getattr(tf, "Module", None)
    return root is not None and isinstance(state, root)


def check_kind(value: Any) -> None:
    """Raise `StateError` for what is not a `tf.train.Checkpoint` itself."""
    tf = _tensorflow()
    if not isinstance(value, (tf.train.Checkpoint, tf.compat.v1.train.Checkpoint)):
        kind = type(value)
        raise StateError(
            f"a {kind.__module__}.{kind.__qualname__} is saved inside a checkpoint: make"
            " tf.train.Checkpoint(model=...) once, and pass that"
        )


def gather(checkpoint: Any, rank: int) -> Named:
    """What TensorFlow would save of a `tf.train.Checkpoint`, by key: variables, tensors, `Slices`, `Variants`.

    Variables are passed on as they are, so that only what this rank is to write is read. Those with floating-point
    values are replicas: every rank has them. All else (counters, seeds, tables, iterators, strings)
    may differ between workers and is rank 0's, as with TensorFlow's own chief. Its ``save_counter`` is made if it is
    not there yet. Every rank must call this at the same step: reading a variable that a strategy sums over
    workers is a collective operation.

    Raises:
        StateError: not a `tf.train.Checkpoint`, not executing eagerly, an object that cannot be saved, or a version of
            TensorFlow with another inside.
    """
    check_kind(checkpoint)
    tf = _tensorflow()
    if not tf.executing_eagerly():
        raise StateError(
            "a tf.train.Checkpoint is saved while TensorFlow executes eagerly: call this outside of tf.function; for"
            " sessions there is ray_ckpt.CheckpointSaverHook"
        )
    # A restore by TensorFlow expects it.
    _ = checkpoint.save_counter
    state = Named()
    for trackable, tensors in _serialized(tf, checkpoint).items():
        for key, value in tensors.items():
            leaf = _leaf(tf, key, trackable, value)
            if leaf is not None and (rank == 0 or _is_replica(key, leaf)):
                state[key] = leaf
    return state


def reader(checkpoint: Any, *, partial: bool) -> Callable[[StoredCheckpoint], Callable[[], Any]]:
    """What reads and verifies a stored checkpoint; what that gives has TensorFlow restore ``checkpoint``.

    All bytes are verified before a value is assigned. TensorFlow restores variables that do not exist yet when they
    are made; a local copy is kept for as long as it waits for any. On a file system TensorFlow reads the files where
    they are. ``partial``: objects that the checkpoint lacks keep their values.

    Raises:
        StateError: not a `tf.train.Checkpoint`.
        DamagedError: bytes are missing or fail their checksum.
        MismatchError: when built: an object has nothing in the checkpoint, or a value of another shape or dtype.
        StorageError: the storage failed, or there is no room for a copy.
    """
    check_kind(checkpoint)

    def read(stored: StoredCheckpoint) -> Callable[[], Any]:
        files = _Files.of(stored)
        return lambda: _restore(checkpoint, stored, files, partial)

    return read


# -- saving -------------------------------------------------------------------------------------------------------


def _tensorflow() -> Any:
    import tensorflow as tf

    return tf


def _serialized(tf: Any, checkpoint: Any) -> Mapping[Any, Mapping[str, Any]]:
    """{object: {key: tensor, or what gives one, or {slice spec: such}}}, from TensorFlow's saver.

    Raises:
        StateError: an object cannot be saved, or brings a saver of its own, or this TensorFlow has no such saver.
    """
    serialize = getattr(getattr(checkpoint, "_saver", None), "_gather_serialized_tensors", None)
    if serialize is None:
        raise _unknown_version(tf)
    try:
        found = serialize()
    except (tf.errors.OpError, NotImplementedError) as error:
        raise StateError(f"TensorFlow cannot save an object of this tf.train.Checkpoint: {error}") from error
    if not isinstance(found, tuple) or len(found) != 4:
        raise _unknown_version(tf)
    tensors, _, registered, _ = found
    if registered:
        own = sorted({type(x).__qualname__ for objects in registered.values() for x in objects.values()})
        raise StateError(
            f"{', '.join(own)} in this tf.train.Checkpoint has a saver of its own"
            f" ({', '.join(sorted(registered))}), which writes files itself: leave it out, or save its variables"
        )
    result: Mapping[Any, Mapping[str, Any]] = tensors
    return result


def _unknown_version(tf: Any) -> StateError:
    return StateError(
        f"TensorFlow {tf.__version__} serializes a tf.train.Checkpoint in a way that is not known here (it is for 2.18"
        " to 2.21): use one of these, or pass a dict of its variables"
    )


def _leaf(tf: Any, key: str, trackable: Any, value: Any) -> Any:
    """What is saved as ``key``; None for a variable without a value."""
    if isinstance(value, dict):
        return _slices(tf, key, value)
    variable = _plain_variable(tf, trackable) if key.endswith(_VALUE) else None
    return _tensor(tf, key, value) if variable is None else variable


def _plain_variable(tf: Any, trackable: Any) -> Any:
    """The variable itself, if reading it gives just what is saved: it is one array on one device."""
    keras_variable: Any = getattr(sys.modules.get("keras"), "Variable", ())
    found = trackable.value if isinstance(trackable, keras_variable) else trackable
    is_plain = isinstance(found, tf.Variable) and type(found).__module__ == _PLAIN_VARIABLES
    return found if is_plain and found.is_initialized() else None


def _tensor(tf: Any, key: str, value: Any) -> Any:
    """The tensor that a value stands for; a variant one as `Variants`, None where there is none."""
    tensor = value.tensor if hasattr(value, "slice_spec") else value
    if tensor is None:
        return None
    # Variables of a strategy give the value that it saves for all of its replicas.
    tensor = tf.convert_to_tensor(tensor)
    return _variants(tf, key, tensor) if tensor.dtype == tf.variant else tensor


def _variants(tf: Any, key: str, tensor: Any) -> Variants:
    """A variant tensor's elements, as TensorFlow writes them.

    Raises:
        StateError: one of them cannot be serialized.
    """
    from tensorflow.core.framework import tensor_pb2

    try:
        raw = tf.io.serialize_tensor(tensor).numpy()
    except tf.errors.OpError as error:
        raise StateError(f"{key}: TensorFlow cannot serialize it: {error}") from error
    shape = tuple(tensor.shape.as_list())
    packed = tensor_pb2.TensorProto.FromString(raw).tensor_content
    return Variants(_unpacked(packed, tensor.shape.num_elements()), shape)


def _unpacked(raw: bytes, count: int) -> list[bytes]:
    """The strings of ``count`` varint lengths and then the bytes (``port::EncodeStringList`` of TensorFlow)."""
    lengths, position = [], 0
    for _ in range(count):
        length, position = read_varint(raw, position)
        lengths.append(length)
    found = []
    for length in lengths:
        found.append(raw[position : position + length])
        position += length
    return found


def _slices(tf: Any, key: str, parts: Mapping[str, Any]) -> Any:
    """One variable's parts by slice spec, as a sharded variable gives them."""
    if list(parts) == [""]:
        return _tensor(tf, key, parts[""])
    found = []
    for spec, value in parts.items():
        shape, box = parse_slice_spec(spec.strip())
        found.append(Slice(_tensor(tf, key, value), shape, box.offset))
    return Slices(tuple(found))


def _is_replica(key: str, leaf: Any) -> bool:
    """Whether every worker has the same: the floating-point values of variables."""
    if isinstance(leaf, Slices):
        leaf = leaf.parts[0].array
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and key.endswith(_VALUE) and (dtype.is_floating or dtype.is_complex)


# -- restoring ----------------------------------------------------------------------------------------------------


class _Files:
    """A checkpoint's verified files below a folder that TensorFlow can open; a copy goes with this object."""

    def __init__(self, folder: str, prefix: str, *, is_copy: bool) -> None:
        self.path = f"{folder}/{prefix}"
        if is_copy:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def of(cls, stored: StoredCheckpoint) -> _Files:
        """Those of a file system as they are; a copy of any other store's.

        Also where TensorFlow has a file system of its own, which knows nothing of the store's credentials and options.
        """
        assert isinstance(stored.store, Store), "what TensorFlow reads itself lies in a store"
        if stored.store.url.startswith("file://"):
            _verify(stored.store, stored.prefix)
            return cls(stored.store.url.removeprefix("file://"), stored.prefix, is_copy=False)
        folder = tempfile.mkdtemp(prefix="ray-ckpt-restore-")
        files = cls(folder, stored.prefix, is_copy=True)
        _copy(stored, Path(folder))
        _verify(open_store(folder, single_coordinator=True), stored.prefix)
        return files


_KEPT: weakref.WeakKeyDictionary[Any, _Files] = weakref.WeakKeyDictionary()
"""The files that TensorFlow's restores, which know what is still waited for, may read."""


def _verify(store: Store, prefix: str) -> None:
    """Raise `DamagedError` unless every byte of the checkpoint is there and right."""
    _, damage = check_bytes(store, prefix)
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise DamagedError(f"{store.url}/{prefix} is damaged: {damage[0].text}{more}")


def _copy(stored: StoredCheckpoint, folder: Path) -> None:
    """Copy the files that the index names, in pieces of a bounded size.

    Raises:
        ObjectMissingError, StorageError: the storage failed, or there is no room.
    """
    store = stored.store
    shards = {piece.shard_id for tensor in stored.index.tensors.values() for piece in tensor.pieces}
    paths = [index_name(stored.prefix), *map(stored.shard_path, sorted(shards))]

    def fetch(path: str) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        size = store.size(path)
        with target.open("wb") as file:
            for start in range(0, size, _COPY_NBYTES):
                file.write(store.read_range(path, start, min(_COPY_NBYTES, size - start)))

    try:
        with ThreadPoolExecutor(_COPY_THREADS, "ray-ckpt-copy") as pool:
            list(pool.map(fetch, paths))
    except OSError as error:
        raise StorageError(
            f"TensorFlow needs a local copy of {stored.where}, which cannot be made in {folder}: {error}; point TMPDIR"
            " to a folder with room for it"
        ) from error


def _restore(checkpoint: Any, stored: StoredCheckpoint, files: _Files, partial: bool) -> Any:
    """Have TensorFlow restore the objects from verified files; gives ``checkpoint``."""
    tf = _tensorflow()
    names = stored.index.tensors
    # What `tf.train.Checkpoint.write` wrote has no counter, which `restore` would miss.
    is_bare = _GRAPH in names and _COUNTER not in names and hasattr(checkpoint, "read")
    try:
        status = checkpoint.read(files.path) if is_bare else checkpoint.restore(files.path)
        _KEPT[getattr(status, "_checkpoint", checkpoint)] = files
        _check_matched(status, stored, partial)
    except (AssertionError, ValueError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError) as error:
        raise MismatchError(
            f"{stored.where} does not fit this tf.train.Checkpoint: {error}; make the objects that were saved, or pass"
            " partial=True to leave those without a value as they are"
        ) from error
    except tf.errors.OpError as error:
        raise DamagedError(f"TensorFlow cannot read {stored.where}: {error}; restore another checkpoint") from error
    return checkpoint


def _check_matched(status: Any, stored: StoredCheckpoint, partial: bool) -> None:
    """Raise TensorFlow's `AssertionError` if an object has nothing in the checkpoint, or only say so."""
    try:
        status.assert_existing_objects_matched()
    except AssertionError as error:
        if not partial:
            raise
        logger.warning("%s: objects keep their values: %s", stored.where, error)
    if partial:
        status.expect_partial()
