"""jax.Array, sharded over devices and processes, and typed PRNG keys (stored as their key data).

An array that spans processes (kind "jax:global") is stored by the boxes that this process holds. Shards are
merged only with shards that exactly the same processes hold: so boxes of different processes are equal or
disjoint, and each process finds the same ones from the sharding alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ray_ckpt.bundle import dtype_name
from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves.base import Array, Form, Parts, Wanted, boxes_by_holders, cut, merge_boxes, sole, whole
from ray_ckpt.types import Box, Shape

_GLOBAL = "jax:global"
_KEY = "jax:key:"


def matches(value: Any) -> bool:
    """True for arrays and their abstract form, if this process uses JAX at all."""
    jax = sys.modules.get("jax")
    # Both are missing while another thread is still importing JAX.
    types = tuple(filter(None, (getattr(jax, "Array", None), getattr(jax, "ShapeDtypeStruct", None))))
    return isinstance(value, types)


def describe(name: str, value: Any) -> Form:
    """The array's form; a key array's is that of its key data.

    Raises:
        StateError: the array is deleted (donated), traced, abstract, or of a dtype that no checkpoint holds.
    """
    _check_concrete(name, value)
    if not isinstance(value.dtype, np.dtype):
        data = _key_data(value)
        return Form(dtype_name(data.dtype), data.shape, _boxes(data), _KEY + _key_impl(value))
    try:
        stored = dtype_name(value.dtype)
    except StateError as err:
        raise StateError(f"{name}: {err}") from None
    kind = "jax" if value.is_fully_addressable else _GLOBAL
    return Form(stored, value.shape, _boxes(value), kind)


def token(value: Any) -> Any:
    """Abstract value and sharding; None for what `describe` may refuse."""
    jax = sys.modules["jax"]
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)) or value.is_deleted():
        return None
    return value.aval, value.sharding


def start_transfer(value: Any, box: Box) -> None:
    """Begin the copies from the devices that `parts` will wait for."""
    if not isinstance(value.dtype, np.dtype) or next(iter(value.sharding.device_set)).platform == "cpu":
        return
    for _, data in _sources(value, box):
        data.copy_to_host_async()


def parts(value: Any, box: Box) -> Parts:
    """One host array for each device shard that the box touches; views on the CPU backend."""
    if not isinstance(value.dtype, np.dtype):
        value = _key_data(value)
    found: Parts = []
    for held, data in _sources(value, box):
        common = box if held == box else held.intersect(box)
        if common is not None:
            found.append((common, cut(np.asarray(data), held, common)))
    return found


def wanted(name: str, like: Any) -> Wanted:
    """The distinct boxes of this process's devices; the whole for keys and where no sharding is given.

    Raises:
        StateError: a dtype that no checkpoint holds, or a sharding without devices or that does not divide the shape.
    """
    if not isinstance(like.dtype, np.dtype):
        jax: Any = sys.modules["jax"]
        if like.sharding is not None:
            # Only to tell early: each process reads the data of all keys.
            _fitting_boxes(name, like)
        data = jax.eval_shape(_key_data, jax.ShapeDtypeStruct(like.shape, like.dtype))
        return Wanted(dtype_name(data.dtype), data.shape, whole(data.shape))
    try:
        stored = _name_of(like.dtype)
    except StateError as err:
        raise StateError(f"{name}: {err}") from None
    boxes = whole(like.shape) if like.sharding is None else _fitting_boxes(name, like)
    return Wanted(stored, like.shape, boxes)


def _fitting_boxes(name: str, like: Any) -> tuple[Box, ...]:
    """The distinct boxes of this process's devices.

    Raises:
        StateError: the sharding is without devices or does not divide the shape.
    """
    sharding = _placed(name, like.sharding)
    try:
        return _distinct_boxes(sharding, like.shape)
    except ValueError as err:
        raise StateError(
            f"{name}: the target's sharding does not fit its shape {like.shape}: {_first_line(err)}; give it a"
            " sharding that divides it evenly, or leave dimensions that it cannot divide unsharded"
        ) from None


def build(kind: str, like: Any, pieces: Mapping[Box, Array]) -> Any:
    """An array with the sharding of ``like``, or on the default device.

    Raises:
        MismatchError: JAX cannot hold the target's dtype as it is configured, or a key is of another implementation.
    """
    jax: Any = sys.modules.get("jax")
    if like is None:
        return sole(pieces) if jax is None else _build_default(jax, kind, sole(pieces))
    if not isinstance(like.dtype, np.dtype):
        return _build_keys(jax, kind, like, sole(pieces))
    sharding = None if like.sharding is None else _placed("the target", like.sharding)
    out = _build_weak(jax, like, sharding, pieces)
    if out is None:
        out = jax.device_put(sole(pieces)) if sharding is None else _build_sharded(jax, like, sharding, pieces)
    if out.dtype != like.dtype:
        raise MismatchError(f"JAX made {out.dtype} of a {like.dtype} target; set jax_enable_x64 or change the target")
    return out


def _build_default(jax: Any, kind: str, array: Array) -> Any:
    """A value on the default device, or the numpy array itself where JAX would narrow it."""
    out = jax.device_put(array)
    if out.dtype != array.dtype:
        return array
    return jax.random.wrap_key_data(out, impl=kind.removeprefix(_KEY)) if kind.startswith(_KEY) else out


def _build_weak(jax: Any, like: Any, sharding: Any, pieces: Mapping[Box, Array]) -> Any:
    """A scalar that takes the dtype of what it is computed with, as Python's numbers do; None for all else.

    None, too, where it spans processes: JAX would let them all compare the number.
    """
    if like.shape != () or not getattr(like, "weak_type", False):
        return None
    if sharding is not None and not sharding.is_fully_addressable:
        return None
    out = jax.device_put(sole(pieces).item(), sharding)
    return out if out.dtype == like.dtype else None


def _build_sharded(jax: Any, like: Any, sharding: Any, pieces: Mapping[Box, Array]) -> Any:
    if len(pieces) == 1 and len(sharding.device_set) == 1:
        # What the general way below gives, in half the time.
        return jax.device_put(sole(pieces), sharding)
    boxes = _device_boxes(sharding, like.shape)
    arrays = jax.device_put([pieces[box] for box in boxes.values()], _places(jax, sharding, boxes))
    return _assemble(jax, like, sharding, arrays)


def _places(jax: Any, sharding: Any, devices: Iterable[Any]) -> list[Any]:
    """Where the sharding puts the part of each device: on the device or in its other memory."""
    kind = sharding.memory_kind
    return [
        device if kind in (None, device.default_memory().kind) else jax.sharding.SingleDeviceSharding(device, kind)
        for device in devices
    ]


def _assemble(jax: Any, like: Any, sharding: Any, arrays: list[Any]) -> Any:
    # Where all its devices are other processes', no array tells the dtype.
    dtype = {} if arrays else {"dtype": like.dtype}
    return jax.make_array_from_single_device_arrays(like.shape, sharding, arrays, **dtype)


def _placed(name: str, sharding: Any) -> Any:
    """The sharding on devices: of an abstract mesh, as `jax.eval_shape` gives, that of the current mesh.

    Raises:
        StateError: there is no mesh, or another one.
    """
    jax: Any = sys.modules["jax"]
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or isinstance(mesh, jax.sharding.Mesh):
        return sharding
    current = jax.sharding.get_mesh()
    if (current.axis_names, current.axis_sizes) != (mesh.axis_names, mesh.axis_sizes):
        raise StateError(
            f"{name}: the target's sharding {sharding.spec} is on an abstract mesh {dict(mesh.shape)}, which names no"
            " devices; restore inside `with jax.set_mesh(mesh)`, or give it a NamedSharding on a jax.sharding.Mesh"
        )
    return jax.sharding.NamedSharding(current, sharding.spec, memory_kind=sharding.memory_kind)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _build_keys(jax: Any, kind: str, like: Any, data: Array) -> Any:
    impl = _key_impl(like)
    if kind.startswith(_KEY) and kind != _KEY + impl:
        raise MismatchError(
            f"expected a key of {impl}, found one of {kind.removeprefix(_KEY)}, whose random numbers differ; make"
            f" the target's key with impl={kind.removeprefix(_KEY)!r}"
        )
    if like.sharding is None:
        return jax.random.wrap_key_data(jax.numpy.asarray(data), impl=impl)
    sharding = _placed("the target", like.sharding)
    boxes = _device_boxes(sharding, like.shape)
    parts = jax.device_put([data[box.slices] for box in boxes.values()], _places(jax, sharding, boxes))
    return _assemble(jax, like, sharding, [jax.random.wrap_key_data(part, impl=impl) for part in parts])


def _check_concrete(name: str, value: Any) -> None:
    jax: Any = sys.modules["jax"]
    if isinstance(value, jax.ShapeDtypeStruct):
        raise StateError(f"{name}: an abstract value (jax.ShapeDtypeStruct) cannot be saved; pass the array")
    if isinstance(value, jax.core.Tracer):
        raise StateError(f"{name}: a traced value cannot be saved; save outside of jit, grad and vmap")
    if value.is_deleted():
        raise StateError(
            f"{name}: the jax.Array is deleted, probably donated to a jitted call (donate_argnums); "
            "save the array that the call returned"
        )


def _key_data(value: Any) -> Any:
    return sys.modules["jax"].random.key_data(value)


def _key_impl(value: Any) -> str:
    """The name of the key's implementation ("threefry2x32", ...), abstract keys included."""
    return str(value.dtype._impl.name)


