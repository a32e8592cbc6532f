"""TPU slices on this machine: each host a raylet with the environment of a TPU v4 host, from which Ray makes labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.cluster_utils import Cluster

from examples.demo.cluster import environment
from tests.system.draining import drain

HOSTS = 2
"""Of a v4-16 slice: 2x2x2 chips, four of them a host."""

CHIPS = 4
_STORE_NBYTES = 80_000_000


@dataclass
class Slice:
    """A running v4-16 slice. ``nodes``: Ray's node ids of its hosts, by TPU worker id."""

    name: str
    _cluster: Cluster
    _raylets: list[Any] = field(default_factory=list)

    @property
    def nodes(self) -> list[str]:
        return [raylet.node_id for raylet in self._raylets]

    def start(self) -> None:
        for host in range(HOSTS):
            variables = {
                "TPU_NAME": self.name,
                "TPU_WORKER_ID": str(host),
                "TPU_ACCELERATOR_TYPE": "v4-16",
                "TPU_TOPOLOGY": "2x2x2",
            }
            with environment(variables):
                raylet = self._cluster.add_node(num_cpus=2, resources={"TPU": CHIPS}, object_store_memory=_STORE_NBYTES)
            self._raylets.append(raylet)

    def kill(self) -> None:
        """All its hosts at once, without a word, as when the machines go."""
        self.end(allow_graceful=False)

    def drain(self, notice_s: float) -> None:
        """Ray hears that all its hosts go in so many seconds."""
        for node in self.nodes:
            drain(node, notice_s)

    def end(self, *, allow_graceful: bool = True) -> None:
        """Take its hosts out of the cluster: all of them, also where taking one fails."""
        with ExitStack() as stack:
            while self._raylets:
                stack.callback(self._cluster.remove_node, self._raylets.pop(), allow_graceful=allow_graceful)


@contextmanager
def tpu_slice(cluster: Cluster, name: str) -> Iterator[Slice]:
    """A slice that is gone at the end."""
    made = Slice(name, cluster)
    try:
        made.start()
        yield made
    finally:
        made.end()


def labels() -> dict[str, dict[str, str]]:
    """Ray's labels of the hosts that are up, by node id."""
    return {node["NodeID"]: node["Labels"] for node in ray.nodes() if node["Alive"]}


def actors_of(run: str) -> dict[str, list[str]]:
    """Node ids of the living actors of a run, sorted, by their classes."""
    found: dict[str, list[str]] = {}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE" and run in actor["Name"]:
            found.setdefault(actor["ActorClassName"], []).append(actor["Address"]["NodeID"])
    return {name: sorted(nodes) for name, nodes in found.items()}
