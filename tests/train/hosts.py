"""Hosts that a test adds to the shared cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ray.cluster_utils import Cluster


@contextmanager
def added(cluster: Cluster, *resources: dict[str, float], allow_graceful: bool = True) -> Iterator[None]:
    """One host for each of ``resources``; all that were started are taken away at the end, whatever fails."""
    with ExitStack() as stack:
        for found in resources:
            node = cluster.add_node(num_cpus=4, resources=found, object_store_memory=80_000_000)
            stack.callback(cluster.remove_node, node, allow_graceful=allow_graceful)
        yield
