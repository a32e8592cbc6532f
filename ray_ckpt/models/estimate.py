"""What a save and a restore of a state will be, by the plan that a real save would make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ray_ckpt.bundle import encode_partitioned, encode_piece, encode_run, merge_index, nbytes_of, piece_key
from ray_ckpt.errors import UsageError
from ray_ckpt.models.mesh import HostMesh, layouts_of, unsharded
from ray_ckpt.models.tensor import Tensor, nbytes_of_state
from ray_ckpt.plan import make_plan, not_tf_readable
from ray_ckpt.types import METADATA_KEY, Box, Layout, LeafSpec, Plan

_ENTRY_S = 7e-6
"""Coordinator's time for an index entry: docs/performance.md, 10,000 hosts with a million entries."""

_HOST_S = 5e-4
"""Coordinator's time for a host in a commit: benchmarks/results/scale.md, 5 s at 10,000 hosts and 10^5 entries."""

_METADATA_NBYTES = 1 << 20
"""Whatever it is: it decides how many bytes its own number takes."""

_EXACT_ENTRIES = 50_000
"""Of more, so many are encoded and the rest is taken to be alike."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second of one host: copies into snapshots, writing to the store, reading from it."""

    snapshot: float
    write: float
    read: float
    origin: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """A save in numbers. Pairs are (least, most) over the hosts; bytes and seconds.

    ``writers``: data shards with arrays. ``shards``: these and the metadata's. ``slices``: pieces of tensors that lie
    in more than one. ``unsharded``, ``not_tf_readable``: names. ``blocked_s``: the training step that saves.
    ``commit_s``: from then until the checkpoint is there. ``restore_s``: without the framework's start.
    """

    tensors: int
    nbytes: int
    hosts: int
    devices: int
    writers: int
    shards: int
    slices: int
    writers_a_host: tuple[int, int]
    nbytes_a_host: tuple[int, int]
    snapshot_nbytes_a_host: int
    index_nbytes: int
    read_nbytes_a_host: tuple[int, int]
    unsharded: tuple[str, ...]
    not_tf_readable: tuple[str, ...]
    blocked_s: float
    commit_s: float
    restore_s: float


def outlook(state: Iterable[Tensor], mesh: HostMesh, rates: Rates, snapshots: int = 2) -> Outlook:
    """Plan a save of the state without allocating it; ``snapshots`` is the `Checkpointer`'s.

    Raises:
        UsageError: state and mesh do not go together, or a tensor's bytes depend on its values.
        StateError: no checkpoint can hold the state.
    """
    state = tuple(state)
    for tensor in state:
        if nbytes_of(tensor.dtype, 1) is None:
            raise UsageError(f"{tensor.name}: {tensor.dtype} has no fixed size that could be planned; leave it out")
    layouts = layouts_of(state, mesh)
    plan = make_plan(layouts)
    nbytes = [rank.fixed_nbytes for rank in plan.ranks]
    entries = sum(len(rank.copies) for rank in plan.ranks)
    # Equal layouts read alike, and of a thousand hosts many have one.
    reads = {layout.fingerprint: _read_nbytes(layout.leaves) for layout in layouts}
    blocked_s = max(nbytes) / rates.snapshot
    return Outlook(
        tensors=len(state),
        nbytes=nbytes_of_state(state),
        hosts=mesh.hosts,
        devices=mesh.num_devices,
        writers=plan.num_writers,
        shards=plan.num_writers + 1,
        slices=sum(len(tensor.boxes) for tensor in plan.tensors if len(tensor.boxes) > 1),
        writers_a_host=_ends([len(rank.writers) for rank in plan.ranks]),
        nbytes_a_host=_ends(nbytes),
        snapshot_nbytes_a_host=snapshots * max(nbytes),
        index_nbytes=_index_nbytes(plan, layouts),
        read_nbytes_a_host=_ends(list(reads.values())),
        unsharded=tuple(unsharded(state, mesh)),
        not_tf_readable=tuple(not_tf_readable(plan)),
        blocked_s=blocked_s,
        commit_s=blocked_s + max(nbytes) / rates.write + mesh.hosts * _HOST_S + entries * _ENTRY_S,
        restore_s=max(reads.values()) / rates.read + entries * _ENTRY_S,
    )


def _ends(numbers: Sequence[int]) -> tuple[int, int]:
    return min(numbers), max(numbers)


def _read_nbytes(leaves: Sequence[LeafSpec]) -> int:
    return sum(nbytes_of(leaf.dtype, box.size) or 0 for leaf in leaves for box in leaf.boxes)


def _index_nbytes(plan: Plan, layouts: Sequence[Layout]) -> int:
    """Size of the merged index, but for some bytes that depend on the metadata's size."""
    parted = {tensor.name: tensor for tensor in plan.tensors if len(tensor.boxes) > 1}
    total = sum(len(rank.copies) for rank in plan.ranks) + len(parted)
    # Every so many entries, since neighbours share the beginnings of their keys.
    stride = -(-total // _EXACT_ENTRIES)
    names = sorted({tensor.name for tensor in plan.tensors})[::stride]
    chosen = set(names)
    pairs = list(_pieces(plan, layouts, chosen))
    pairs += [
        (name.encode(), encode_partitioned(tensor.dtype, tensor.shape, tensor.boxes))
        for name, tensor in parted.items()
        if name in chosen
    ]
    metadata = encode_piece("string", (), plan.num_writers, 0, _METADATA_NBYTES, 1)
    pairs.append((METADATA_KEY.encode(), metadata))
    size = len(merge_index([encode_run(sorted(pairs))], plan.num_writers + 1))
    return size if stride == 1 else size * total // len(pairs)


def _pieces(plan: Plan, layouts: Sequence[Layout], chosen: set[str]) -> Iterator[tuple[bytes, bytes]]:
    for rank, layout in zip(plan.ranks, layouts, strict=True):
        for number, writer in enumerate(rank.writers):
            copies = rank.copies[writer.first : writer.stop]
            for copy in copies:
                leaf = layout.leaves[copy.leaf]
                if leaf.name in chosen:
                    box: Box = copy.box
                    value = encode_piece(
                        leaf.dtype, box.shape, rank.writer_base + number, copy.start - copies[0].start, copy.nbytes, 1
                    )
                    yield piece_key(leaf.name, box, leaf.shape), value
