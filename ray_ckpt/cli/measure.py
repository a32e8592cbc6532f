"""How fast this host is: a snapshot, a shard written and read back, by the code that a save runs."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ray_ckpt.bundle import shard_name
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.models import Rates
from ray_ckpt.plan import make_plan
from ray_ckpt.snapshot import SaveId, Segment, default_folder, take_snapshot
from ray_ckpt.storage import Store
from ray_ckpt.writer import write_shard

NBYTES = 256 << 20
REPEATS = 3


def measure(store: Store, nbytes: int = NBYTES) -> Rates:
    """Best of three each; leaves nothing in the store.

    Raises:
        StorageError: the store or this machine's memory for snapshots cannot be used.
    """
    state = {f"w{i}": np.full(nbytes // 16, i, np.float32) for i in range(4)}
    layout, values = layout_of(state, 0, 1)
    plan = make_plan([layout], max_writers_per_rank=1)
    folder = default_folder("measure").parent
    prefix = f"_ray_ckpt_measure-{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "segment"
        with Segment.create(path, plan.ranks[0].fixed_nbytes) as segment:
            segment.populate()
            save = SaveId("measure", 0, 0, 0, 1, plan.plan_id, "measure")

            def snapshot() -> None:
                segment.release()
                take_snapshot(segment, plan.ranks[0], layout, values, save)

            def write() -> None:
                write_shard(
                    path,
                    generation=0,
                    step=0,
                    plan_id=plan.plan_id,
                    writer=0,
                    store=store,
                    prefix=prefix,
                    shard_id=0,
                    num_shards=1,
                    attempt="measure",
                    attempt_try=0,
                )

            name, buffer = shard_name(prefix, 0, 1), memoryview(bytearray(plan.ranks[0].fixed_nbytes))
            try:
                taken = _best(snapshot), _best(write), _best(lambda: store.read_into(name, 0, buffer))
            finally:
                store.delete(name)
    snapshot_rate, write_rate, read_rate = (len(buffer) / seconds for seconds in taken)
    cached = " from the page cache" if store.url.startswith("file://") else ""
    origin = f"measured here with {store.url}, one writer and one reader, which reads{cached} and verifies nothing"
    return Rates(snapshot_rate, write_rate, read_rate, origin)


def _best(call: Callable[[], None]) -> float:
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)
