"""A state of slices, restored as JAX arrays that span two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ray_ckpt.leaves import PerWorker, Slice
from tests.ports import held_port

from .saving import save

pytest.importorskip("jax")

CHILD = """
import sys
import jax, numpy as np
port, process, url, prefix = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import PerWorker
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import open_store
from ray_ckpt.target import read_state
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("host", "local"))
values = np.arange(32, dtype=np.float32).reshape(4, 8)
stored = open_checkpoint(open_store(url), prefix)
for spec in (("host",), ("local", "host"), (None, ("host", "local")), ()):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    like = {"w": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=sharding), "own": PerWorker(0, lambda v, *_: sum(v))}
    make = jax.jit(lambda: {"w": jax.numpy.zeros((4, 8))}, out_shardings={"w": sharding})
    restored = (
        read_state(stored, like, rank=int(process), world_size=2)(),
        read_state(stored, make, rank=int(process), world_size=2, partial=True)(),
    )
    assert restored[0]["own"].value == 6
    for got in restored:
        assert got["w"].sharding == sharding and not got["w"].is_fully_addressable
        for shard in got["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])
print("done")
"""


def test_arrays_across_two_processes(tmp_path: Path) -> None:
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    rows = [(0, 1), (1, 2), (3, 1)]
    states = [
        {"w": Slice(values[start : start + count], (4, 8), (start, 0)), "own": PerWorker(rank + 1)}
        for rank, (start, count) in enumerate(rows)
    ]
    stored = save(states, tmp_path)
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    with held_port() as port:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(port), str(process), str(tmp_path), stored.prefix],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]
        try:
            results = [child.communicate(timeout=120) for child in children]
        finally:
            for child in children:
                child.kill()
    assert [child.returncode for child in children] == [0, 0], results
    assert [out for out, _ in results] == ["done\n", "done\n"]
