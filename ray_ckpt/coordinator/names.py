"""What the actors of a run are called, so that everybody finds them."""

from __future__ import annotations

import hashlib
from typing import Any

import ray
from ray.util import list_named_actors

from ray_ckpt.errors import UnavailableError
from ray_ckpt.storage import locate

NAMESPACE = "ray_ckpt"


def run_id(url: str) -> str:
    """A short name for the run in this directory: the same for every way to write its URL."""
    return hashlib.blake2b(locate(url).url.encode(), digest_size=8).hexdigest()


def coordinator_name(url: str) -> str:
    """The name of the run's coordinator actor."""
    return f"coordinator:{run_id(url)}"


def agent_name(url: str, node_id: str) -> str:
    """The name of a run's agent on a Ray node."""
    return f"agent:{run_id(url)}:{node_id}"


def find_agent(url: str, node_id: str) -> Any:
    """The handle of the agent that a run has on a node. Raises `UnavailableError` if it has none."""
    try:
        return ray.get_actor(agent_name(url, node_id), namespace=NAMESPACE)
    except ValueError:
        raise UnavailableError(f"{locate(url).url} has no agent on host {node_id}") from None


def living_nodes() -> dict[str, str]:
    """The nodes of the cluster that live: ids, and names for people."""
    return {str(node["NodeID"]): str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}


def hosts_with_agents(url: str) -> dict[str, str]:
    """Those where the run has an agent, be it one that Ray is just restarting."""
    start = agent_name(url, "")
    names = [str(actor["name"]) for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    hosts = {name.removeprefix(start) for name in names if name.startswith(start)}
    return {host: name for host, name in living_nodes().items() if host in hosts}
