"""Nodes of the Ray cluster that are about to go: drained by the autoscaler, for a preemption, on SIGTERM or by hand."""

from __future__ import annotations

import time

import ray

from ray_ckpt.protocol.messages import Leaving, Nodes

SLICE_LABEL = "ray.io/tpu-slice-name"
"""The hosts of a TPU slice are taken away together (Ray sets this label from the TPU's environment)."""


def cluster_nodes() -> Nodes:
    """The nodes that Ray has given up, and the TPU slice of each that lives. Equal from call to call.

    Raises:
        RayError, RuntimeError: the cluster's GCS does not answer.
    """
    nodes = ray.nodes()
    slices = {str(n["NodeID"]): (n.get("Labels") or {}).get(SLICE_LABEL) for n in nodes if n["Alive"]}
    dead = frozenset(str(n["NodeID"]) for n in nodes if not n["Alive"])
    return Nodes(dead, tuple(sorted((node, name) for node, name in slices.items() if name)))


def leaving_nodes() -> dict[str, Leaving]:
    """The nodes that are being drained, and those that share a TPU slice with one; by node id.

    Equal from call to call.

    Raises:
        AttributeError: this Ray is too old to tell.
        RayError, RuntimeError: the cluster's GCS does not answer.
    """
    # What ray.train's own watcher reads; Ray has no public call for it.
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    if not draining:
        return {}
    found = {node: Leaving(f"is being drained by Ray{_until(until_ms)}") for node, until_ms in draining.items()}
    slices = {node["NodeID"]: (node.get("Labels") or {}).get(SLICE_LABEL) for node in ray.nodes()}
    going = {slices[node] for node in draining if slices.get(node)}
    for node, name in slices.items():
        if name in going and node not in found:
            found[node] = Leaving(f"lies in TPU slice {name}, of which a host is being drained by Ray", drained=False)
    return found


def _until(deadline_ms: int) -> str:
    """Ray gives 0 for a drain without a deadline."""
    return time.strftime(" and ends at %H:%M:%S", time.localtime(deadline_ms / 1000)) if deadline_ms else ""
