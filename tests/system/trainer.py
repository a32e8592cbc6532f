"""A rank of a job on a host of a LAN, in a process of its own: ``python -m tests.system.trainer ORDER``.

It does what the `Order` says and tells of it in a file, one JSON object a line, as nobody may be able to call it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_ckpt
from ray_ckpt.agent import find_or_start_agent
from ray_ckpt.checkpointer import Timeouts
from ray_ckpt.coordinator import NAMESPACE, find
from ray_ckpt.coordinator.actor import remote_coordinator
from ray_ckpt.coordinator.find import LEASE_S
from ray_ckpt.coordinator.names import coordinator_name
from ray_ckpt.errors import RayCkptError, UsageError
from ray_ckpt.storage import locate
from tests.system import states
from tests.system.lan import GCS_PORT
from tests.system.waiting import eventually, pause

PATIENT = Timeouts(start_s=300.0, save_s=120.0, settle_s=10.0, host_s=15.0, recover_s=300.0)
"""A loaded machine takes its time to start a job, and the first save waits for that."""
_NODE_S = 120.0


@dataclass(frozen=True)
class Order:
    """What a trainer does. ``by`` is written into its state; the file ``stop`` names the last step, once there is one.

    ``after``: the address of a node that Ray has to give up first. ``coordinator``: have it started on this host.
    ``writes``: whether this host writes its shards.
    """

    head: str
    address: str
    url: str
    memory: str
    told: str
    stop: str
    rank: int
    world: int
    by: str
    settings: dict[str, Any] = field(default_factory=dict)
    pace_s: float = 0.05
    after: str = ""
    coordinator: bool = False
    writes: bool = True


def state(order: Order, step: int) -> dict[str, Any]:
    """What this rank holds at a step."""
    return {**states.mixed(order.rank, order.world, step), "by": order.by}


def main() -> None:
    """Do as the order says."""
    order = Order(**json.loads(sys.argv[1]))
    with Path(order.told).open("a", buffering=1) as out:

        def say(**what: Any) -> None:
            out.write(json.dumps(what) + "\n")

        try:
            work(order, say)
        except RayCkptError as error:
            say(error=type(error).__name__, text=str(error))
            raise


def work(order: Order, say: Any) -> None:
    """Connect to Ray and train."""
    ray.init(
        address=f"{order.head}:{GCS_PORT}",
        _node_ip_address=order.address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level="ERROR",
    )
    prepare(order)
    settings = {"timeouts": PATIENT, "delete_grace_s": 0.0, "memory_dir": order.memory, **order.settings}
    with ray_ckpt.Checkpointer(order.url, rank=order.rank, world_size=order.world, **settings) as ckpt:
        ckpt.restore(states.zeros_like(state(order, 0)))
        step = ckpt.restored_step or 0
        say(restored=ckpt.restored_step)
        with contextlib.suppress(UsageError, ray.exceptions.RayError):
            say(coordinator=ray.get(find(order.url).pid.remote(), timeout=30))
        while step < last_step(order) and not ckpt.should_stop:
            step += 1
            ckpt.step(step, state(order, step))
            say(step=step)
            pause(order.pace_s)
    say(ended=step)


def last_step(order: Order) -> int:
    """After which step to end: the same on all ranks, which save it together."""
    path = Path(order.stop)
    return int(path.read_text()) if path.exists() else sys.maxsize


def prepare(order: Order) -> None:
    """What has to be so before the Checkpointer is made."""
    if order.after:
        eventually(lambda: not lives(order.after), f"Ray's giving {order.after} up", _NODE_S)
    here = ray.get_runtime_context().get_node_id()
    if order.coordinator:
        remote_coordinator(
            name=coordinator_name(order.url),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_concurrency=1000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        ).remote(locate(order.url).url, {}, single_coordinator=False, lease_s=LEASE_S)
    if not order.writes:
        find_or_start_agent(order.url, {}, node_id=here, max_writes=0, memory_folder=order.memory)


def lives(address: str) -> bool:
    """Whether Ray believes in the node of this address."""
    return any(node["Alive"] and node["NodeManagerAddress"] == address for node in ray.nodes())


if __name__ == "__main__":
    main()
