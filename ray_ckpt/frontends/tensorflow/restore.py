"""Restoring a session by feeding: for stores that TensorFlow has no file system for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ckpt.bundle import StoredTensor, dtype_of
from ray_ckpt.catalog import Options, Url, open_for_reading, with_checkpoint
from ray_ckpt.errors import MismatchError, ObjectMissingError, UsageError
from ray_ckpt.frontends.tensorflow.saver_graph import GraphTensor, RestoreTensors, SaverTensors
from ray_ckpt.frontends.tensorflow.variants import is_variant, run_with_variants
from ray_ckpt.log import live_checkpoints
from ray_ckpt.restore import StoredCheckpoint, check_extents, read_boxes
from ray_ckpt.storage import Store
from ray_ckpt.target.differences import SHOWN, near_miss
from ray_ckpt.types import Box

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

GROUP_NBYTES = 256 << 20
"""How much is read and fed at once: what a restore needs of memory beside the variables, or one variable's size."""

_ALIGNMENT = 64
"""TensorFlow takes arrays that begin at multiples of this as they are, and copies others (EIGEN_MAX_ALIGN_BYTES)."""


def restore_session(
    session: Any,
    url: Url,
    saver: Any = None,
    *,
    step: int | None = None,
    storage_options: Options | None = None,
) -> int | None:
    """Give a session's variables the values of a checkpoint; its step, or None if there is no checkpoint.

    What `Saver.restore` does, but the arrays are read and verified by this package, and fed in place of the
    results of the graph's `RestoreV2` ops: TensorFlow need not be able to open ``url``, and a finalized graph can
    be restored. The newest sound checkpoint is taken, or that of ``step``. Only what the Saver restores is read, of
    partitions only their slices. For a `MonitoredSession` call it in its scaffold:
    ``Scaffold(init_fn=lambda scaffold, session: ray_ckpt.restore_session(session, url, scaffold.saver))``.

    Args:
        session: a `tf.compat.v1.Session` or something with its ``graph`` and ``run``.
        url: the directory of the checkpoints.
        saver: a `tf.compat.v1.train.Saver`; None: the only one of the graph's SAVERS collection.
        step: which checkpoint; None: the newest, where a damaged one is warned about and the next older taken.
        storage_options: for the file system of ``url``.

    Raises:
        RuntimeError: ``saver`` is None, and the SAVERS collection has none or several.
        MismatchError: tensors are missing in the checkpoint or differ in shape or dtype; lists them. No
            variable is changed.
        UsageError: the Saver is not of this session's graph, or not one whose graph tells what it restores.
        NoCheckpointError: there is no checkpoint of ``step``.
        DamagedError, CheckpointError, StorageError: as `ray_ckpt.load`. Variables may have been changed.
    """
    targets = _targets(saver if saver is not None else only_saver(session.graph), session.graph)
    store = open_for_reading(url, storage_options)
    if step is None and not live_checkpoints(store):
        return None
    return with_checkpoint(store, step, lambda stored: _restore(session, targets, stored))


def only_saver(graph: Any) -> Any:
    """The Saver of a graph's SAVERS collection.

    Raises:
        RuntimeError: it has none, or several; TensorFlow's own words.
    """
    import tensorflow as tf

    key = tf.compat.v1.GraphKeys.SAVERS
    savers = graph.get_collection(key)
    if not savers:
        raise RuntimeError(
            f"No items in collection {key}. Please add a saver to the collection or provide a saver or scaffold."
        )
    if len(savers) > 1:
        raise RuntimeError(
            f"More than one item in collection {key}. Please indicate which one to use by passing it to the"
            " constructor."
        )
    return savers[0]


@dataclass(frozen=True, slots=True)
class _Target:
    """One output of a `RestoreV2` op: what is fed in its place, and the shape of the variable it goes to.

    ``shape`` is TensorFlow's, None where the graph does not tell. ``reshaped``: the graph brings what it gets into
    that shape.
    """

    found: GraphTensor
    shape: Any
    reshaped: bool

    def box(self, stored: StoredTensor) -> Box:
        """What to read."""
        return self.found.part.box if self.found.part else Box.whole(stored.shape)

    def difference(self, stored: StoredTensor) -> str:
        """How the tensor in the checkpoint cannot be what the graph needs; "" if it can."""
        found, part = self.found, self.found.part
        dtype = found.tensor.dtype.base_dtype.name
        if stored.dtype != dtype:
            return f"is {stored.dtype}, the graph has {dtype}"
        if part is not None:
            fits, wanted = stored.shape == part.global_shape, part.global_shape
        elif self.shape is None or self.shape.rank is None:
            return ""
        elif self.reshaped:
            size = self.shape.num_elements()
            fits, wanted = size in (None, Box.whole(stored.shape).size), self.shape
        else:
            fits, wanted = self.shape.is_compatible_with(stored.shape), self.shape
        return "" if fits else f"has the shape {stored.shape}, the graph {tuple(wanted)}"


@dataclass(frozen=True, slots=True)
class _Assignment:
    """An op that the restore op stands for, and the targets whose values it needs (their numbers)."""

    op: Any
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Targets:
    assignments: list[_Assignment]
    targets: list[_Target]


def _targets(saver: Any, graph: Any) -> _Targets:
    """What the Saver restores.

    Raises:
        UsageError: the Saver was not built, or is not of this graph.
    """
    saver_def = saver.as_saver_def()
    if saver_def is None:
        if not saver._is_built:
            raise UsageError("the Saver was made with defer_build=True: call its build() first")
        return _Targets([], [])
    restored = RestoreTensors.of(saver_def, graph)
    shapes = {(t.name, t.part): t.tensor.shape for t in SaverTensors.of(saver_def, graph).tensors}
    targets = [_Target(t, shapes.get((t.name, t.part)), _is_reshaped(t.tensor)) for t in restored.tensors]
    numbers = {target.found.tensor.ref(): i for i, target in enumerate(targets)}
    assignments = [_Assignment(op, tuple(sorted(_needed(op, numbers)))) for op in _assigning(restored.op)]
    return _Targets(sorted(assignments, key=lambda a: a.targets), targets)


