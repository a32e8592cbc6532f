"""One coordinator for a directory: found by name, or started."""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.coordinator.actor import remote_coordinator
from ray_ckpt.errors import SaveError, UnavailableError, UsageError
from ray_ckpt.protocol.messages import RunStatus
from ray_ckpt.storage import locate

logger = logging.getLogger(__name__)

NAMESPACE = "ray_ckpt"
LEASE_S = 30.0
_CALL_S = 30.0


def run_id(url: str) -> str:
    """A short name for the run in this directory: the same for every way to write its URL."""
    return hashlib.blake2b(locate(url).url.encode(), digest_size=8).hexdigest()


def coordinator_name(url: str) -> str:
    """The name of the run's coordinator actor."""
    return f"coordinator:{run_id(url)}"


def find_or_start(url: str, storage_options: Mapping[str, Any], *, single_coordinator: bool = False) -> Any:
    """The handle of the run's coordinator; many may ask at once and get the same."""
    options: dict[str, Any] = {
        "name": coordinator_name(url),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_concurrency": 10_000,
    }
    head = _head_node()
    if head is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head, soft=True)
    return remote_coordinator(**options).remote(
        locate(url).url, dict(storage_options), single_coordinator=single_coordinator, lease_s=LEASE_S
    )


def _head_node() -> str | None:
    """The head, which outlives preempted workers."""
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    return None


def find(url: str) -> Any:
    """The handle of a running coordinator.

    Raises:
        UsageError: no job is saving to this directory in this Ray cluster.
    """
    try:
        return ray.get_actor(coordinator_name(url), namespace=NAMESPACE)
    except ValueError:
        raise UsageError(
            f"no running job of this Ray cluster saves to {locate(url).url}: check the URL and the cluster's address"
        ) from None


def request_save(url: str, reason: str, timeout_s: float) -> int:
    """Ask the job that saves to this directory for a save; the step that was committed.

    Raises:
        UsageError: no such job in this Ray cluster.
        SaveError: the save failed.
        UnavailableError: no save was committed within ``timeout_s``.
    """
    _connect()
    coordinator = find(url)
    request_id = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        call = coordinator.request_save.remote(request_id, reason, min(left, 10.0))
        outcome = ray.get(call, timeout=left + _CALL_S)
        if outcome is None:
            continue
        if outcome.state == "failed":
            raise SaveError(f"the save of step {outcome.step} failed: {outcome.error}")
        return int(outcome.step)
    raise UnavailableError(
        f"no save was committed within {timeout_s:.0f} s: {_what_it_waits_for(coordinator)}; training may not have "
        "reached its next step, see `ray-ckpt ls` later"
    )


def status(url: str) -> RunStatus:
    """What the run in this directory is doing.

    Raises:
        UsageError: no such job in this Ray cluster.
    """
    _connect()
    found: RunStatus = ray.get(find(url).status.remote(), timeout=_CALL_S)
    return found


def _connect() -> None:
    """Connect to the cluster of RAY_ADDRESS or of this machine's own head. Raises `UsageError` if there is none."""
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise UsageError(f"no Ray cluster to ask ({error}): run this on one of its nodes, or set RAY_ADDRESS") from None


def _what_it_waits_for(coordinator: Any) -> str:
    found: RunStatus = ray.get(coordinator.status.remote(), timeout=_CALL_S)
    late = [f"step {s.step}: {s.late}" for s in found.saves]
    return "; ".join(late) or found.waiting or f"workers are at steps {list(found.steps)}"
