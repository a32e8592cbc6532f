"""jax.Array leaves on four CPU devices, and across two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves import build, describe, jax_leaf, parts, read_box, start_transfers, wanted
from ray_ckpt.types import Box
from tests.ports import held_port

jax = pytest.importorskip("jax")
P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module")
def mesh() -> Any:
    assert len(jax.devices()) == 8, "XLA_FLAGS must be set before JAX makes its first array"
    return jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))


def placed(mesh: Any, array: Any, *spec: Any) -> Any:
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, P(*spec)))


SPECS = [(), ("a",), ("b", "a"), (("a", "b"),), (None, "a")]


@pytest.mark.parametrize("spec", SPECS)
def test_a_local_array_is_held_whole_however_it_is_sharded(mesh: Any, spec: tuple[Any, ...]) -> None:
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    array = placed(mesh, values, *spec)
    leaf = describe("w", array, 0, 1)
    assert (leaf.dtype, leaf.shape, leaf.boxes, leaf.kind) == ("float32", (4, 8), (Box((0, 0), (4, 8)),), "jax")
    start_transfers([(array, leaf.boxes[0])])
    for box in (leaf.boxes[0], Box((1, 3), (2, 4))):
        np.testing.assert_array_equal(read_box(array, leaf, box), values[box.slices])
        assert sum(part.size for part, _ in parts(array, box)) == box.size


@pytest.mark.parametrize("spec", SPECS)
def test_restored_onto_the_sharding_of_the_target(mesh: Any, spec: tuple[Any, ...]) -> None:
    values = np.arange(32, dtype=np.int32).reshape(4, 8)
    array = placed(mesh, np.zeros_like(values), *spec)
    abstract = jax.ShapeDtypeStruct((4, 8), np.int32, sharding=array.sharding)
    for like in (array, abstract):
        dtype, shape, boxes = wanted("w", like)
        assert (dtype, shape) == ("int32", (4, 8))
        assert sum(box.size for box in boxes) == 32
        got = build("jax", like, {box: values[box.slices] for box in boxes})
        assert got.sharding == array.sharding
        np.testing.assert_array_equal(got, values)


def test_without_a_sharding_the_array_is_on_the_default_device() -> None:
    like = jax.ShapeDtypeStruct((3,), np.float32)
    ((box,), values) = wanted("w", like).boxes, np.arange(3, dtype=np.float32)
    got = build("jax", like, {box: values})
    assert isinstance(got, jax.Array)
    np.testing.assert_array_equal(got, values)
    assert isinstance(build("jax", None, {box: values}), jax.Array)


def test_values_that_jax_would_narrow_stay_exact() -> None:
    box, values = Box((0,), (2,)), np.array([1 / 3, 2**40])
    assert build("jax", None, {box: values}).dtype == np.float64
    with pytest.raises(MismatchError, match="jax_enable_x64"):
        build("jax", jax.ShapeDtypeStruct((2,), np.float64), {box: values})


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "bool", "complex64"])
def test_other_dtypes(dtype: str) -> None:
    array = jax.numpy.array([0, 1, 1], dtype)
    leaf = describe("w", array, 0, 1)
    assert leaf.dtype == dtype
    host = read_box(array, leaf, leaf.boxes[0])
    assert build("jax", array, {leaf.boxes[0]: host}).tolist() == array.tolist()


@pytest.mark.parametrize("shape", [(), (4,)])
def test_keys_are_stored_as_their_data(mesh: Any, shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(7), shape) if shape else jax.random.key(7)
    if shape:
        keys = placed(mesh, keys, "a")
    leaf = describe("rng", keys, 0, 1)
    assert (leaf.dtype, leaf.shape, leaf.kind) == ("uint32", (*shape, 2), "jax:key:threefry2x32")
    start_transfers([(keys, leaf.boxes[0])])
    data = read_box(keys, leaf, leaf.boxes[0])
    abstract = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=keys.sharding)
    for like in (keys, abstract, jax.ShapeDtypeStruct(keys.shape, keys.dtype), None):
        if like is not None:
            assert wanted("rng", like) == ("uint32", leaf.shape, leaf.boxes)
        got = build(leaf.kind, like, {leaf.boxes[0]: data})
        assert got.dtype == keys.dtype
        np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(keys))


def test_what_has_no_value_is_named() -> None:
    array = jax.numpy.ones(3)
    array.delete()
    with pytest.raises(StateError, match=r"w: the jax.Array is deleted.*donate"):
        describe("w", array, 0, 1)
    with pytest.raises(StateError, match="w: an abstract value"):
        describe("w", jax.ShapeDtypeStruct((3,), np.float32), 0, 1)

    def traced(x: Any) -> Any:
        describe("w", x, 0, 1)
        return x

    with pytest.raises(StateError, match="w: a traced value"):
        jax.jit(traced)(1.0)


class Device:
    def __init__(self, process_index: int) -> None:
        self.process_index = process_index


class Sharding:
    """A sharding over devices of several processes: rows of an (8,) array by device."""

    def __init__(self, rows: list[tuple[int, int, int]]) -> None:
        self.rows = rows

    def devices_indices_map(self, shape: Any) -> Any:
        return {Device(process): (slice(start, stop),) for process, start, stop in self.rows}


def test_boxes_of_processes_are_equal_or_disjoint() -> None:
    # Merging each process's own shards would give [0:4] and [2:6]: overlapping, not equal.
    sharding = Sharding([(0, 0, 2), (0, 2, 4), (1, 2, 4), (1, 4, 6), (1, 6, 8)])
    held = [jax_leaf._held_boxes(sharding, (8,), process) for process in (0, 1)]
    assert held[0] == (Box((0,), (2,)), Box((2,), (2,)))
    assert held[1] == (Box((2,), (2,)), Box((4,), (4,)))


CHILD = """
import json, sys
import jax, numpy as np
port, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from ray_ckpt.leaves import build, describe, read_box, wanted
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("host", "local"))
values = np.arange(32, dtype=np.float32).reshape(4, 8)
out = {}
for name, spec in {"rows": ("host",), "grid": ("local", "host"), "whole": (), "local": ("local",)}.items():
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    array = jax.make_array_from_callback((4, 8), sharding, lambda index: values[index])
    leaf = describe(name, array, int(process), 2)
    for box in leaf.boxes:
        np.testing.assert_array_equal(read_box(array, leaf, box), values[box.slices])
    back = build(leaf.kind, array, {box: 2 * values[box.slices] for box in wanted(name, array).boxes})
    for shard in back.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * values[shard.index])
    out[name] = [leaf.kind, [[box.offset, box.shape] for box in leaf.boxes]]
keys = jax.random.split(jax.random.key(1), 4)
print(json.dumps(out))
"""


def test_arrays_across_two_processes() -> None:
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    with held_port() as port:
        command = [sys.executable, "-c", CHILD, str(port)]
        children = [
            subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]
        results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in results)
    assert first["rows"] == ["jax:global", [[[0, 0], [2, 8]]]]
    assert second["rows"] == ["jax:global", [[[2, 0], [2, 8]]]]
    assert first["grid"] == ["jax:global", [[[0, 0], [4, 4]]]]
    assert second["grid"] == ["jax:global", [[[0, 4], [4, 4]]]]
    for name in ("whole", "local"):
        assert first[name] == second[name] == ["jax:global", [[[0, 0], [4, 8]]]]
