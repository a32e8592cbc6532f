"""JAX states on eight CPU devices: other meshes, other axes, abstract targets, functions."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves import PerWorker, Slice
from ray_ckpt.restore import read_boxes
from ray_ckpt.target import is_abstract, values

from .saving import restore, save

jax = pytest.importorskip("jax")
jnp = jax.numpy
P = jax.sharding.PartitionSpec
W = np.arange(64, dtype=np.float32).reshape(8, 8)

MESHES = {
    "rows": ((8,), ("a",), P("a")),
    "columns": ((8,), ("a",), P(None, "a")),
    "grid": ((2, 4), ("a", "b"), P("a", "b")),
    "turned": ((4, 2), ("a", "b"), P("b", "a")),
    "half": ((2, 4), ("a", "b"), P("a")),
    "both": ((2, 4), ("a", "b"), P(("b", "a"))),
    "replicated": ((8,), ("a",), P()),
    "two": ((2,), ("a",), P("a")),
    "one": ((1,), ("a",), P()),
}


def sharding(name: str) -> Any:
    shape, axes, spec = MESHES[name]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.NamedSharding(jax.sharding.Mesh(devices, axes), spec)


def placed(name: str, values: Any = W) -> Any:
    return jax.device_put(values, sharding(name))


def check(got: Any, values: Any, expected: Any) -> None:
    """Equal bits in each shard, on the expected sharding."""
    assert isinstance(got, jax.Array)
    assert got.sharding == expected
    assert got.dtype == values.dtype
    for shard in got.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(values[shard.index]).tobytes()


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", ["rows", "grid", "replicated", "one"])
def test_from_any_mesh_to_any_other(before: str, after: str) -> None:
    stored = save([{"w": placed(before), "b": jnp.arange(3)}], cut_nbytes=64)
    abstract = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=sharding(after))
    for like in (abstract, placed(after, np.zeros_like(W))):
        got = restore(stored, {"w": like, "b": jax.ShapeDtypeStruct((3,), np.int32)})
        check(got["w"], W, sharding(after))
        assert got["b"].tolist() == [0, 1, 2]


def test_slices_of_ranks_into_a_sharded_array() -> None:
    stored = save([{"w": Slice(jnp.asarray(W[2 * r : 2 * r + 2]), (8, 8), (2 * r, 0))} for r in range(4)])
    got = restore(stored, {"w": jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=sharding("turned"))})
    check(got["w"], W, sharding("turned"))
    part = restore(stored, {"w": Slice(jax.ShapeDtypeStruct((8, 3), W.dtype), (8, 8), (0, 4))})["w"]
    np.testing.assert_array_equal(part.array, W[:, 4:7])


def test_an_abstract_state_is_told_from_one_with_values() -> None:
    leaf = jax.ShapeDtypeStruct((2,), np.float32)
    for abstract in (None, leaf, {"a": [1, leaf]}, {"a": PerWorker(leaf)}, Slice(leaf, (4,), (0,))):
        assert is_abstract(abstract)
    for state in ({}, {"a": jnp.zeros(2), "b": PerWorker(1), "c": None}, [Slice(np.zeros(2), (4,), (0,))]):
        assert not is_abstract(state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "bool", "complex64", "uint32"])
def test_dtypes(dtype: str) -> None:
    values = jnp.asarray(W % 2).astype(dtype)
    got = restore(save([{"w": values}]), {"w": placed("grid", jnp.zeros_like(values))})
    check(got["w"], np.asarray(values), sharding("grid"))


def test_nan_payloads() -> None:
    bits = np.array([0x7FC0_BEEF, 0xFFC0_0001], np.uint32).view(np.float32)
    got = restore(save([{"w": jnp.asarray(bits)}]), {"w": jax.ShapeDtypeStruct((2,), np.float32)})
    assert np.asarray(got["w"]).tobytes() == bits.tobytes()


def test_keys() -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    stored = save([{"keys": keys, "own": PerWorker(jax.random.key(r))} for r in range(2)])
    like = {"keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype), "own": PerWorker(jax.random.key(9))}
    for target in (like, None, lambda: 1 / 0):
        got = restore(stored, target, 1, 2)
        assert got["keys"].dtype == keys.dtype
        np.testing.assert_array_equal(jax.random.key_data(got["keys"]), jax.random.key_data(keys))
        np.testing.assert_array_equal(jax.random.key_data(got["own"].value), jax.random.key_data(jax.random.key(1)))


def test_missing_abstract_leaves_have_nothing_to_keep() -> None:
    stored = save([{"w": placed("rows")}])
    like = {"w": jnp.zeros_like(W), "x": jax.ShapeDtypeStruct((), np.int32), "y": 1}
    text = "(?s)1 without a value to keep:\n    x: missing in the checkpoint, and.*; pass a state with values"
    with pytest.raises(MismatchError, match=text):
        restore(stored, like, partial=True)
    donated = jnp.zeros(3)
    donated.delete()
    with pytest.raises(MismatchError, match="1 without a value to keep:\n    x"):
        restore(stored, {**like, "x": donated}, partial=True)


def test_a_donated_array_is_still_a_target() -> None:
    like = placed("rows", W * 0)
    like.delete()
    check(restore(save([{"w": W}]), {"w": like})["w"], W, sharding("rows"))


def test_wide_types_are_an_error_not_a_loss() -> None:
    with pytest.raises(MismatchError, match=r"w: .*jax_enable_x64"):
        restore(save([{"w": np.zeros(2)}]), {"w": jax.ShapeDtypeStruct((2,), np.float64)})


def test_cast_onto_a_mesh() -> None:
    like = {"w": jax.ShapeDtypeStruct(W.shape, jnp.bfloat16, sharding=sharding("grid"))}
    stored = save([{"w": placed("rows")}])
    with pytest.raises(MismatchError, match=r"w: expected bfloat16\[8,8\], found float32\[8,8\]"):
        restore(stored, like)
    check(restore(stored, like, cast=True)["w"], W.astype(jnp.bfloat16), sharding("grid"))


Train = namedtuple("Train", "w step name own")


def train(value: float, own: int, on_resize: Any = "error") -> Train:
    return Train(jnp.full((4,), value), 3, "run", PerWorker(jnp.asarray(own), on_resize))


def test_a_function_is_traced_for_other_containers() -> None:
    stored = save([train(2, 10 + rank) for rank in range(2)])
    concrete = []

    def make() -> Train:
        state = train(0, 0)
        concrete.append(not isinstance(state.w, jax.core.Tracer))
        return state

    got = restore(stored, make, 1, 2)
    assert concrete == [False]
    assert (type(got), got.w.tolist(), got.step, got.name) == (Train, [2] * 4, 3, "run")
    assert got.own.value.tolist() == 11
    assert restore(stored, lambda: train(0, 0, "first"), 0, 1).own.value.tolist() == 10
    with pytest.raises(MismatchError, match='own: on_resize="init" needs the value itself'):
        restore(stored, lambda: train(0, 0, "init"), 0, 1)
    with pytest.raises(StateError, match=r"jax.eval_shape cannot tell.*Concretization.*: pass a state"):
        restore(stored, lambda: Train(float(jnp.ones(())), 0, "", 0), 1, 2)


def test_a_traced_function_keeps_its_slices() -> None:
    stored = save([{"w": Slice(jnp.asarray(W[4 * r : 4 * r + 4]), (8, 8), (4 * r, 0))} for r in range(2)])
    got = restore(stored, lambda: {"w": Slice(jnp.zeros((8, 2)), (8, 8), (0, 6))}, 3, 4)["w"]
    assert (type(got), got.offset) == (Slice, (0, 6))
    check(got.array, W[:, 6:], jnp.zeros(1).sharding)


def test_a_jitted_function_gives_its_shardings() -> None:
    stored = save([{"w": placed("rows"), "n": jnp.asarray(3)}])
    shardings = {"w": sharding("grid"), "n": sharding("replicated")}
    make = jax.jit(lambda: {"w": jnp.zeros((8, 8)), "n": jnp.asarray(0)}, out_shardings=shardings)
    got = restore(stored, make)
    check(got["w"], W, sharding("grid"))
    check(got["n"], np.int32(3), sharding("replicated"))
    other = jax.jit(lambda: {"w": jnp.zeros((8, 4)), "n": jnp.asarray(0)})
    with pytest.raises(MismatchError, match=r"w: expected float32\[8,4\], found float32\[8,8\]"):
        restore(stored, other)


def test_a_function_must_place_what_spans_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = save([{"w": placed("rows")}])
    assert stored.metadata is not None
    stored = replace(stored, metadata=replace(stored.metadata, kinds={"w": "jax:global"}))

    def make() -> Any:
        return {"w": jnp.zeros((8, 8))}

    check(restore(stored, make)["w"], W, jnp.zeros(1).sharding)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(StateError, match=r"w was sharded over processes.*does not say.*jitted with out_shardings"):
        restore(stored, make)
    check(restore(stored, jax.jit(make, out_shardings=sharding("grid")))["w"], W, sharding("grid"))


def test_the_structure_alone_gives_jax_arrays_on_the_default_device() -> None:
    stored = save([{"w": placed("grid"), "host": W, "step": 3}])
    for like in (None, lambda: 1 / 0):
        got = restore(stored, like)
        check(got["w"], W, jnp.zeros(1).sharding)
        assert isinstance(got["host"], np.ndarray)
        assert got["step"] == 3


@pytest.mark.parametrize("name", ["one", "rows", None])
def test_large_arrays_become_jax_arrays_without_a_copy(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    saved = np.arange(8 << 18, dtype=np.float32).reshape(8, -1)
    like = jax.ShapeDtypeStruct(saved.shape, np.float32, sharding=sharding(name) if name else None)
    read: list[int] = []

    def noted(stored: Any, wanted: Any, **options: Any) -> None:
        read.extend(array.ctypes.data for _, _, array in wanted)
        read_boxes(stored, wanted, **options)

    monkeypatch.setattr(values, "read_boxes", noted)
    restored = restore(save([{"w": saved}]), {"w": like})["w"]
    assert sorted(shard.data.unsafe_buffer_pointer() for shard in restored.addressable_shards) == sorted(read)
    assert np.array_equal(restored, saved)
    # JAX must not write over memory that is ours, when it is told that it may.
    assert np.array_equal(jax.jit(lambda x: x + 1, donate_argnums=0)(restored), saved + 1)
