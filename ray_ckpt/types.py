"""The vocabulary: frozen records that every layer shares. No behaviour beyond arithmetic on them.

Units stand last in names: ``nbytes``, ``_s`` (seconds). Times are seconds since the epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Shape = tuple[int, ...]

FORMAT_VERSION = 1
"""Version of everything this package writes beside the TensorFlow format (log, metadata)."""

METADATA_KEY = "_ray_ckpt"
"""Name of the scalar string tensor that holds a checkpoint's own description, as JSON."""

IN_PART = " (in part)"
"""Ends the name of a digest that was taken of a sample of a replica: it compares with such only."""

PRIVATE_DIR = "_ray_ckpt"
"""Folder inside a run's directory for everything that TensorFlow does not know of."""


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A rectangle in a global array: ``offset[d] <= index[d] < offset[d] + shape[d]``."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that covers an array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that cuts this box out of the global array."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where the two do not share an element."""
        offset = tuple(map(max, self.offset, other.offset))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(e - o for o, e in zip(offset, stop, strict=True))
        return Box(offset, shape) if all(n > 0 for n in shape) else None

    def relative_to(self, outer: Box) -> Box:
        """This box in the coordinates of ``outer``."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """One leaf of one rank's state: what it is globally, and which parts this rank holds.

    ``dtype`` is a name of `bundle.dtypes` ("float32", "bfloat16", "string", ...). ``boxes`` are
    this rank's parts, without repeats. ``kind`` says what the leaf was in the user's state
    ("numpy", "jax", "tf", "torch", "variant", "int", "float", "bool", "str", "bytes"), so that a restore without
    a target can give the same back. A variant has the shape () here, whatever it is when it is saved.
    """

    name: str
    dtype: str
    shape: Shape
    boxes: tuple[Box, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Layout:
    """One rank's whole state without its values.

    ``tree`` is the JSON of the container structure (see `tree`); ``fingerprint`` a digest of all
    the rest, equal exactly when the layouts are.
    """

    leaves: tuple[LeafSpec, ...]
    tree: str
    fingerprint: str

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle of one object a leaf takes ten times as long, and coordinators get them of a million leaves.
        leaves = [(x.name, x.dtype, x.shape, [(b.offset, b.shape) for b in x.boxes], x.kind) for x in self.leaves]
        return _layout, (leaves, self.tree, self.fingerprint)


def _layout(leaves: list[tuple[str, str, Shape, list[tuple[Shape, Shape]], str]], tree: str, digest: str) -> Layout:
    # Leaves repeat few forms: each is kept once.
    forms: dict[tuple[Any, ...], tuple[Shape, tuple[Box, ...]]] = {}
    specs = []
    for name, dtype, shape, parts, kind in leaves:
        key = (shape, *parts)
        if key not in forms:
            forms[key] = shape, tuple(Box(*part) for part in parts)
        shape, boxes = forms[key]
        specs.append(LeafSpec(name, dtype, shape, boxes, kind))
    return Layout(tuple(specs), tree, digest)


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangle that one rank copies into its snapshot and that becomes one bundle entry.

    ``leaf`` indexes the rank's `Layout.leaves`; ``start`` is the byte offset in the snapshot's
    fixed region. A string leaf has no fixed size: ``nbytes`` is -1, it comes after all others and
    ``start`` is -1.
    """

    leaf: int
    box: Box
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WriterRange:
    """Copies ``first <= i < stop`` of a rank's plan go to one data shard, by one writer."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank copies, in the order of the bytes, and how its writers share it.

    Each writer's bytes start on a page of 4096 bytes; ``fixed_nbytes`` is where those of a fixed size end.
    ``writer_base`` is the global index of its first writer of ``num_writers`` in all. ``checks`` are indices of
    leaves that other ranks hold too and that this rank must digest, so that replicas can be compared.
    """

    plan_id: str
    rank: int
    copies: tuple[Copy, ...]
    writers: tuple[WriterRange, ...]
    writer_base: int
    num_writers: int
    fixed_nbytes: int
    checks: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # For the same reason as a layout's.
        copies = [(c.leaf, c.box.offset, c.box.shape, c.start, c.nbytes) for c in self.copies]
        rest = (self.writers, self.writer_base, self.num_writers, self.fixed_nbytes, self.checks)
        return _rank_plan, (self.plan_id, self.rank, copies, *rest)


