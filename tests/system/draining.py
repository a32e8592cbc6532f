"""Hosts that are taken away, as Ray is told of it."""

from __future__ import annotations

import time

import ray
from ray.core.generated import autoscaler_pb2

NOTICE_S = 120
"""Long, so that no slow machine decides a test; `benchmarks.preemption` says how much of a real notice is needed."""


def drain(node: str, notice_s: float) -> None:
    """What an autoscaler does on a preemption notice."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + notice_s) * 1000)
    accepted, why_not = client.drain_node(node, reason, "the test takes the host away", deadline_ms)
    assert accepted, why_not
