"""A training process of a soak: a plain Ray actor that trains until it is told to stop, or killed."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray_ckpt
from tests.soak.model import Model, digest
from tests.system.waiting import pause


@dataclass(frozen=True)
class Order:
    """One start of the job. ``settings`` go to every Checkpointer; ``journals``: where each rank tells its restore.

    ``memory``: the folder for snapshots on each rank's host.
    """

    start: int
    url: str
    memory: tuple[str, ...]
    model: Model
    pace_s: float
    journals: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """The number of ranks."""
        return len(self.memory)

    def journal(self, rank: int) -> Path:
        """The file that a rank makes when it has restored."""
        return self.journals / f"{self.start:05d}-{rank}.json"


@dataclass(frozen=True)
class Restored:
    """How one rank began: the step (-1: nothing was there) and the digest of the state that `restore` returned.

    ``own``: what a rank has for itself, which the digest leaves out. ``source``: where it was read from, for people.
    """

    rank: int
    world: int
    step: int
    digest: str
    own: list[int]
    seconds_s: float
    source: str


def restores(order: Order) -> list[Restored]:
    """What the ranks of a start have told so far."""
    found = []
    for rank in range(order.world):
        path = order.journal(rank)
        if path.exists():
            found.append(Restored(**json.loads(path.read_text())))
    return found


class Abandoned(Exception):
    """Another rank of the job is gone: this one cannot go on, as in any job with collectives."""


class Trainer:
    """The actor. `train` is a call of its own; the others may come meanwhile, or long before."""

    def __init__(self) -> None:
        self._abandon = threading.Event()
        self._ckpt: Any = None
        self._step = -1
        self._messages: list[str] = []
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record: self._messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ray_ckpt").addHandler(handler)
        logging.getLogger("ray_ckpt").setLevel(logging.INFO)

    def pid(self) -> int:
        """The process to kill."""
        return os.getpid()

    def step(self) -> int:
        """The last step that was done."""
        return self._step

    def abandon(self) -> None:
        """Give up the start that runs: it leaves as after an exception."""
        self._abandon.set()

    def finish(self) -> None:
        """Have all ranks save and stop at one step."""
        if self._ckpt is not None:
            self._ckpt.request_stop("the soak has had enough of this run")

    def train(self, order: Order, rank: int) -> int:
        """Restore and train until all stop; the last step.

        Raises:
            Abandoned: after `abandon`.
            RayCkptError: as `ray_ckpt.Checkpointer` does.
        """
        self._abandon.clear()
        self._messages.clear()
        self._step = -1
        settings = {"memory_dir": order.memory[rank], **order.settings}
        with ray_ckpt.Checkpointer(order.url, rank=rank, world_size=order.world, **settings) as ckpt:
            self._ckpt = ckpt
            state = self._restore(ckpt, order, rank)
            while not ckpt.should_stop:
                order.model.advance(state, rank)
                self._step = state["step"]
                ckpt.step(self._step, state)
                if self._abandon.is_set():
                    raise Abandoned(f"rank {rank} of start {order.start} gives up after step {self._step}")
                pause(order.pace_s)
        return self._step

    def _restore(self, ckpt: ray_ckpt.Checkpointer, order: Order, rank: int) -> dict[str, Any]:
        began = time.monotonic()
        state: dict[str, Any] = ckpt.restore(order.model.state(rank, order.world, 0))
        seconds = time.monotonic() - began
        step = -1 if ckpt.restored_step is None else ckpt.restored_step
        own = [int(number) for number in state["rng"].value]
        told = Restored(rank, order.world, step, digest(state), own, seconds, self._source(step))
        unfinished = order.journal(rank).with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(told)))
        unfinished.rename(order.journal(rank))
        return state

    def _source(self, step: int) -> str:
        if step < 0:
            return "nothing was there"
        return "from host memory" if any("from the memory of" in m for m in self._messages) else "from the store"
