"""What a `tf.compat.v1.train.Saver` saves and restores, read from the ops of its graph.

A Saver's graph has `SaveV2` ops (one, or one a device) before ``saver_def.save_tensor_name``, and `RestoreV2` ops
before ``saver_def.restore_op_name``. Their inputs tell, for each tensor, its name in the checkpoint, which slice of
the whole it is, and in the first case the tensor itself (tensorflow/core/ops/io_ops.cc). Nothing is added to
the graph, so all of this holds for finalized and for imported graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ckpt.bundle.slice_spec import parse_slice_spec
from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.leaves import Slice, Slices, Variants
from ray_ckpt.tree import Named
from ray_ckpt.types import Box, Shape

_V1_TYPES = frozenset({"Save", "SaveSlices", "Restore", "RestoreSlice"})
_NUM_PLAIN_INPUTS = 3
"""Inputs of `SaveV2` before the tensors: the prefix, the names, the slice specs."""


@dataclass(frozen=True, slots=True)
class Part:
    """One rectangle of a larger tensor."""

    global_shape: Shape
    box: Box


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A tensor of the graph, its name in the checkpoint, and which part of that it is (None: all of it)."""

    name: str
    part: Part | None
    tensor: Any


@dataclass(frozen=True, slots=True)
class SaverTensors:
    """The tensors that one Saver saves, in the order in which its ops list them."""

    tensors: tuple[GraphTensor, ...]

    @classmethod
    def of(cls, saver_def: Any, graph: Any) -> SaverTensors:
        """What the Saver of this `SaverDef` saves; nothing where it is None, as that of an empty Saver.

        Raises:
            UsageError: the ops are not in this graph or not of a form that tells, or the Saver writes
                TensorFlow's old format (V1).
        """
        if saver_def is None:
            return cls(())
        ops = _ops_before(_element(graph, saver_def.save_tensor_name), "SaveV2")
        return cls(tuple(found for op in ops for found in _described(op, op.inputs[_NUM_PLAIN_INPUTS:])))

    @property
    def is_empty(self) -> bool:
        """True if the Saver has nothing to save."""
        return not self.tensors

    @property
    def fetches(self) -> list[Any]:
        """The tensors that are saved: what to ask `session.run` or `fetch.Fetch` for; the first has no variants."""
        return [found.tensor for found in self.tensors]

    def state(self, values: Sequence[Any]) -> Named:
        """The state to be saved, from the values of `fetches`: arrays, `Variants`, `Slice` or `Slices` by name.

        Raises:
            StateError: two tensors have one name, parts of one name do not belong to one tensor, or a value has
                not the shape that its slice spec says.
        """
        parts: dict[str, list[Slice]] = {}
        state = Named()
        for found, value in zip(self.tensors, values, strict=True):
            array = _leaf(value)
            if found.name in state or (found.part is None and found.name in parts):
                raise StateError(f"the Saver saves two tensors as {found.name!r}; give its var_list other names")
            if found.part is None:
                state[found.name] = array
            else:
                parts.setdefault(found.name, []).append(_slice(found, found.part, array))
        for name, pieces in parts.items():
            if len({piece.global_shape for piece in pieces}) > 1:
                shapes = sorted({piece.global_shape for piece in pieces})
                raise StateError(f"the Saver saves parts of {name!r} as of tensors of different shapes, {shapes}")
            state[name] = pieces[0] if len(pieces) == 1 else Slices(tuple(pieces))
        return state


@dataclass(frozen=True, slots=True)
class RestoreTensors:
    """The outputs of one Saver's `RestoreV2` ops, and the op that assigns them to the variables."""

    op: Any
    tensors: tuple[GraphTensor, ...]

    @classmethod
    def of(cls, saver_def: Any, graph: Any) -> RestoreTensors:
        """What the Saver of this `SaverDef` restores. Raises as `SaverTensors.of` does."""
        op = _element(graph, saver_def.restore_op_name)
        return cls(
            op, tuple(found for read in _ops_before(op, "RestoreV2") for found in _described(read, read.outputs))
        )


def _element(graph: Any, name: str) -> Any:
    """The op that a `SaverDef` names, or the one of the tensor that it names.

    Raises:
        UsageError: the graph has none of that name.
    """
    try:
        return graph.get_operation_by_name(name.split(":")[0])
    except (KeyError, ValueError):
        raise UsageError(
            f"the saver's op {name!r} is not in the graph of this session: a saver whose variables are gone; make the"
            " Saver in the graph that the session runs, after its variables"
        ) from None


def _ops_before(last: Any, kind: str) -> list[Any]:
    """The ops of this type that ``last`` depends on, by name; what lies before them is not looked at.

    Raises:
        UsageError: there are none.
    """
    found, seen, todo = [], {last}, [last]
    while todo:
        op = todo.pop()
        if op.type == kind:
            found.append(op)
            continue
        if op.type in _V1_TYPES:
            raise UsageError(
                f"the Saver of {last.name!r} writes TensorFlow's old format (V1); make it with the default"
                " write_version=tf.compat.v1.train.SaverDef.V2"
            )
        before = {tensor.op for tensor in op.inputs}.union(op.control_inputs) - seen
        seen |= before
        todo.extend(before)
    if not found:
        raise UsageError(
            f"no {kind} op lies before {last.name!r}; only a Saver of a graph with variables can be used, not a"
            " function of a SavedModel"
        )
    return sorted(found, key=lambda op: str(op.name))


def _described(op: Any, tensors: Sequence[Any]) -> Iterator[GraphTensor]:
    """The tensors of a `SaveV2` or `RestoreV2` op, with its names and slice specs."""
    names, specs = (_texts(op, i) for i in (1, 2))
    for name, spec, tensor in zip(names, specs, tensors, strict=True):
        yield GraphTensor(name, Part(*parse_slice_spec(spec)) if spec else None, tensor)


def _texts(op: Any, i: int) -> list[str]:
    """The strings of a constant input.

    Raises:
        UsageError: it is computed by the graph.
    """
    import tensorflow as tf

    value = tf.get_static_value(op.inputs[i])
    if value is None:
        what = op.inputs[i].name
        raise UsageError(f"{op.name!r} computes its tensor names or slices ({what}): they have to be constants")
    return [text.decode() for text in value.tolist()]


def _leaf(value: Any) -> Any:
    if isinstance(value, Variants):
        return value
    # A scalar string is fetched as bytes, of which numpy would cut trailing zeros.
    if isinstance(value, (bytes, str)):
        return np.array(value, object)
    return np.asarray(value)


def _slice(found: GraphTensor, part: Part, array: np.ndarray[Any, Any]) -> Slice:
    if array.shape != part.box.shape:
        raise StateError(
            f"{found.name}: {found.tensor.name!r} has the shape {array.shape}, but its slice spec says"
            f" {part.box.shape} at {part.box.offset} of {part.global_shape}"
        )
    return Slice(array, part.global_shape, part.box.offset)
