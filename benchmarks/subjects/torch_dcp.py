"""PyTorch: `torch.save`, and `torch.distributed.checkpoint` (DCP) with its asynchronous modes, on CPU tensors.

What ``gives_up`` rests on, found with torch 2.13 by tracing the system calls of a save and by restoring after four
bytes of the biggest file were inverted:

- `torch.save` never calls fsync. DCP does, on its files and on ``.metadata`` before the rename (``sync_files``, on by
  default); on the directory it doesn't.
- Both write each tensor as a ZIP record with a CRC-32, and `torch.load`, which DCP uses too, doesn't check it: the
  inverted bytes came back as wrong values without an error. `set_crc32_options` says as much.

More threads (``thread_count``) and no CRC-32 made no difference to DCP on two cores, so both are left as by default.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.cases import Case
from benchmarks.subjects.base import Subject


class TorchSave(Subject):
    """One file, written while the training waits; read without ``mmap``, as by default."""

    name = "torch.save"
    gives_up = "no fsync, not atomic, checksums never read"
    cases = ("big", "small", "quick")
    tensors: dict[str, torch.Tensor]
    path: str

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.tensors = {name: torch.from_numpy(array).clone() for name, array in arrays.items()}

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            self.tensors[name].add_(1)

    def files(self, step: int) -> str:
        return os.path.join(self.directory, f"step_{step}.pt")

    def save(self, step: int) -> None:
        torch.save(self.tensors, self.files(step))

    def wait(self) -> None:
        pass

    def open_restore(self, step: int) -> None:
        self.path = self.files(step)

    def restore(self) -> Mapping[str, Any]:
        loaded: dict[str, torch.Tensor] = torch.load(self.path)
        return loaded

    def close(self) -> None:
        self.tensors = {}


class TorchSaveNoCrc(TorchSave):
    """Without the checksums, which `torch.load` doesn't read."""

    name = "torch.save, CRC-32 off"
    gives_up = "no fsync, not atomic, no checksums"

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        torch.serialization.set_crc32_options(False)
        super().start(arrays)


class TorchDcp(Subject):
    """`async_save` with its defaults: staging into new memory, a thread that writes one file a rank, fsync."""

    name = "torch DCP async"
    gives_up = "checksums never read; directory without fsync"
    state: dict[str, torch.Tensor]
    parts: dict[str, torch.Tensor]
    mesh: DeviceMesh
    path: str
    saving: Future[Any] | None = None
    staging: Future[Any] | None = None

    @classmethod
    def prepare(cls, case: Case, directory: str) -> dict[str, Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return {"port": probe.getsockname()[1]}

    def configure(self, shared: Mapping[str, Any]) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        # DCP's checkpoint process takes the address from here too.
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(shared["port"])
        dist.init_process_group("gloo", rank=self.rank, world_size=self.case.world_size)
        self.mesh = dist.init_device_mesh("cpu", (self.case.world_size,))

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.parts = {name: torch.from_numpy(array).clone() for name, array in arrays.items()}
        self.state = self.globally(self.parts)

    def globally(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state as DCP shall see it: with several ranks, tensors sharded over axis 0 that share this memory.

        Replicated ones are plain tensors, of which DCP has one rank each write one.
        """
        if self.case.world_size == 1:
            return parts
        whole = self.case.replicated
        return {n: p if n in whole else DTensor.from_local(p, self.mesh, [Shard(0)]) for n, p in parts.items()}

    def update(self, names: Sequence[str]) -> None:
        if self.staging is not None:
            self.staging.result()
        for name in names:
            self.parts[name].add_(1)

    def files(self, step: int) -> str:
        return os.path.join(self.directory, f"step_{step}")

    def save(self, step: int) -> None:
        self.wait()
        saving = dcp.async_save(self.state, checkpoint_id=self.files(step), **self.options(step))
        if isinstance(saving, AsyncSaveResponse):
            self.staging, self.saving = saving.staging_completion, saving.upload_completion
        else:
            self.saving = saving

    def options(self, step: int) -> dict[str, Any]:
        """Arguments of `async_save`."""
        return {}

    def wait(self) -> None:
        if self.saving is not None:
            self.saving.result()

    def open_restore(self, step: int) -> None:
        self.path = self.files(step)

    def restore(self) -> Mapping[str, Any]:
        parts = {name: torch.empty(self.case.part(name, shape, self.rank)[1]) for name, shape in self.case.shapes}
        dcp.load(self.globally(parts), checkpoint_id=self.path)
        return parts

    def close(self) -> None:
        self.wait()
        self.saving = self.staging = None
        dist.destroy_process_group()


class TorchDcpCached(TorchDcp):
    """Staging memory and plan are kept from save to save; pinning and non-blocking copies need an accelerator."""

    name = "torch DCP async, cached plan"
    staging_options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    sync_files = True
    checkpointer = AsyncCheckpointerType.THREAD
    stager: DefaultStager | None = None

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().start(arrays)
        self.stager = DefaultStager(self.staging_options)

    def options(self, step: int) -> dict[str, Any]:
        return {
            "async_stager": self.stager,
            "async_checkpointer_type": self.checkpointer,
            "planner": DefaultSavePlanner(enable_plan_caching=True),
            "storage_writer": dcp.FileSystemWriter(self.files(step), sync_files=self.sync_files),
        }

    def close(self) -> None:
        super().close()
        if self.stager is not None:
            self.stager.close()


class TorchDcpUnsynced(TorchDcpCached):
    """As the cached plan, without waiting for the disk."""

    name = "torch DCP async, cached plan, no fsync"
    gives_up = "no fsync, checksums never read"
    sync_files = False


class TorchDcpStaged(TorchDcpCached):
    """A thread stages too. `save` returns before the copy, so the first `update` after it waits for the copy's end."""

    name = "torch DCP async, cached plan, async staging"
    gives_up = "checksums never read; directory without fsync; the next update waits for the copy"
    staging_options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
    )


class TorchDcpProcess(TorchDcpCached):
    """Another process writes, out of shared memory into which the tensors are staged."""

    name = "torch DCP async, process"
    staging_options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
    )
    checkpointer = AsyncCheckpointerType.PROCESS

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        # By default each tensor in shared memory holds a descriptor, here and in the other process; PyTorch's notes on
        # multiprocessing advise this strategy where there are too few.
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * len(self.case.shapes):
            torch.multiprocessing.set_sharing_strategy("file_system")
        super().start(arrays)
