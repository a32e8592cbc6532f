"""How a mesh of devices on several hosts cuts a state: the layouts that its processes would register."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_ckpt.errors import UsageError
from ray_ckpt.leaves.base import boxes_by_holders, merge_boxes, whole
from ray_ckpt.leaves.layout import fingerprint
from ray_ckpt.models.tensor import Axes, Tensor
from ray_ckpt.types import Box, Layout, LeafSpec, Shape

_Boxes = tuple[tuple[Box, ...], ...]
"""For each host, what it holds of an array."""


@dataclass(frozen=True, slots=True)
class HostMesh:
    """A mesh over hosts of equally many devices each: ``axes`` by name, major first, and hosts in the devices' order.

    Raises `UsageError` where the devices are none or do not divide among the hosts.
    """

    axes: Mapping[str, int]
    hosts: int

    def __post_init__(self) -> None:
        devices = self.num_devices
        if self.hosts < 1 or min(self.axes.values(), default=1) < 1 or devices % self.hosts:
            raise UsageError(
                f"a mesh of {' x '.join(f'{name} {n}' for name, n in self.axes.items())} has {devices} devices, which"
                f" {self.hosts} hosts cannot share evenly; make the product of the axes a multiple of the hosts"
            )

    @property
    def num_devices(self) -> int:
        """Devices of all hosts."""
        return math.prod(self.axes.values())


def layouts_of(state: Iterable[Tensor], mesh: HostMesh) -> list[Layout]:
    """Each host's layout of a state of jax.Arrays with these shardings, as `leaves.jax_leaf` describes it.

    A dimension that its axes do not divide is not cut, as JAX could not either (see `unsharded`), unless it may be
    cut unevenly.

    Raises:
        UsageError: a tensor names an axis that the mesh has not, or one twice.
    """
    state = tuple(state)
    known: dict[tuple[Shape, Axes, bool], _Boxes] = {}
    leaves: list[list[LeafSpec]] = [[] for _ in range(mesh.hosts)]
    kind = "jax:global" if mesh.hosts > 1 else "jax"
    for tensor in state:
        key = tensor.shape, tensor.axes, tensor.uneven
        if key not in known:
            known[key] = _boxes(tensor, mesh)
        for mine, boxes in zip(leaves, known[key], strict=True):
            mine.append(LeafSpec(tensor.name, tensor.dtype, tensor.shape, boxes, kind))
    tree = json.dumps({"named": [[name, "*"] for name in sorted(tensor.name for tensor in state)]})
    specs = [tuple(mine) for mine in leaves]
    return [Layout(mine, tree, fingerprint(mine, tree)) for mine in specs]


def unsharded(state: Iterable[Tensor], mesh: HostMesh) -> list[str]:
    """Names of tensors with a dimension that stays whole although axes of more than one device should cut it."""
    return [tensor.name for tensor in state if _parts(tensor, mesh) != _wanted_parts(tensor, mesh)]


def _parts(tensor: Tensor, mesh: HostMesh) -> list[int]:
    """Into how many parts each dimension is cut."""
    wanted = _wanted_parts(tensor, mesh)
    return [1 if n % count and not tensor.uneven else count for n, count in zip(tensor.shape, wanted, strict=True)]


def _wanted_parts(tensor: Tensor, mesh: HostMesh) -> list[int]:
    """Into how many parts each dimension is to be cut."""
    used = [name for names in tensor.axes for name in names]
    if not set(used) <= set(mesh.axes) or len(tensor.axes) > len(tensor.shape):
        raise UsageError(
            f"{tensor.name}: shape {tensor.shape} with axes {tensor.axes}: at most one entry for each dimension, of"
            f" the mesh's axes {', '.join(mesh.axes)}"
        )
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        raise UsageError(
            f"{tensor.name}: axes {tensor.axes} use {', '.join(twice)} twice; an axis of the mesh can cut one dimension"
        )
    parts = [math.prod(mesh.axes[name] for name in names) for names in tensor.axes]
    return parts + [1] * (len(tensor.shape) - len(parts))


def _boxes(tensor: Tensor, mesh: HostMesh) -> _Boxes:
    if mesh.hosts == 1:
        return (whole(tensor.shape),)
    parts = _parts(tensor, mesh)
    places = [_places(tensor.axes[d] if count > 1 else (), mesh) for d, count in enumerate(parts)]
    blocks = [-(-n // count) for n, count in zip(tensor.shape, parts, strict=True)]
    a_host = mesh.num_devices // mesh.hosts
    holders: dict[Box, set[int]] = {}
    for device, at in enumerate(zip(*places, strict=True) if places else [()] * mesh.num_devices):
        offset = tuple(min(i * block, n) for i, block, n in zip(at, blocks, tensor.shape, strict=True))
        shape = tuple(min(block, n - o) for o, block, n in zip(offset, blocks, tensor.shape, strict=True))
        if all(shape):
            holders.setdefault(Box(offset, shape), set()).add(device // a_host)
    held = [set[Box]() for _ in range(mesh.hosts)]
    for hosts, boxes in boxes_by_holders(holders).items():
        merged = merge_boxes(boxes)
        for host in hosts:
            held[host].update(merged)
    return tuple(tuple(sorted(mine)) for mine in held)


def _places(names: Sequence[str], mesh: HostMesh) -> list[int]:
    """For each device, which part of a dimension that these axes cut it holds."""
    sizes = tuple(mesh.axes.values())
    coordinates = dict(zip(mesh.axes, np.unravel_index(np.arange(mesh.num_devices), sizes), strict=True))
    place = np.zeros(mesh.num_devices, np.int64)
    for name in names:
        place = place * mesh.axes[name] + coordinates[name]
    found: list[int] = place.tolist()
    return found
