"""The values of variant tensors (states of tf.data iterators), which `session.run` gives to nobody.

TensorFlow serializes them in its `SaveV2` ops alone, and makes them in its `RestoreV2` ops alone. So a Saver's op is
run on a temporary folder: to save with empty arrays fed in place of its other inputs, to restore from a checkpoint
that has empty tensors for its other outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ckpt.bundle import (
    STRING,
    VARIANT,
    encode_objects,
    encode_piece,
    encode_run,
    index_name,
    merge_index,
    piece_key,
    shard_name,
)
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import Variants
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint, read_boxes
from ray_ckpt.storage import open_store
from ray_ckpt.types import Box


def is_variant(tensor: Any) -> bool:
    """Whether a tensor of a graph is one."""
    return bool(tensor.dtype.base_dtype.name == "variant")


def read_variants(session: Any, tensors: Sequence[Any]) -> list[Variants]:
    """The values of variant tensors that a Saver of the session's graph saves.

    Raises:
        StateError: no Saver saves one of them, or the session is another machine's.
        tf.errors.OpError: it cannot be serialized.
    """
    return [_read(session, tensor) for tensor in tensors]


def _read(session: Any, tensor: Any) -> Variants:
    op = next((op for op in tensor.consumers() if op.type == "SaveV2"), None)
    if op is None:
        raise StateError(f"{tensor.name!r} is a variant that no Saver saves: it has no form outside its session")
    prefix, names, specs, *saved = op.inputs
    with tempfile.TemporaryDirectory(prefix="ray-ckpt-variant-") as folder:
        number = next(i for i, other in enumerate(saved) if other is tensor)
        feeds = {
            prefix: _text(f"{folder}/v"),
            names: _texts(*map(str, range(len(saved)))),
            specs: _texts(*("" for _ in saved)),
            **{other: _empty(other) for other in saved if other is not tensor},
        }
        _run(session, [op], feeds)
        if not Path(index_name(f"{folder}/v")).exists():
            raise _elsewhere(session, f"{tensor.name!r} cannot be saved")
        stored = open_checkpoint(open_store(folder, single_coordinator=True), "v")
        return _variants(stored, str(number))


def run_with_variants(session: Any, ops: Sequence[Any], values: Mapping[Any, np.ndarray[Any, Any]]) -> None:
    """Run ops with these values in place of outputs of `RestoreV2` ops; of variants they are serialized elements.

    Raises:
        StateError: the session is another machine's.
        tf.errors.OpError: a value is not what the ops can take.
    """
    import tensorflow as tf

    feeds = {tensor: value for tensor, value in values.items() if not is_variant(tensor)}
    variants = {tensor: value for tensor, value in values.items() if is_variant(tensor)}
    with tempfile.TemporaryDirectory(prefix="ray-ckpt-variant-") as folder:
        try:
            _run(session, ops, {**feeds, **_feeds(folder, variants)})
        except tf.errors.NotFoundError:
            if not session.sess_str:
                raise
            raise _elsewhere(session, f"{next(iter(variants)).name!r} cannot be restored") from None


def _elsewhere(session: Any, what: str) -> StateError:
    return StateError(
        f"{what}: it is a variant (the state of a tf.data iterator) in a session of {session.sess_str!r}, which runs on"
        " a machine that does not see this one's temporary folder: leave it out of the Saver, or use a local session"
    )


def _run(session: Any, ops: Sequence[Any], feeds: Mapping[Any, np.ndarray[Any, Any]]) -> None:
    # `session.run` takes neither other names nor arrays of other shapes than the variables'.
    session._extend_graph()
    fed = {tensor._as_tf_output(): value for tensor, value in feeds.items()}
    session._call_tf_sessionrun(None, fed, [], [op._c_op for op in ops], None)


def _feeds(folder: str, values: Mapping[Any, np.ndarray[Any, Any]]) -> dict[Any, Any]:
    """What to feed so that the `RestoreV2` ops of these outputs give these values, from files below ``folder``."""
    by_output = {tensor.ref(): value for tensor, value in values.items()}
    feeds: dict[Any, Any] = {}
    for i, op in enumerate({tensor.op for tensor in values}):
        prefix, names, specs = op.inputs
        empties = [np.empty(0, object if _is_text(t) else t.dtype.as_numpy_dtype) for t in op.outputs]
        wanted = [by_output.get(t.ref(), empty) for t, empty in zip(op.outputs, empties, strict=True)]
        _write(f"{folder}/v{i}", [(t.dtype.name, value) for t, value in zip(op.outputs, wanted, strict=True)])
        feeds[prefix] = _text(f"{folder}/v{i}")
        feeds[names] = _texts(*map(str, range(len(wanted))))
        feeds[specs] = _texts(*("" for _ in wanted))
    return feeds


def _is_text(tensor: Any) -> bool:
    return tensor.dtype.name in (STRING, VARIANT)


def _write(prefix: str, tensors: Sequence[tuple[str, np.ndarray[Any, Any]]]) -> None:
    """A checkpoint of one data shard; tensors are named by their numbers, all but variants are empty."""
    data = bytearray()
    items = []
    for i, (dtype, value) in enumerate(tensors):
        raw, crc = encode_objects(dtype, value, value.shape) if dtype == VARIANT else (b"", 0)
        name = piece_key(str(i), Box.whole(value.shape), value.shape)
        items.append((name, encode_piece(dtype, value.shape, 0, len(data), len(raw), crc)))
        data += raw
    Path(shard_name(prefix, 0, 1)).write_bytes(data)
    Path(index_name(prefix)).write_bytes(merge_index([encode_run(sorted(items))], 1))


def _text(text: str) -> np.ndarray[Any, Any]:
    return np.array(text.encode(), object)


def _texts(*texts: str) -> np.ndarray[Any, Any]:
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return array


def _empty(tensor: Any) -> np.ndarray[Any, Any]:
    return np.empty(0, tensor.dtype.base_dtype.as_numpy_dtype)


def _variants(stored: StoredCheckpoint, name: str) -> Variants:
    shape = stored.tensor(name).shape
    array = np.empty(shape, object)
    read_boxes(stored, [(name, Box.whole(shape), array)])
    return Variants(tuple(array.flat), shape)
