"""A worker's connection: its machine, the courier, and waits that end with an answer or name who is late."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt import errors
from ray_ckpt.agent import find_or_start_agent
from ray_ckpt.checkpointer.courier import Courier
from ray_ckpt.coordinator import find_or_start
from ray_ckpt.errors import FencedError, RayCkptError, UnavailableError
from ray_ckpt.protocol.messages import JobConfig
from ray_ckpt.protocol.worker import WorkerLogic

logger = logging.getLogger(__name__)

_SLICE_S = 1.0


@dataclass(frozen=True, slots=True)
class Home:
    """Where a run lives: its directory, and how each host reaches it and holds its snapshots."""

    url: str
    storage_options: Mapping[str, Any]
    single_coordinator: bool
    max_writes: int
    memory_folder: str | os.PathLike[str] | None
    recover_s: float


class Link:
    """Holds the `WorkerLogic` of this process and the lock around it."""

    def __init__(self, home: Home, rank: int, config: JobConfig) -> None:
        self.url = home.url
        self.rank = rank
        self.node_id = ray.get_runtime_context().get_node_id()
        self.logic = WorkerLogic(uuid.uuid4().hex[:16], rank, config)
        # The lock of the condition by itself, for the training thread: entered without the condition's own code.
        self.lock = threading.RLock()
        self.condition = threading.Condition(self.lock)
        self.trouble: RayCkptError | None = None
        self.on_view: Callable[[], None] = lambda: None
        self._home = home
        self._told: set[int] = set()
        self.taken: dict[int, float] = {}
        self.courier = Courier(self.logic, self.condition, self._find, self._check_node, self._viewed, self._broken)

    def open(self) -> None:
        """Find or start the coordinator and this host's agent, and begin to report."""
        home = self._home
        find_or_start(home.url, home.storage_options, single_coordinator=home.single_coordinator)
        self.courier.start()

    def _find(self) -> Any:
        home = self._home
        return find_or_start_agent(
            home.url,
            home.storage_options,
            node_id=self.node_id,
            single_coordinator=home.single_coordinator,
            max_writes=home.max_writes,
            memory_folder=None if home.memory_folder is None else os.fspath(home.memory_folder),
            recover_s=home.recover_s,
        )

    def _check_node(self) -> None:
        """Raise `FencedError` if Ray has given up this node: that is for good, though its processes may live on."""
        # Where Ray's GCS does not answer either, nobody knows.
        with contextlib.suppress(RayError, RuntimeError):
            if any(node["NodeID"] == self.node_id and not node["Alive"] for node in ray.nodes()):
                raise FencedError(
                    f"rank {self.rank} of {self.url}: Ray has given up the node {self.node_id} of this process, which "
                    "can save no more; start the job again on other nodes"
                )

    def _viewed(self) -> None:
        """In the courier's thread, after each view."""
        logic = self.logic
        if logic.refused is not None and self.trouble is None:
            self.trouble = FencedError(f"rank {self.rank} of {self.url}: {logic.refused}")
        with self.condition:
            fresh = [o for step, o in sorted(logic.outcomes.items()) if step not in self._told]
            self._told = set(logic.outcomes)
            taken = {step: self.taken.pop(step) for step in logic.outcomes if step in self.taken}
        for outcome in fresh:
            if outcome.quiet:
                logger.debug("step %d: %s", outcome.step, outcome.error)
            elif outcome.state == "failed":
                logger.warning("step %d was not saved: %s; training goes on", outcome.step, outcome.error)
            elif self.rank == 0:
                after = (
                    f", {time.monotonic() - taken[outcome.step]:.1f} s after the snapshot"
                    if outcome.step in taken
                    else ""
                )
                logger.info("step %d is committed as %s/%s%s", outcome.step, self.url, outcome.prefix, after)
        self.on_view()

    def _broken(self, error: Exception) -> None:
        """In the courier's thread, as its last act: nothing will be heard any more."""
        if not isinstance(error, RayCkptError):
            error = UnavailableError(
                f"rank {self.rank} of {self.url} has lost its connection to the coordinator: {error!r}"
            )
        self.trouble = self.trouble or error
        with self.condition:
            self.condition.notify_all()

    @property
    def problem(self) -> RayCkptError | None:
        """Why waiting on is pointless: this process is not wanted any more, or the job cannot go on."""
        if self.trouble is not None:
            return self.trouble
        found = self.logic.error
        if found is None:
            return None
        kind: type[RayCkptError] = getattr(errors, found.kind)
        return kind(f"{self.url}: {found.text}")

    def wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until ``done()``, which is called with the lock held.

        Raises:
            RayCkptError: the job cannot go on.
            UnavailableError: the time is over; names who is late.
        """
        deadline = time.monotonic() + timeout_s
        with self.condition:
            while not done():
                problem = self.problem
                if problem is not None:
                    raise problem
                left = deadline - time.monotonic()
                if left <= 0:
                    late = self.logic.late or "the host's agent has not answered"
                    raise UnavailableError(
                        f"rank {self.rank} of {self.url} waited {timeout_s:.0f} s for {what}; late is: {late}"
                    )
                self.condition.wait(min(left, _SLICE_S))

    def close(self) -> None:
        """Say goodbye; what is sealed is saved without this process."""
        self.courier.close()
