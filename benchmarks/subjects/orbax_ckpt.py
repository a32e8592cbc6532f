"""Orbax (orbax-checkpoint over TensorStore), arrays of JAX on CPU devices.

Settings: asynchronous saving is what the guide "Maximizing Performance" recommends for speed; its other options
(sub-chunks, memory limits, replica-parallel saving) are for resharding, memory and replicas.

What ``gives_up`` rests on, found with orbax-checkpoint 0.12.8 and tensorstore 0.1.86 by tracing the system calls of a
save and by restoring after four bytes of the biggest file were inverted:

- TensorStore's file driver calls fsync on every file it writes and on its directory (its default, ``file_io_sync``).
  What Orbax itself writes (``_METADATA``, ``_CHECKPOINT_METADATA``, ``array_metadatas``, ``commit_success.txt``) gets
  none, nor does the directory above the last rename.
- The inverted bytes came back as wrong values and without an error in all four modes. OCDBT checks a CRC-32C of its
  manifest and B-tree nodes (tensorstore/kvstore/ocdbt/format/codec_util.cc), which don't hold the chunks of arrays;
  Zarr 2's chunks have no checksum, and zstd notices only what breaks its own syntax.

On CPU devices a save borrows the arrays instead of copying them: `save` returns soon, and a donated update before the
save's end has to make a new array, since its buffer isn't free. The time for that counts in `update`, as in training.
"""

from __future__ import annotations

import functools
import os
import socket
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.cases import Case
from benchmarks.subjects.base import Subject


@functools.partial(jax.jit, donate_argnums=0)
def _add_one(array: jax.Array) -> jax.Array:
    return array + 1


class _Orbax(Subject):
    """Flat dict of arrays; with several ranks, each array is sharded over axis 0, one device a process."""

    gives_up = "no checksums of the arrays' data; metadata and rename without fsync"
    state: dict[str, jax.Array]
    targets: dict[str, jax.ShapeDtypeStruct]
    step: int

    @classmethod
    def prepare(cls, case: Case, directory: str) -> dict[str, Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return {"coordinator": f"127.0.0.1:{probe.getsockname()[1]}"}

    def configure(self, shared: Mapping[str, Any]) -> None:
        jax.config.update("jax_platforms", "cpu")
        if self.case.world_size > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(
                shared["coordinator"], num_processes=self.case.world_size, process_id=self.rank, local_device_ids=[0]
            )

    @functools.cached_property
    def shardings(self) -> dict[str, jax.sharding.Sharding]:
        names = [name for name, _ in self.case.shapes]
        if self.case.world_size == 1:
            return dict.fromkeys(names, SingleDeviceSharding(jax.devices()[0]))
        mesh = jax.make_mesh((self.case.world_size,), ("rank",))
        whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rank"))
        return {name: whole if name in self.case.replicated else cut for name in names}

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        shapes = dict(self.case.shapes)
        self.state = {}
        for name, array in arrays.items():
            placed = jax.make_array_from_process_local_data(self.shardings[name], array, shapes[name])
            # The copy, since a CPU device may borrow NumPy's memory, which can't be donated later.
            self.state[name] = jax.numpy.copy(placed)
        jax.block_until_ready(self.state)
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Make the checkpointer."""

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            self.state[name] = _add_one(self.state[name])
        jax.block_until_ready([self.state[name] for name in names])

    def open_restore(self, step: int) -> None:
        self.targets = {
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=self.shardings[name])
            for name, shape in self.case.shapes
        }
        self.step = step
        self.open()

    def restore(self) -> Mapping[str, Any]:
        restored = jax.block_until_ready(self.load())
        if self.case.world_size == 1:
            return restored
        return {name: array.addressable_shards[0].data for name, array in restored.items()}

    @abstractmethod
    def load(self) -> dict[str, jax.Array]:
        """Read the checkpoint of ``step`` into new arrays like ``targets``."""


class OrbaxOcdbt(_Orbax):
    """The defaults: Zarr 2 chunks compressed by zstd in OCDBT files, one chunk an array and process."""

    name = "Orbax async, OCDBT"
    use_ocdbt = True
    use_compression = True
    checkpointer: ocp.AsyncCheckpointer

    def open(self) -> None:
        self.checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=self.use_ocdbt, use_compression=self.use_compression)
        )

    def files(self, step: int) -> str:
        return os.path.join(os.path.abspath(self.directory), f"step_{step}")

    def save(self, step: int) -> None:
        self.checkpointer.save(self.files(step), args=ocp.args.PyTreeSave(self.state))

    def wait(self) -> None:
        # On every rank this ends after the barrier that follows the rename (_background_wait_for_commit_futures).
        self.checkpointer.wait_until_finished()

    def load(self) -> dict[str, jax.Array]:
        arguments = ocp.args.PyTreeRestore(
            self.targets, restore_args=ocp.checkpoint_utils.construct_restore_args(self.targets)
        )
        restored: dict[str, jax.Array] = self.checkpointer.restore(self.files(self.step), args=arguments)
        return restored

    def close(self) -> None:
        self.checkpointer.close()


class OrbaxUncompressed(OrbaxOcdbt):
    """Weights shrink little, by 15 % here, and compressing costs more than writing."""

    name = "Orbax async, OCDBT, compression off"
    use_compression = False


class OrbaxNoOcdbt(OrbaxOcdbt):
    """A directory for each array."""

    name = "Orbax async, no OCDBT"
    use_ocdbt = False


class OrbaxManager(_Orbax):
    """`CheckpointManager` as its users make it: asynchronous by default, `StandardSave` in OCDBT."""

    name = "Orbax CheckpointManager"
    cases = ("big", "small", "quick")
    manager: ocp.CheckpointManager

    def open(self) -> None:
        self.manager = ocp.CheckpointManager(
            os.path.abspath(self.directory),
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=True),
        )

    def files(self, step: int) -> str:
        return os.path.join(os.path.abspath(self.directory), str(step))

    def save(self, step: int) -> None:
        if not self.manager.save(step, args=ocp.args.StandardSave(self.state)):
            raise RuntimeError(f"CheckpointManager declined to save step {step}: its steps have to rise")

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def load(self) -> dict[str, jax.Array]:
        restored: dict[str, jax.Array] = self.manager.restore(self.step, args=ocp.args.StandardRestore(self.targets))
        return restored

    def close(self) -> None:
        self.manager.close()
