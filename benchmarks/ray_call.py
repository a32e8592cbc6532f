"""What one call costs an async Ray actor that does nothing with it."""

from __future__ import annotations

import time
from typing import Any

import ray

CALLS = 4000
AT_ONCE = 200


def measure() -> float:
    """CPU seconds of the actor's process a call, many calls being under way at once; in a Ray of its own."""

    class Empty:
        async def call(self, report: bytes) -> bytes:
            return report

        async def cpu_s(self) -> float:
            return time.process_time()

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        actor: Any = ray.remote(Empty).options(num_cpus=0, max_concurrency=10_000).remote()
        report = bytes(1000)
        ray.get([actor.call.remote(report) for _ in range(AT_ONCE)])
        before = ray.get(actor.cpu_s.remote())
        for _ in range(0, CALLS, AT_ONCE):
            ray.get([actor.call.remote(report) for _ in range(AT_ONCE)])
        used: float = ray.get(actor.cpu_s.remote()) - before
        return used / CALLS
    finally:
        ray.shutdown()