def _rank_plan(plan_id: str, rank: int, copies: list[tuple[int, Shape, Shape, int, int]], *rest: Any) -> RankPlan:
    made = tuple(Copy(leaf, Box(offset, shape), start, nbytes) for leaf, offset, shape, start, nbytes in copies)
    return RankPlan(plan_id, rank, made, *rest)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the checkpoint: its global form and, where it is partitioned, its slices."""

    name: str
    dtype: str
    shape: Shape
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Who writes what, for one set of layouts. ``boxes`` of a tensor: one means unpartitioned."""

    plan_id: str
    ranks: tuple[RankPlan, ...]
    tensors: tuple[TensorPlan, ...]
    num_writers: int


@dataclass(frozen=True, slots=True)
class ShardReport:
    """One finished data shard.

    ``run`` holds its index entries, encoded and sorted (`bundle.encode_run`); ``chunks`` the
    little-endian uint32 crc32c of each `CHUNK_NBYTES` piece of every entry larger than one piece,
    in byte order, so that a part of a large entry can be read and verified alone. ``began`` is the wall-clock time.
    """

    attempt: str
    writer: int
    attempt_try: int
    shard_id: int
    path: str
    nbytes: int
    run: bytes
    chunks: bytes
    seconds_s: float
    host: str
    began: float = 0.0


CHUNK_NBYTES = 4 << 20
"""Granularity of the checksums beside the whole-entry one that TensorFlow's format has."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed checkpoint, as the directory's log lists it.

    ``prefix`` is relative to the directory. ``superseded``: a later start restored an older step on
    purpose, so this one is never the default and is deleted first. ``foreign``: plain TensorFlow
    wrote it; it can be restored, retention never touches it. ``preserved``: retention has kept it for good, by
    ``keep_every_hours``; the `checkpoint` file names it no more.
    """

    step: int
    prefix: str
    attempt: str
    generation: int
    time: float
    nbytes: int
    num_shards: int
    world_size: int
    superseded: bool = False
    foreign: bool = False
    preserved: bool = False


@dataclass(frozen=True, slots=True)
class Dying:
    """A checkpoint that the log no longer lists and whose files are being removed since ``time``."""

    checkpoint: Checkpoint
    time: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The workers of one start of the job: sealed once all ranks have one restore step.

    ``round`` counts the choices of a restore step: a further one follows when a checkpoint proves damaged.
    ``snapshot``: (generation, step) of the snapshot in host memory that it starts from, where no checkpoint is as new.
    """

    number: int
    world_size: int
    restored_step: int | None
    round: int = 1
    snapshot: tuple[int, int] | None = None


RecordKind = Literal["claim", "seal", "commit", "abort", "delete"]


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record of the commit log: the whole truth about the directory at that point.

    claim: coordinator ``epoch`` took the directory over; seal: a generation got its restore step;
    commit, abort: the save of ``attempt`` at ``step`` was decided; delete: entries moved from
    ``live`` to ``dying``, were marked as preserved, or left ``dying`` for good. ``live`` is in commit order, newest
    last. ``high_water`` is the largest step ever decided: a prefix ``model.ckpt-S`` with
    S <= high_water is never claimed again. ``directory``: who made the first record, which tells this directory from
    one that was at its place before and was deleted; empty in those of older versions.
    """

    sequence: int
    kind: RecordKind
    epoch: int
    owner: str
    time: float
    live: tuple[Checkpoint, ...]
    dying: tuple[Dying, ...]
    generation: Generation | None
    high_water: int
    attempt: str = ""
    step: int = -1
    reason: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """The record an attempt leaves before it writes its first byte, so that orphans can be swept."""

    attempt: str
    epoch: int
    generation: int
    step: int
    prefix: str
    num_shards: int
