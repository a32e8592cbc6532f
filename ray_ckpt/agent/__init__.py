"""The host agent: one actor a host that owns the snapshot memory and has it written."""

from ray_ckpt.agent.find import find_or_start_agent
from ray_ckpt.agent.serving import recall

__all__ = ["find_or_start_agent", "recall"]
