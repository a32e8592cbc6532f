"""One process of several that hold JAX arrays together: ``python child.py PORT PROCESS COUNT JOB``, JOB as JSON.

``{"do": "save", "url", "ranks", "devices"}`` saves the state: process p as rank ``ranks[p]``, on a mesh that has the
devices in the order of ``devices``. ``{"do": "restore", "url"}`` restores it on all meshes that these processes can
have. Prints what it found as JSON; any difference is an error.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ray_ckpt.bundle import index_name, merge_index
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.plan import make_plan
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import open_store
from ray_ckpt.target import read_state
from tests.target.saving import PREFIX, write_metadata, write_rank

DEVICES_A_PROCESS = 2
SPECS = {
    "rows": P(("host", "local")),
    "columns": P(None, "host"),
    "grid": P("local", "host"),
    "partly": P("local"),
    "half": P("host"),
    "whole": P(),
    "stage": P("local"),
    "stage_copies": P(),
}
VALUES = {name: np.random.default_rng(i).random((96, 192)).astype(np.float32) for i, name in enumerate(SPECS)}
VALUES["whole"] = np.random.default_rng(9).random((2048, 1024)).astype(np.float32)


def shardings(order: list[int]) -> dict[str, NamedSharding]:
    """On all devices, in this order of their places in `jax.devices`, as hosts x local; stages on the last ones."""
    devices = np.array([jax.devices()[i] for i in order]).reshape(-1, DEVICES_A_PROCESS)
    mesh, stage = Mesh(devices, ("host", "local")), Mesh(devices[-1:], ("host", "local"))
    return {name: NamedSharding(stage if name.startswith("stage") else mesh, spec) for name, spec in SPECS.items()}


def keys() -> Any:
    """Some typed keys."""
    return jax.random.split(jax.random.key(5), 8)


def key_sharding(order: list[int]) -> NamedSharding:
    """One key a device, or all on each where there are not eight devices or fewer."""
    mesh = shardings(order)["rows"].mesh
    return NamedSharding(mesh, P() if 8 % mesh.size else P(("host", "local")))


def state_on(order: list[int]) -> dict[str, Any]:
    """The state, each element of an array from its global index."""
    found = {
        name: jax.make_array_from_callback(
            VALUES[name].shape, sharding, lambda index, v=VALUES[name]: v[index], dtype=np.float32
        )
        for name, sharding in shardings(order).items()
    }
    on_stage = jax.make_array_from_callback(
        (8,), shardings(order)["stage_copies"], lambda index: keys()[index], dtype=keys().dtype
    )
    made = jax.jit(keys, out_shardings=key_sharding(order))()
    return found | {"keys": made, "stage_keys": on_stage, "step": 7}


def gathered(own: bytes) -> list[bytes]:
    """What every process passed, by process."""
    sizes = multihost_utils.process_allgather(np.array([len(own)])).reshape(-1)
    padded = np.frombuffer(own.ljust(int(max(sizes)), b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row.tobytes()[:size] for row, size in zip(rows, sizes, strict=True)]


def save(url: str, ranks: list[int], devices: list[int]) -> dict[str, Any]:
    """Bytes that each rank writes."""
    me, count = jax.process_index(), jax.process_count()
    store = open_store(url)
    layout, values = layout_of(state_on(devices), ranks[me], count)
    for leaf, value in zip(layout.leaves, values, strict=True):
        assert bool(leaf.boxes) is bool(not isinstance(value, jax.Array) or value.addressable_shards), leaf
    by_process = [pickle.loads(raw) for raw in gathered(pickle.dumps(layout))]
    layouts = [by_process[ranks.index(rank)] for rank in range(count)]
    plan = make_plan(layouts, cut_nbytes=1 << 20)
    num_shards = plan.num_writers + 1
    with tempfile.TemporaryDirectory() as folder:
        mine = plan.ranks[ranks[me]]
        runs = list(write_rank(store, Path(folder), mine, layout, values, count, num_shards))
    every = [run for raw in gathered(pickle.dumps(runs)) for run in pickle.loads(raw)]
    if me == 0:
        every.append(write_metadata(store, plan, layouts, num_shards))
        store.put(index_name(PREFIX), merge_index(every, num_shards))
    multihost_utils.sync_global_devices("saved")
    return {"nbytes": [rank.fixed_nbytes for rank in plan.ranks], "checks": [len(rank.checks) for rank in plan.ranks]}


def restore(url: str) -> dict[str, Any]:
    """Restores onto the devices as they are and reversed; raises where a shard is not to the bit what was saved."""
    me, count = jax.process_index(), jax.process_count()
    stored = open_checkpoint(open_store(url), PREFIX)
    order = list(range(jax.device_count()))
    for devices in (order, order[::-1]):
        like = {
            name: jax.ShapeDtypeStruct(VALUES[name].shape, np.float32, sharding=sharding)
            for name, sharding in shardings(devices).items()
        }
        sharded = jax.ShapeDtypeStruct((8,), jax.eval_shape(keys).dtype, sharding=key_sharding(devices))
        staged = jax.ShapeDtypeStruct((8,), sharded.dtype, sharding=like["stage_copies"].sharding)
        target = like | {"keys": sharded, "stage_keys": staged, "step": 0}
        got = read_state(stored, target, rank=me, world_size=count)()
        for name in like:
            assert got[name].sharding == like[name].sharding, name
            for shard in got[name].addressable_shards:
                assert np.asarray(shard.data).tobytes() == VALUES[name][shard.index].tobytes(), name
        assert got["step"] == 7
        for name in ("keys", "stage_keys"):
            assert got[name].sharding.is_equivalent_to(target[name].sharding, 1), name
            for shard in got[name].addressable_shards:
                assert np.array_equal(jax.random.key_data(shard.data), jax.random.key_data(keys())[shard.index]), name
    return {}


def main(port: str, process: str, count: str, job: str) -> None:
    """Join the others and do the job."""
    jax.config.update("jax_num_cpu_devices", DEVICES_A_PROCESS)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
    options = json.loads(job)
    what = {"save": save, "restore": restore}[options.pop("do")]
    print(json.dumps(what(**options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
