"""ray_ckpt: asynchronous, fenced, sharded checkpoints for Ray training jobs, in files that TensorFlow reads.

Everything is imported on first use: ``import ray_ckpt`` imports neither Ray nor a framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_ckpt.catalog import CheckpointInfo, Report, checkpoints, load, verify
    from ray_ckpt.checkpointer import Checkpointer, Timeouts
    from ray_ckpt.coordinator import request_save, status
    from ray_ckpt.errors import PreemptedError
    from ray_ckpt.frontends.keras.backup import BackupAndRestore
    from ray_ckpt.frontends.keras.model_checkpoint import ModelCheckpoint
    from ray_ckpt.frontends.tensorflow.hooks import AsyncCheckpointSaverHook, CheckpointSaverHook
    from ray_ckpt.frontends.tensorflow.manager import CheckpointManager
    from ray_ckpt.frontends.tensorflow.restore import restore_session
    from ray_ckpt.leaves import PerWorker, Slice
    from ray_ckpt.train import Pointer, from_train

_HOMES = {
    "AsyncCheckpointSaverHook": "frontends",
    "BackupAndRestore": "frontends",
    "CheckpointInfo": "catalog",
    "CheckpointManager": "frontends.tensorflow.manager",
    "CheckpointSaverHook": "frontends",
    "Report": "catalog",
    "checkpoints": "catalog",
    "load": "catalog",
    "verify": "catalog",
    "Checkpointer": "checkpointer",
    "request_save": "coordinator",
    "ModelCheckpoint": "frontends",
    "restore_session": "frontends.tensorflow.restore",
    "status": "coordinator",
    "PerWorker": "leaves",
    "Pointer": "train",
    "PreemptedError": "errors",
    "from_train": "train",
    "Slice": "leaves",
    "Slices": "leaves",
    "Variants": "leaves",
    "Timeouts": "checkpointer",
}

__all__ = [
    "AsyncCheckpointSaverHook",
    "BackupAndRestore",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointSaverHook",
    "Checkpointer",
    "ModelCheckpoint",
    "PerWorker",
    "Pointer",
    "PreemptedError",
    "Report",
    "Slice",
    "Slices",
    "Timeouts",
    "Variants",
    "checkpoints",
    "from_train",
    "load",
    "request_save",
    "restore_session",
    "status",
    "verify",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ray_ckpt' has no attribute {name!r}")
    return getattr(import_module(f"ray_ckpt.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
