"""A whole save without Ray: layouts, plan, snapshots and shard writers as they are, the commit by hand."""

from __future__ import annotations

import struct
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ckpt.bundle import (
    encode_partitioned,
    encode_piece,
    encode_run,
    encode_strings,
    index_name,
    merge_index,
    shard_name,
)
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.metadata import Metadata, RankTree, encode
from ray_ckpt.plan import make_plan
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.snapshot import SaveId, Segment, needed_nbytes, take_snapshot
from ray_ckpt.storage import Store, open_store
from ray_ckpt.target import read_state
from ray_ckpt.types import METADATA_KEY, Layout, Plan, RankPlan
from ray_ckpt.writer import write_shard

PREFIX = "model.ckpt-5"


def save(states: Sequence[Any], url: str | Path | None = None, **settings: int) -> StoredCheckpoint:
    """The checkpoint of one state a rank, opened; ``settings`` are the plan's."""
    store = open_store(url or f"memory://{uuid.uuid4().hex}")
    found = [layout_of(state, rank, len(states)) for rank, state in enumerate(states)]
    plan = make_plan([layout for layout, _ in found], **settings)
    num_shards = plan.num_writers + 1
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run
            for mine, (layout, values) in zip(plan.ranks, found, strict=True)
            for run in write_rank(store, Path(folder), mine, layout, values, len(states), num_shards)
        ]
    runs.append(write_metadata(store, plan, [layout for layout, _ in found], num_shards))
    store.put(index_name(PREFIX), merge_index(runs, num_shards))
    return open_checkpoint(store, PREFIX)


def restore(stored: StoredCheckpoint, like: Any, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    """`read_state`, built, for the only rank."""
    return read_state(stored, like, rank=rank, world_size=world_size, **options)()


def same(a: Any, b: Any) -> None:
    """Assert that two trees of dicts, lists and tuples are equal in structure, types and every bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, (np.ndarray, np.generic)) and not isinstance(a, (str, bytes)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tolist() == b.tolist() if a.dtype.kind in "OSU" else a.tobytes() == b.tobytes()
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b)
    else:
        assert repr(a) == repr(b)


def write_rank(
    store: Store, folder: Path, plan: RankPlan, layout: Layout, values: Sequence[Any], world_size: int, num_shards: int
) -> Iterator[bytes]:
    """One rank's data shards; their runs."""
    path = folder / str(plan.rank)
    save_id = SaveId("run", 2, 5, plan.rank, world_size, plan.plan_id, "steps")
    with Segment.create(path, needed_nbytes(plan, layout, values)) as segment:
        take_snapshot(segment, plan, layout, values, save_id)
        for writer in range(len(plan.writers)):
            report = write_shard(
                path,
                generation=2,
                step=5,
                plan_id=plan.plan_id,
                writer=writer,
                store=store,
                prefix=PREFIX,
                shard_id=plan.writer_base + writer,
                num_shards=num_shards,
                attempt="e1-1",
                attempt_try=0,
            )
            yield report.run


def write_metadata(store: Store, plan: Plan, layouts: Sequence[Layout], num_shards: int) -> bytes:
    """The last shard, which is the metadata; its run, with the entries of tensors in slices."""
    ranks: dict[str, list[int]] = {}
    for rank, layout in enumerate(layouts):
        ranks.setdefault(layout.tree, []).append(rank)
    metadata = Metadata(
        step=5,
        attempt="e1-1",
        generation=2,
        world_size=len(layouts),
        time=0.0,
        trees=tuple(RankTree(tuple(mine), tree) for tree, mine in ranks.items()),
        kinds={leaf.name: leaf.kind for layout in layouts for leaf in layout.leaves},
    )
    raw, crc = encode_strings([encode(metadata)], ())
    shard_id = num_shards - 1
    store.put(shard_name(PREFIX, shard_id, num_shards), raw)
    pairs = [(METADATA_KEY.encode(), encode_piece("string", (), shard_id, 0, len(raw), crc))]
    pairs += [
        (tensor.name.encode(), encode_partitioned(tensor.dtype, tensor.shape, tensor.boxes))
        for tensor in plan.tensors
        if len(tensor.boxes) > 1
    ]
    return encode_run(sorted(pairs))
