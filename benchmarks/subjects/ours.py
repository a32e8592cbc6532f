"""ray_ckpt: NumPy arrays, or JAX arrays on one CPU device."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import ray
from ray.cluster_utils import Cluster

from benchmarks.cases import Case
from benchmarks.subjects.base import Subject
from ray_ckpt import Checkpointer, Slice, load
from ray_ckpt.coordinator import run_id
from ray_ckpt.snapshot import default_folder

_STORE_NBYTES = 100_000_000


def _address(rank: int) -> str:
    return f"127.0.0.{rank + 1}"


class Ours(Subject):
    """Saved with the defaults, but for retention: the harness deletes, as it does for everyone."""

    name: ClassVar[str] = "ray_ckpt"

    state: Any = None
    _ray_folder: ClassVar[str] = ""
    _url: ClassVar[str] = ""
    _cluster: ClassVar[Cluster]

    @classmethod
    def prepare(cls, case: Case, directory: str) -> dict[str, Any]:
        """A Ray cluster as the job would find it: of one node, or with a raylet of its own for each rank."""
        cls._ray_folder, cls._url = tempfile.mkdtemp(prefix="bench-"), directory
        # Ray's workers import this package by its name.
        os.environ["PYTHONPATH"] = os.getcwd()
        os.environ["RAY_TMPDIR"] = cls._ray_folder
        node = {"num_cpus": 2, "object_store_memory": _STORE_NBYTES}
        cls._cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        if case.hosts:
            # A driver finds the raylet to connect to by its address, and Linux has many for the loopback.
            for rank in range(1, case.world_size):
                cls._cluster.add_node(**node, node_ip_address=_address(rank))
        ray.init(address=cls._cluster.address, log_to_driver=False)
        return {"address": cls._cluster.address}

    @classmethod
    def tear_down(cls) -> None:
        """End the cluster; its agent does not live to give the snapshot memory back."""
        ray.shutdown()
        cls._cluster.shutdown()
        shutil.rmtree(cls._ray_folder, ignore_errors=True)
        cls._forget()

    @classmethod
    def _forget(cls) -> None:
        run = run_id(cls._url)
        for folder in default_folder(run).parent.glob(f"{run}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def configure(self, shared: Mapping[str, Any]) -> None:
        where = {"_node_ip_address": _address(self.rank)} if self.case.hosts and self.rank else {}
        ray.init(address=shared["address"], log_to_driver=False, **where)

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)
        self.state = {name: self._leaf(name, array) for name, array in self._arrays.items()}
        self.started_at = time.monotonic()
        self._open()

    def _open(self) -> None:
        self._ckpt = Checkpointer(
            self.directory, rank=self.rank, world_size=self.case.world_size, max_to_keep=None, on_error="raise"
        )

    def _leaf(self, name: str, array: np.ndarray) -> Any:
        """What the state holds of a tensor: the array, or this rank's rectangle of it."""
        if self.case.world_size == 1 or name in self.case.replicated:
            return array
        shape = dict(self.case.shapes)[name]
        first = self.case.part(name, shape, self.rank)[0]
        return Slice(array, shape, (first, *[0] * (len(shape) - 1)))

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            np.add(self._arrays[name], 1, out=self._arrays[name])

    def save(self, step: int) -> None:
        self._ckpt.save(step, self.state)

    def wait(self) -> None:
        self._ckpt.wait()

    def files(self, step: int) -> str:
        return os.path.join(self.directory, f"model.ckpt-{step}.*")

    def open_restore(self, step: int) -> None:
        self._step = step
        self._target = self._make_target()
        self._open()

    def _make_target(self) -> Any:
        """A state of the right shapes, of which no page is touched."""
        shapes = self.case.shapes
        return {n: self._leaf(n, np.empty(self.case.part(n, shape, self.rank)[1], np.float32)) for n, shape in shapes}

    def before_restore(self) -> None:
        """A restart of the job: a `Checkpointer` restores once."""
        self._ckpt.__exit__(KeyboardInterrupt, None, None)
        self._open()

    def restore(self) -> Mapping[str, Any]:
        restored = self._ckpt.restore(self._target, step=self._step)
        return {name: leaf.array if isinstance(leaf, Slice) else leaf for name, leaf in restored.items()}

    def close(self) -> None:
        self._ckpt.close()
        ray.shutdown()


class OursMemory(Ours):
    """Restored from what the killed job, and its whole Ray cluster, left in the memory of the hosts."""

    name: ClassVar[str] = "ray_ckpt, from host memory"
    cases: ClassVar[tuple[str, ...]] = ("big", "small", "hosts", "quick")

    @classmethod
    def prepare(cls, case: Case, directory: str) -> dict[str, Any]:
        atexit.register(super()._forget)
        return super().prepare(case, directory)

    @classmethod
    def _forget(cls) -> None:
        """Not between the phases: the next one restores from it."""

    def open_restore(self, step: int) -> None:
        self._told: list[str] = []
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record: self._told.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ray_ckpt").addHandler(handler)
        logging.getLogger("ray_ckpt").setLevel(logging.INFO)
        super().open_restore(step)

    def restore(self) -> Mapping[str, Any]:
        self._told.clear()
        restored = super().restore()
        if not any("read from the memory of" in text for text in self._told):
            raise RuntimeError(f"not read from host memory: {self._told}")
        return restored

    def close(self) -> None:
        self._ckpt.leave()
        ray.shutdown()


class OursLoad(Ours):
    """Restored without a job: no Ray, no coordinator, the whole checkpoint in one process."""

    name: ClassVar[str] = "ray_ckpt, load()"
    cases: ClassVar[tuple[str, ...]] = ("big", "small", "quick")

    def configure(self, shared: Mapping[str, Any]) -> None:
        self._shared = shared

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().configure(self._shared)
        super().start(arrays)

    def open_restore(self, step: int) -> None:
        self._step = step

    def before_restore(self) -> None:
        pass

    def restore(self) -> Mapping[str, Any]:
        return load(self.directory, self._step)

    def close(self) -> None:
        if self.state is not None:
            super().close()


class OursJax(Ours):
    """The state in JAX arrays, whose updates donate."""

    name: ClassVar[str] = "ray_ckpt, JAX"
    cases: ClassVar[tuple[str, ...]] = ("big", "small", "quick")

    def __init__(self, case: Case, rank: int, directory: str) -> None:
        super().__init__(case, rank, directory)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # Not imported with the module: Ours and the conductor need none.
        self._jax = importlib.import_module("jax")
        self._add_one = self._jax.jit(lambda array: array + 1, donate_argnums=0)

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        # A copy each, since a CPU device may borrow NumPy's memory, which cannot be donated.
        self.state = {name: self._jax.numpy.copy(array) for name, array in arrays.items()}
        self._jax.block_until_ready(self.state)
        self.started_at = time.monotonic()
        self._open()

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            self.state[name] = self._add_one(self.state[name])
        self._jax.block_until_ready([self.state[name] for name in names])

    def _make_target(self) -> Any:
        return {name: self._jax.ShapeDtypeStruct(shape, np.float32) for name, shape in self.case.shapes}

    def restore(self) -> Mapping[str, Any]:
        restored: Mapping[str, Any] = self._jax.block_until_ready(self._ckpt.restore(self._target, step=self._step))
        return restored
