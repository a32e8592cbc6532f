"""What a training loop uses: `Checkpointer`."""

from ray_ckpt.checkpointer.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
