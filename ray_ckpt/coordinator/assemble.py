"""From the reports of a whole save to its metadata shard and its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_ckpt.bundle import (
    STRING,
    encode_partitioned,
    encode_piece,
    encode_run,
    encode_strings,
    merge_index,
    shard_name,
)
from ray_ckpt.errors import SaveError
from ray_ckpt.metadata import DEFAULT_KIND, Metadata, RankTree, WriterNote, encode
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.types import METADATA_KEY, Layout, Plan, ShardReport

Entries = list[tuple[bytes, bytes]]


def partitioned_entries(plan: Plan) -> Entries:
    """The full entries (key, value) of the tensors that are stored in slices: the same in all saves by this plan."""
    return [
        (tensor.name.encode(), encode_partitioned(tensor.dtype, tensor.shape, tensor.boxes))
        for tensor in plan.tensors
        if len(tensor.boxes) > 1
    ]


def metadata_shard(
    save: SaveState, partitioned: Entries, layouts: Sequence[Layout], now: float
) -> tuple[bytes, ShardReport]:
    """The bytes of the coordinator's own shard and its report; ``layouts`` by rank.

    Its run also holds the entries of the tensors that are stored in slices, see `partitioned_entries`.
    """
    raw, crc = encode_strings([encode(_metadata(save, layouts, now))], ())
    num_shards = save.order.num_shards
    shard_id = num_shards - 1
    pairs = [(METADATA_KEY.encode(), encode_piece(STRING, (), shard_id, 0, len(raw), crc)), *partitioned]
    report = ShardReport(
        attempt=save.attempt,
        writer=save.num_writers,
        attempt_try=0,
        shard_id=shard_id,
        path=shard_name(save.prefix, shard_id, num_shards),
        nbytes=len(raw),
        run=encode_run(sorted(pairs)),
        chunks=b"",
        seconds_s=0.0,
        host="",
    )
    return raw, report


def merged_index(save: SaveState, plan: Plan, metadata: ShardReport) -> bytes:
    """The whole index file.

    Raises:
        SaveError: the shards do not hold exactly what was planned.
    """
    shards = sorted(save.shards.values(), key=lambda s: s.writer)
    planned = sum(len(rank.copies) for rank in plan.ranks)
    found = sum(int.from_bytes(shard.run[:4], "little") for shard in shards)
    if found != planned or [s.writer for s in shards] != list(range(plan.num_writers)):
        raise SaveError(
            f"step {save.step}: the shards hold {found} pieces by {len(shards)} writers, planned were {planned} by "
            f"{plan.num_writers}"
        )
    return merge_index([*(s.run for s in shards), metadata.run], save.order.num_shards)


def _metadata(save: SaveState, layouts: Sequence[Layout], now: float) -> Metadata:
    ranks_of: dict[str, list[int]] = {}
    kinds: dict[str, str] = {}
    seen: set[str] = set()
    for rank, layout in enumerate(layouts):
        ranks_of.setdefault(layout.tree, []).append(rank)
        if layout.fingerprint not in seen:
            seen.add(layout.fingerprint)
            kinds.update((leaf.name, leaf.kind) for leaf in layout.leaves if leaf.kind != DEFAULT_KIND)
    shards = sorted(save.shards.values(), key=lambda s: s.shard_id)
    return Metadata(
        step=save.step,
        attempt=save.attempt,
        generation=save.key[0],
        world_size=save.world_size,
        time=now,
        trees=tuple(RankTree(tuple(ranks), tree) for tree, ranks in ranks_of.items()),
        kinds=kinds,
        chunks=_chunks(shards),
        writers=tuple(WriterNote(s.shard_id, s.host, s.nbytes, s.seconds_s) for s in shards),
    )


def _chunks(shards: Sequence[ShardReport]) -> Mapping[int, bytes]:
    return {s.shard_id: s.chunks for s in shards if s.chunks}
