"""One agent for a run on a host: found by name, or started there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.agent.actor import Agent
from ray_ckpt.coordinator import NAMESPACE, agent_name
from ray_ckpt.storage import locate

LEASE_S = 10.0
RECOVER_S = 300.0
"""So long agents wait for the next start of a job that has not come to its end."""


def find_or_start_agent(
    url: str,
    storage_options: Mapping[str, Any],
    *,
    node_id: str,
    single_coordinator: bool = False,
    max_writes: int = 2,
    memory_folder: str | None = None,
    recover_s: float = RECOVER_S,
) -> Any:
    """The handle of the run's agent on this node.

    Detached, so that it survives the training processes; it ends itself when they are gone and all is decided.
    """
    actor = ray.remote(Agent).options(
        name=agent_name(url, node_id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=10_000,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    return actor.remote(
        locate(url).url,
        dict(storage_options),
        node_id=node_id,
        single_coordinator=single_coordinator,
        max_writes=max_writes,
        memory_folder=memory_folder,
        lease_s=LEASE_S,
        recover_s=recover_s,
    )