def _boxes(value: Any) -> tuple[Box, ...]:
    """What this process holds of the array."""
    if value.is_fully_addressable:
        return whole(value.shape)
    if value.is_fully_replicated:
        # None of the replicas may be here: those of a pipeline's other stages are not.
        return whole(value.shape) if value.sharding.addressable_devices else ()
    return _held_boxes(value.sharding, value.shape, sys.modules["jax"].process_index())


@lru_cache(maxsize=4096)
def _held_boxes(sharding: Any, shape: Shape, process: int) -> tuple[Box, ...]:
    """The merged boxes of one process; cached, as it looks at every device of the job."""
    holders: dict[Box, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        holders.setdefault(_box_of(index, shape), set()).add(device.process_index)
    classes = boxes_by_holders({box: held for box, held in holders.items() if process in held})
    return tuple(sorted(box for boxes in classes.values() for box in merge_boxes(boxes)))


@lru_cache(maxsize=4096)
def _device_boxes(sharding: Any, shape: Shape) -> dict[Any, Box]:
    """The box of each device of this process."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {device: _box_of(index, shape) for device, index in indices.items()}


@lru_cache(maxsize=4096)
def _distinct_boxes(sharding: Any, shape: Shape) -> tuple[Box, ...]:
    """The boxes of the devices of this process, each once, in order."""
    return tuple(sorted(set(_device_boxes(sharding, shape).values())))


@lru_cache(maxsize=256)
def _name_of(dtype: np.dtype[Any]) -> str:
    return dtype_name(dtype)


def _box_of(index: tuple[slice, ...] | None, shape: Shape) -> Box:
    if index is None:
        return Box.whole(shape)
    spans = [part.indices(extent)[:2] for part, extent in zip(index, shape, strict=True)]
    return Box(tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans))


def _sources(value: Any, box: Box) -> list[tuple[Box, Any]]:
    """Single-device arrays of this process, and their boxes, that touch ``box``; each element once."""
    if len(value.sharding.device_set) == 1:
        return [(whole(value.shape)[0], value)]
    if value.is_fully_replicated:
        return [(whole(value.shape)[0], value.addressable_data(0))]
    found: dict[Box, Any] = {}
    for shard in value.addressable_shards:
        held = _box_of(shard.index, value.shape)
        if held.intersect(box) is not None:
            found[held] = shard.data
    return list(found.items())
