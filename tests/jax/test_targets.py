"""Targets that fit, in forms that JAX has more than one of, and those that do not, which are errors that say why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import MismatchError, StateError
from tests.target.saving import restore, save

jax = pytest.importorskip("jax")
jnp = jax.numpy
P = jax.sharding.PartitionSpec
W = np.arange(96, dtype=np.float32).reshape(12, 8)


def mesh(*sizes: int, names: str = "ab", kind: str = "Auto") -> Any:
    types = (getattr(jax.sharding.AxisType, kind),) * len(sizes)
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple(names[: len(sizes)]), devices=devices, axis_types=types)


def named(mesh: Any, *spec: Any, **more: Any) -> Any:
    return jax.sharding.NamedSharding(mesh, P(*spec), **more)


def target(sharding: Any, shape: tuple[int, ...] = W.shape, dtype: Any = np.float32) -> Any:
    return {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}


@pytest.fixture(scope="module")
def stored() -> Any:
    return save([{"w": jax.device_put(W, named(mesh(4, 2), "a", "b")), "keys": jax.random.split(jax.random.key(1), 4)}])


def check(got: Any, sharding: Any) -> None:
    assert got.sharding == sharding
    assert all(np.array_equal(shard.data, W[shard.index]) for shard in got.addressable_shards)


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host", "device"])
@pytest.mark.parametrize("sizes", [(2, 4), (1, 1)])
def test_memory_kinds(stored: Any, kind: str, sizes: tuple[int, ...]) -> None:
    sharding = named(mesh(*sizes), "a", "b", memory_kind=kind)
    got = restore(stored, target(sharding), partial=True)["w"]
    check(got, sharding)
    assert got.sharding.memory_kind == kind
    check(restore(save([{"w": got}]), target(named(mesh(8), None)))["w"], named(mesh(8), None))


def test_shardings_on_an_abstract_mesh_are_of_the_mesh_that_is_set(stored: Any) -> None:
    explicit = mesh(2, 4, kind="Explicit")
    abstract = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=named(explicit.abstract_mesh, "a", "b"))
    with jax.set_mesh(explicit):
        check(restore(stored, {"w": abstract}, partial=True)["w"], named(explicit, "a", "b"))
        made = jax.jit(lambda: {"w": jax.reshard(jnp.zeros(W.shape), P("b", "a"))})
        check(restore(stored, made, partial=True)["w"], named(explicit, "b", "a"))
    with pytest.raises(
        StateError, match=r"w: the target's sharding .* abstract mesh .*inside `with jax.set_mesh\(mesh\)`"
    ):
        restore(stored, {"w": abstract}, partial=True)
    with jax.set_mesh(mesh(8, kind="Explicit")), pytest.raises(StateError, match="w: the target's sharding"):
        restore(stored, {"w": abstract}, partial=True)


def test_a_mesh_that_does_not_divide_the_shape(stored: Any) -> None:
    sharding = named(mesh(8), "a")
    with pytest.raises(
        StateError, match=r"w: the target's sharding does not fit its shape \(12, 8\): .*divide"
    ) as error:
        restore(stored, target(sharding), partial=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((12, 4), np.float32, r"w: expected float32\[12,4\], found float32\[12,8\]"),
        ((96,), np.float32, r"w: expected float32\[96\], found float32\[12,8\]"),
        ((12, 8), jnp.bfloat16, r"w: expected bfloat16\[12,8\], found float32\[12,8\] \(another dtype\)"),
        ((12, 8), jnp.float8_e8m0fnu, "w: numpy dtype 'float8_e8m0fnu' cannot be stored"),
    ],
)
def test_another_shape_or_dtype(stored: Any, shape: tuple[int, ...], dtype: Any, text: str) -> None:
    with pytest.raises((MismatchError, StateError), match=text):
        restore(stored, target(named(mesh(2), None), shape, dtype), partial=True)


def test_keys_of_another_implementation_are_other_keys() -> None:
    for impl in ("rbg", "unsafe_rbg", "threefry2x32"):
        keys = jax.device_put(jax.random.split(jax.random.key(2, impl=impl), 8), named(mesh(4, 2), "a"))
        like = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=named(mesh(2, 4), "b"))
        got = restore(save([{"k": keys}]), {"k": like})["k"]
        assert (got.dtype, got.sharding) == (keys.dtype, like.sharding)
        assert np.array_equal(jax.random.key_data(got), jax.random.key_data(keys))
    stored = save([{"k": jax.random.key(1, impl="rbg")}])
    with pytest.raises(MismatchError, match=r"k: expected a key of unsafe_rbg, found one of rbg.*impl='rbg'"):
        restore(stored, {"k": jax.random.key(0, impl="unsafe_rbg")})
    with pytest.raises(MismatchError, match=r"k: expected uint32\[2\], found uint32\[4\]"):
        restore(stored, {"k": jax.random.key(0)})


KEYS = 4


def key_target(sharding: Any) -> Any:
    return {"keys": jax.ShapeDtypeStruct((KEYS,), jax.random.key(0).dtype, sharding=sharding)}


def check_keys(got: Any, sharding: Any) -> None:
    assert got.sharding == sharding
    parts = [(shard.index, np.asarray(jax.random.key_data(shard.data))) for shard in got.addressable_shards]
    every = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), KEYS)))
    assert all(np.array_equal(part, every[index]) for index, part in parts)


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host", "device"])
@pytest.mark.parametrize("sizes", [(2, 4), (1, 1)])
def test_keys_in_every_kind_of_memory(stored: Any, kind: str, sizes: tuple[int, ...]) -> None:
    sharding = named(mesh(*sizes), "a", memory_kind=kind)
    got = restore(stored, key_target(sharding), partial=True)["keys"]
    check_keys(got, sharding)
    assert {shard.data.sharding.memory_kind for shard in got.addressable_shards} == {kind}


def test_keys_on_an_abstract_mesh_are_on_the_mesh_that_is_set(stored: Any) -> None:
    explicit = mesh(2, 4, kind="Explicit")
    like = key_target(named(explicit.abstract_mesh, "b"))
    with jax.set_mesh(explicit):
        got = restore(stored, like, partial=True)["keys"]
    check_keys(got, named(explicit, "b"))
    with pytest.raises(StateError, match=r"keys: the target's sharding .* abstract mesh"):
        restore(stored, like, partial=True)


def test_a_mesh_that_does_not_divide_the_keys(stored: Any) -> None:
    with pytest.raises(StateError, match=r"keys: the target's sharding does not fit its shape \(4,\): .*divide"):
        restore(stored, key_target(named(mesh(8), "a")), partial=True)


def test_raw_keys_become_typed_ones_and_back() -> None:
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    assert restore(save([{"k": raw}]), {"k": typed})["k"].dtype == typed.dtype
    assert np.array_equal(restore(save([{"k": typed}]), {"k": raw})["k"], raw)


FLOATS = ["float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn", "float16"]


@pytest.mark.parametrize("dtype", [*FLOATS, "uint4", "int2", "uint2", "int8"])
def test_narrow_dtypes_keep_their_bits_on_another_mesh(dtype: str) -> None:
    values = jnp.asarray(W % 2).astype(dtype)
    saved = save([{"w": jax.device_put(values, named(mesh(4, 2), "a", "b"))}])
    sharding = named(mesh(2, 4), "b", "a")
    got = restore(saved, target(sharding, dtype=values.dtype))["w"]
    assert (got.sharding, got.dtype) == (sharding, values.dtype)
    assert np.asarray(got).tobytes() == np.asarray(values).tobytes()


@pytest.mark.parametrize("dtype", ["float8_e3m4", "float8_e4m3", "float8_e8m0fnu"])
def test_dtypes_that_tensorflow_has_not_are_named(dtype: str) -> None:
    with pytest.raises(
        StateError, match=rf"w: numpy dtype '{dtype}' cannot be stored in a TensorFlow checkpoint; cast"
    ):
        save([{"w": jnp.zeros(3, dtype)}])


def test_scalars_stay_weakly_typed() -> None:
    lr, count = jnp.asarray(0.1), jnp.asarray(7)
    assert lr.weak_type
    state = {"lr": lr, "count": count, "strong": jnp.float32(0.5), "mesh": jax.device_put(2.5, named(mesh(2, 4)))}
    stored = save([state])
    for target in (state, jax.eval_shape(lambda: state)):
        got = restore(stored, target)
        assert {name: value.weak_type for name, value in got.items()} == {
            "lr": True,
            "count": True,
            "strong": False,
            "mesh": True,
        }
        assert {name: value.dtype for name, value in got.items()} == {name: v.dtype for name, v in state.items()}
        assert all(got[name] == state[name] for name in state)
        assert (got["lr"] * jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert restore(stored, state)["mesh"].sharding == state["mesh"].sharding


def test_a_function_that_makes_other_leaves(stored: Any) -> None:
    with pytest.raises(MismatchError, match=r"(?s)1 missing.*bias.*1 unexpected.*keys"):
        restore(stored, jax.jit(lambda: {"w": jnp.zeros(W.shape), "bias": jnp.zeros(8)}))