def _is_reshaped(tensor: Any) -> bool:
    return any(op.type == "Reshape" for op in tensor.consumers())


def _assigning(restore_op: Any) -> Iterator[Any]:
    """The ops that the restore op, a group (of groups) of them, waits for."""
    seen, todo = {restore_op}, [restore_op]
    while todo:
        op = todo.pop()
        if op.type != "NoOp":
            yield op
            continue
        before = set(op.control_inputs) - seen
        seen |= before
        todo.extend(before)


def _needed(last: Any, numbers: dict[Any, int]) -> set[int]:
    """Numbers of the restored tensors that an op depends on."""
    needed, seen, todo = set(), {last}, [last]
    while todo:
        op = todo.pop()
        for tensor in op.inputs:
            number = numbers.get(tensor.ref())
            if number is not None:
                needed.add(number)
            elif tensor.op not in seen:
                seen.add(tensor.op)
                todo.append(tensor.op)
        before = {other for other in op.control_inputs if other.type != "RestoreV2"} - seen
        seen |= before
        todo.extend(before)
    return needed


def _restore(session: Any, targets: _Targets, stored: StoredCheckpoint) -> int:
    """Read, feed and assign, group by group; the step of the checkpoint."""
    step = _step(stored)
    _check(targets.targets, stored)
    check_extents(stored, {target.found.name for target in targets.targets})
    for group in _groups(targets, stored):
        chosen = [targets.targets[i] for i in sorted({i for assignment in group for i in assignment.targets})]
        arrays = zip((target.found.tensor for target in chosen), _read(chosen, stored), strict=True)
        _assign(session, group, dict(arrays))
    logger.info("restored %d tensors of step %d from %s", len(targets.targets), step, stored.where)
    return step


def _assign(session: Any, group: Sequence[_Assignment], values: Mapping[Any, Array]) -> None:
    """Run assignments with these values in place of what would be restored."""
    ops = [assignment.op for assignment in group]
    if any(map(is_variant, values)):
        run_with_variants(session, ops, values)
    else:
        session.run(ops, values)


def _step(stored: StoredCheckpoint) -> int:
    """The checkpoint's step; of one that plain TensorFlow wrote, the directory tells it.

    Raises:
        ObjectMissingError: it was deleted meanwhile.
    """
    if stored.metadata is not None:
        return stored.metadata.step
    assert isinstance(stored.store, Store), "what plain TensorFlow wrote lies in a store"
    for checkpoint in live_checkpoints(stored.store):
        if checkpoint.prefix == stored.prefix:
            return checkpoint.step
    raise ObjectMissingError(f"{stored.where} was deleted while it was opened")


def _check(targets: Sequence[_Target], stored: StoredCheckpoint) -> None:
    """Raises `MismatchError` that lists what is missing or differs."""
    lines = []
    for target in targets:
        name = target.found.name
        if name not in stored.index.tensors:
            lines.append(f"{name!r} is not in the checkpoint. {near_miss(name, stored.names)}".rstrip(" ."))
        elif difference := target.difference(stored.tensor(name)):
            lines.append(f"{name!r} {difference}")
    if lines:
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise MismatchError(
            "\n  ".join([f"{stored.where} does not fit what the Saver restores:", *lines[:SHOWN], *more])
            + "\nTo restore: change the graph, or make a Saver whose var_list has what the checkpoint has."
        )


def _groups(targets: _Targets, stored: StoredCheckpoint) -> Iterator[list[_Assignment]]:
    """The assignments in groups that need at most `GROUP_NBYTES`, or are one.

    Not each alone: for every new set of feeds TensorFlow prunes and optimizes the whole graph again.
    """
    group: list[_Assignment] = []
    held = 0
    for assignment in targets.assignments:
        nbytes = sum(_nbytes(targets.targets[i], stored) for i in assignment.targets)
        if group and held + nbytes > GROUP_NBYTES:
            yield group
            group, held = [], 0
        group.append(assignment)
        held += nbytes
    if group:
        yield group


def _nbytes(target: _Target, stored: StoredCheckpoint) -> int:
    tensor = stored.tensor(target.found.name)
    return target.box(tensor).size * dtype_of(tensor.dtype).itemsize


def _read(targets: Sequence[_Target], stored: StoredCheckpoint) -> list[Array]:
    tensors = [stored.tensor(target.found.name) for target in targets]
    boxes = [target.box(tensor) for target, tensor in zip(targets, tensors, strict=True)]
    arrays = [_allocate(tensor, box) for tensor, box in zip(tensors, boxes, strict=True)]
    names = [tensor.name for tensor in tensors]
    read_boxes(stored, list(zip(names, boxes, arrays, strict=True)))
    return arrays


def _allocate(tensor: StoredTensor, box: Box) -> Array:
    """An array for a box, not filled yet, where TensorFlow can take it as it is."""
    dtype = dtype_of(tensor.dtype)
    try:
        if dtype.hasobject:
            return np.empty(box.shape, dtype)
        nbytes = box.size * dtype.itemsize
        room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    except (MemoryError, ValueError) as error:
        raise UsageError(f"no memory for tensor {tensor.name!r}, {dtype.name} of shape {box.shape} ({error})") from None
    start = -room.ctypes.data % _ALIGNMENT
    array: Array = room[start : start + nbytes].view(dtype).reshape(box.shape)
    return array
