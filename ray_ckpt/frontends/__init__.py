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

__all__ = ["AsyncCheckpointSaverHook", "CheckpointSaverHook"]
