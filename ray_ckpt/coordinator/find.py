"""One coordinator for a directory: found by name, or started."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import Retrying, retry_if_exception_type, retry_if_not_exception_type, stop_after_delay, wait_fixed

from ray_ckpt.coordinator.actor import remote_coordinator
from ray_ckpt.coordinator.names import NAMESPACE, coordinator_name
from ray_ckpt.errors import SaveError, UnavailableError, UsageError
from ray_ckpt.protocol.messages import RunStatus
from ray_ckpt.storage import locate

logger = logging.getLogger(__name__)

LEASE_S = 30.0
_CALL_S = 30.0
_AGAIN_S = 0.5


def find_or_start(url: str, storage_options: Mapping[str, Any], *, single_coordinator: bool = False) -> Any:
    """The handle of the run's coordinator; many may ask at once and get the same."""
    options: dict[str, Any] = {
        "name": coordinator_name(url),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        # Each host's open question is a call under way.
        "max_concurrency": 100_000,
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


def request_save(url: str, reason: str, timeout_s: float, address: str | None = None) -> int:
    """Ask the job that saves to this directory for a save; the step that was committed.

    ``address``: the Ray cluster's, as `ray.init` takes it; None: that of RAY_ADDRESS or of this machine's own head.

    Raises:
        UsageError: no such job in this Ray cluster.
        SaveError: the save failed.
        UnavailableError: no save was committed within ``timeout_s``.
    """
    _connect(address)
    request_id = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        outcome = _ask(url, left, "request_save", request_id, reason, min(left, 10.0))
        if outcome is None:
            continue
        if outcome.state == "failed":
            raise SaveError(f"the save of step {outcome.step} failed: {outcome.error}")
        return int(outcome.step)
    raise UnavailableError(
        f"no save was committed within {timeout_s:.0f} s: {_what_it_waits_for(url)}; training may not have "
        "reached its next step, see `ray-ckpt ls` later"
    )


def status(url: str) -> RunStatus:
    """What the run in this directory is doing.

    Raises:
        UsageError: no such job in this Ray cluster.
        UnavailableError: its coordinator does not answer.
    """
    _connect()
    found: RunStatus = _ask(url, _CALL_S, "status")
    return found


def _ask(url: str, timeout_s: float, method: str, *arguments: Any) -> Any:
    """Call the coordinator, again while Ray restarts it: what is asked for may be asked twice.

    Raises:
        UsageError: no such job in this Ray cluster.
        UnavailableError: no answer within ``timeout_s``, and a bit for the way.
    """

    def call() -> Any:
        return ray.get(getattr(find(url), method).remote(*arguments), timeout=timeout_s + _CALL_S)

    again = retry_if_exception_type(RayError) & retry_if_not_exception_type(RayTaskError)
    try:
        return Retrying(stop=stop_after_delay(timeout_s), wait=wait_fixed(_AGAIN_S), retry=again, reraise=True)(call)
    except RayError as error:
        raise UnavailableError(
            f"the coordinator of {locate(url).url} does not answer: {error}; is its node gone, or does it start anew "
            "again and again? See its log in the Ray dashboard"
        ) from error


def _connect(address: str | None = None) -> None:
    """Connect to a cluster, as `request_save` says, unless this process is in one. Raises `UsageError` without one."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=address or "auto", namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise UsageError(
            f"no Ray cluster to ask ({error}): run this on one of its nodes, or name it (--address, RAY_ADDRESS)"
        ) from None


def _what_it_waits_for(url: str) -> str:
    found = status(url)
    late = [f"step {s.step}: {s.late}" for s in found.saves]
    return "; ".join(late) or found.waiting or f"workers are at steps {list(found.steps)}"
