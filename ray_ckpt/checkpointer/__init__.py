"""What a training loop uses: `Checkpointer`."""

from ray_ckpt.checkpointer.checkpointer import Checkpointer
from ray_ckpt.checkpointer.restoring import retry_until_agreed
from ray_ckpt.checkpointer.settings import Timeouts

__all__ = ["Checkpointer", "Timeouts", "retry_until_agreed"]
