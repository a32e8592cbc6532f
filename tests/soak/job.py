"""The job of one run: its training processes from start to start, and what they told when they had restored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ray_ckpt.errors import FencedError, RayCkptError, SaveError, StorageError, UnavailableError
from tests.soak.hosts import Host
from tests.soak.model import Model
from tests.soak.strike import kill
from tests.soak.tally import Tally
from tests.soak.trainer import Abandoned, Order, Restored, restores
from tests.system.waiting import pause

_WARM_S = 60.0
_LEAVE_S = 2.0
_HARMLESS = (SaveError, StorageError, UnavailableError, FencedError)
"""With these a job may stop while it is disturbed; with anything else it must not."""


@dataclass
class Rank:
    """A training process. ``killed``: by us; ``ended``: its `train` has returned or raised."""

    actor: Any
    host: Host
    pid: int
    training: Any = None
    killed: bool = False
    ended: bool = False
    last: int | None = None
    error: str = ""


@dataclass
class Job:
    """One run's job. ``settings`` go to every Checkpointer."""

    url: str
    model: Model
    pace_s: float
    journals: Path
    settings: dict[str, Any]
    tally: Tally
    starts: int = 0
    ranks: list[Rank] = field(default_factory=list)

    def start(self, places: list[Host]) -> None:
        """Start a rank on each of these hosts.

        Raises:
            RayError: a host takes no processes.
        """
        self.starts += 1
        self.tally.starts += 1
        hired = [(place.hire(), place) for place in places]
        pids = ray.get([actor.pid.remote() for actor, _ in hired], timeout=_WARM_S)
        self.ranks = [Rank(actor, place, pid) for (actor, place), pid in zip(hired, pids, strict=True)]
        memory = tuple(str(place.memory) for place in places)
        self.order = Order(self.starts, self.url, memory, self.model, self.pace_s, self.journals, self.settings)
        for number, rank in enumerate(self.ranks):
            rank.training = rank.actor.train.remote(self.order, number)

    def restored(self) -> list[Restored]:
        """What its ranks told so far."""
        return restores(self.order)

    @property
    def all_restored(self) -> bool:
        """Whether all ranks train."""
        return bool(self.ranks) and len(self.restored()) == len(self.ranks)

    def look(self) -> None:
        """Take in which ranks have ended, and how."""
        for number, rank in enumerate(self.ranks):
            if not rank.ended and ray.wait([rank.training], timeout=0)[0]:
                self._take_in(number, rank)

    def _take_in(self, number: int, rank: Rank) -> None:
        rank.ended = True
        try:
            rank.last = ray.get(rank.training)
        except RayTaskError as error:
            self._judge(number, rank, error.cause)
        except RayActorError as error:
            rank.error = "its process ended"
            if not rank.killed:
                self.tally.violated(f"rank {number} of start {self.starts} died by itself: {error}")
        except RayError as error:
            rank.error = repr(error)
            self.tally.violated(f"rank {number} of start {self.starts}: {error!r}")

    def _judge(self, number: int, rank: Rank, cause: BaseException) -> None:
        if isinstance(cause, Abandoned):
            return
        rank.error = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, RayCkptError) and isinstance(cause, _HARMLESS):
            self.tally.stops[type(cause).__name__] += 1
            self.tally.tell(f"rank {number} of start {self.starts} stopped: {rank.error[:300]}")
        else:
            self.tally.violated(f"rank {number} of start {self.starts} failed: {rank.error}")

    @property
    def running(self) -> bool:
        """Whether no rank has ended: a job with one rank less cannot go on."""
        return bool(self.ranks) and not any(rank.ended for rank in self.ranks)

    def kill(self, number: int) -> bool:
        """SIGKILL a rank's process."""
        rank = self.ranks[number]
        rank.killed = True
        return kill(rank.pid)

    def lost(self, host: Host) -> None:
        """A host is gone, and its ranks with it."""
        for rank in self.ranks:
            rank.killed |= rank.host is host

    def give_up(self) -> None:
        """End what is left of a start; processes that do not leave by themselves are killed, as a launcher would."""
        for rank in self.ranks:
            if not rank.ended and not rank.killed:
                rank.actor.abandon.remote()
        self._until(lambda: all(r.ended or r.killed for r in self.ranks), _LEAVE_S)
        for rank in self.ranks:
            if rank.killed:
                continue
            if rank.ended:
                rank.host.idle.append(rank.actor)
            elif kill(rank.pid):
                rank.killed = True
                self.tally.waiting += 1
        self.ranks = []

    def finish(self) -> None:
        """Have all ranks save and stop at one step, without waiting."""
        self.ranks[0].actor.finish.remote()

    def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                return False
            pause(0.02)
            self.look()
        return True

    def reached(self) -> list[int]:
        """The step of each rank that answers at once."""
        try:
            steps: list[int] = ray.get([r.actor.step.remote() for r in self.ranks], timeout=_LEAVE_S)
        except (RayError, GetTimeoutError):
            return []
        return steps
