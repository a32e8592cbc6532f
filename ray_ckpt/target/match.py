"""Each leaf of a restore target against what the checkpoint holds: what is to be read for it, or why it cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np

from ray_ckpt.bundle import VARIANT, StoredTensor, dtype_of
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import PerWorker, Slice, Slices, Wanted, wanted
from ray_ckpt.leaves.base import split_per_worker
from ray_ckpt.metadata import DEFAULT_KIND
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.target.differences import CASTABLE, Differences, form
from ray_ckpt.target.structure import StoredNames, expected_names
from ray_ckpt.types import Box

Combine = Callable[[list[Any]], Any]


class Source(NamedTuple):
    """One stored tensor to be read: the boxes of it, and the value they become.

    ``like``: the target's leaf; None: a value of the stored ``kind``. ``dtype``: what the elements are converted
    to after reading; None: nothing.
    """

    tensor: StoredTensor
    kind: str
    like: Any
    boxes: tuple[Box, ...]
    dtype: np.dtype[Any] | None = None


class LeafPlan(NamedTuple):
    """What one leaf of the target becomes: the value of its only source, or what ``combine`` makes of them."""

    name: str
    like: Any
    sources: tuple[Source, ...]
    combine: Combine | None = None


@dataclass(slots=True)
class Matcher:
    """Matches leaves one by one; what does not fit gathers in ``differences``.

    ``kept`` are the leaves that keep the target's own value, ``unused`` those of the checkpoint that this rank
    could have been expected to use.
    """

    stored: StoredCheckpoint
    rank: int
    world_size: int
    partial: bool
    cast: bool
    rename: Callable[[str], str]
    names: StoredNames = field(init=False)
    plans: list[LeafPlan] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    differences: Differences = field(default_factory=Differences)

    def __post_init__(self) -> None:
        self.names = StoredNames.of(self.stored)

    def match(self, leaves: Mapping[str, Any]) -> None:
        """Match all leaves of the target; those of the checkpoint that are left over are unexpected."""
        used = set()
        for name, like in leaves.items():
            stored_name = self.rename(name)
            used.add(stored_name)
            # Without a target the checkpoint decides.
            if isinstance(like, PerWorker) or (like is None and stored_name not in self.names.plain):
                self._match_per_worker(name, stored_name, like)
            elif stored_name in self.names.plain:
                self._add(name, like, [self._source(name, stored_name, like)])
            else:
                self._lacks(name, stored_name, like)
        self.differences.spare = self.names.all - used
        metadata = self.stored.metadata
        self.unused = expected_names(self.names, metadata, self.rank, self.world_size) - used
        if not self.partial:
            self.differences.unexpected = dict.fromkeys(self.unused, "")

    def _match_per_worker(self, name: str, stored_name: str, like: Any) -> None:
        tensors = self.names.per_worker.get(stored_name, {})
        own = tensors.get((self.rank, self.world_size))
        if own is not None:
            self._add(name, like, [self._source(name, own, like)])
        elif not tensors or self._saved_by(tensors) == self.world_size:
            self._lacks(name, stored_name, like)
        else:
            self._resize(name, tensors, like)

    def _resize(self, name: str, tensors: Mapping[tuple[int, int], str], like: Any) -> None:
        """The values of another number of workers."""
        in_order = [tensors[at] for at in sorted(tensors)]
        rule = stored_rule(self.stored, in_order[0]) if like is None else like.on_resize
        if rule == "first":
            self._add(name, like, [self._source(name, in_order[0], like)])
        elif rule == "init":
            why_not = 'on_resize="init" needs the value itself'
            if like is None:
                self.differences.valueless[name] = why_not
            else:
                self._keep(name, like, why_not)
        elif callable(rule):
            # The values are whole and may be of any shape: only the rule knows what they mean together.
            sources = [self._source(name, tensor, None) for tensor in in_order]
            combine = functools.partial(_resized, like, self.rank, self.world_size)
            self._add(name, like, sources, combine)
        else:
            self.differences.resized[name] = (
                f"each of {self._saved_by(tensors)} workers saved its own value, expected {self.world_size}"
            )

    def _saved_by(self, tensors: Mapping[tuple[int, int], str]) -> int:
        """The number of workers that saved a leaf."""
        return max(world_size for _, world_size in tensors)

    def _lacks(self, name: str, stored_name: str, like: Any) -> None:
        """The checkpoint does not have the leaf."""
        if self.partial and like is not None:
            self._keep(name, like, "missing in the checkpoint, and the target's leaf is abstract")
            return
        why = ""
        if stored_name in self.names.per_worker:
            why = "each worker saved its own value: make the target's leaf a PerWorker"
            if isinstance(like, PerWorker):
                why = f"rank {self.rank} of {self.world_size} saved no value of it"
        elif stored_name in self.names.plain:
            why = "one value was saved for all workers: take PerWorker off the target's leaf"
        elif stored_name != name:
            why = f"renamed to {stored_name!r}"
        self.differences.missing[name] = why

    def _keep(self, name: str, like: Any, why_not: str) -> None:
        if has_value(like):
            self.kept[name] = like
        else:
            self.differences.valueless[name] = why_not

    def _add(self, name: str, like: Any, sources: Sequence[Source | None], combine: Combine | None = None) -> None:
        # Where there is no source there is a difference, and nothing is read.
        found = tuple(source for source in sources if source is not None)
        self.plans.append(LeafPlan(name, like, found, combine))

    def _source(self, name: str, stored_name: str, like: Any) -> Source | None:
        """What to read of a tensor; None, and a difference, if it is not what the target's leaf wants."""
        tensor = self.stored.tensor(stored_name)
        foreign = VARIANT if tensor.dtype == VARIANT else DEFAULT_KIND
        kind = self.stored.metadata.kind(stored_name) if self.stored.metadata else foreign
        if like is None:
            want = Wanted(tensor.dtype, tensor.shape, (Box.whole(tensor.shape),))
        else:
            want = wanted(name, like)
            if want.dtype == tensor.dtype == VARIANT:
                # Its shape is a part of its value.
                return Source(tensor, kind, like, (Box.whole(tensor.shape),))
            if want.dtype == tensor.dtype and want.shape == tensor.shape:
                return Source(tensor, kind, like, want.boxes)
        found, expected = numpy_dtype(tensor.dtype), numpy_dtype(want.dtype)
        castable = found is not None and object not in (found, expected)
        same_dtype = want.dtype == tensor.dtype or (castable and found == expected)
        may_cast = castable and (self.cast or _is_same_number(like, found, expected))
        if tuple(want.shape) == tensor.shape and (same_dtype or may_cast):
            return Source(tensor, kind, like, want.boxes, None if same_dtype else expected)
        detail = f"expected {form(want.dtype, want.shape)}, found {form(tensor.dtype, tensor.shape)}"
        if tuple(want.shape) == tensor.shape and castable:
            detail += CASTABLE
        self.differences.changed[name] = detail
        return None


