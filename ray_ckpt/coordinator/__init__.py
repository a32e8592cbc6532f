"""The global save coordinator of a run: a named Ray actor around `protocol.coordinator`."""

from ray_ckpt.coordinator.find import NAMESPACE, find, find_or_start, request_save, run_id, status

__all__ = ["NAMESPACE", "find", "find_or_start", "request_save", "run_id", "status"]
