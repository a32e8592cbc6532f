"""What users of other checkpoint interfaces change an import for; a framework is only imported when it is used."""

from __future__ import annotations

from ray_ckpt.frontends.lazy import LazyClass

_HOOKS = "ray_ckpt.frontends.tensorflow.hooks"

CheckpointSaverHook = LazyClass(
    _HOOKS,
    "CheckpointSaverHook",
    extra="tf",
    doc="Saves a session's variables every N steps or seconds, as `tf.compat.v1.train.CheckpointSaverHook` does.",
)

AsyncCheckpointSaverHook = LazyClass(
    _HOOKS,
    "AsyncCheckpointSaverHook",
    extra="tf",
    doc="`CheckpointSaverHook` for which training never waits, as `tf.contrib.tpu.AsyncCheckpointSaverHook`.",
)

BackupAndRestore = LazyClass(
    "ray_ckpt.frontends.keras.backup",
    "BackupAndRestore",
    extra="tf",
    doc="Resumes an interrupted `fit` at its batch, as `keras.callbacks.BackupAndRestore` does at its epoch.",
)

ModelCheckpoint = LazyClass(
    "ray_ckpt.frontends.keras.model_checkpoint",
    "ModelCheckpoint",
    extra="tf",
    doc="Saves a model and its optimizer during `fit`, as `keras.callbacks.ModelCheckpoint` does.",
)

__all__ = ["AsyncCheckpointSaverHook", "BackupAndRestore", "CheckpointSaverHook", "ModelCheckpoint"]
