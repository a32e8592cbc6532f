"""The global save coordinator of a run: a named Ray actor around `protocol.coordinator`."""

from ray_ckpt.coordinator.find import find, find_or_start, request_save, status
from ray_ckpt.coordinator.names import NAMESPACE, agent_name, find_agent, living_nodes, run_id

__all__ = [
    "NAMESPACE",
    "agent_name",
    "find",
    "find_agent",
    "find_or_start",
    "living_nodes",
    "request_save",
    "run_id",
    "status",
]