def stored_rule(stored: StoredCheckpoint, tensor: str) -> Any:
    """The ``on_resize`` that a `PerWorker` leaf was saved with; a function counts as "error"."""
    return split_per_worker(stored.metadata.kind(tensor))[0] if stored.metadata else "error"


def _resized(like: PerWorker, rank: int, world_size: int, values: list[Any]) -> PerWorker:
    """What the marker's own rule makes of all workers' values; a variable takes it on."""
    rule = cast(Callable[..., Any], like.on_resize)
    value = rule([saved.value for saved in values], rank, world_size)
    if hasattr(like.value, "assign"):
        like.value.assign(value)
        return like
    return replace(like, value=value)


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """The numpy dtype of a tensor's type; None where numpy has none ("resource")."""
    try:
        return dtype_of(name)
    except StateError:
        return None


def _is_same_number(like: Any, found: Any, expected: Any) -> bool:
    """Whether a Python number, or a JAX scalar made of one, takes a stored one: JAX turns the first into the second.

    A float must not be rounded; of an int, its value decides.
    """
    value = bare(like)
    if type(value) not in (int, float) and not (getattr(value, "weak_type", False) and value.shape == ()):
        return False
    both = found.kind + expected.kind
    return both in ("ii", "iu", "ui", "uu") or (both == "ff" and np.can_cast(found, expected))


def bare(like: Any) -> Any:
    """The target's leaf without its markers."""
    if isinstance(like, PerWorker):
        return bare(like.value)
    if isinstance(like, Slices):
        return bare(like.parts[0])
    return bare(like.array) if isinstance(like, Slice) else like


def has_value(like: Any) -> bool:
    """False for an abstract leaf and for a donated array."""
    value = bare(like)
    return not is_placeholder(value) and not (hasattr(value, "is_deleted") and value.is_deleted())


def is_placeholder(like: Any) -> bool:
    """True for an abstract leaf, which only says what it would be."""
    value = bare(like)
    return type(value).__name__ == "ShapeDtypeStruct" or bool(getattr(value, "is_meta", False))
