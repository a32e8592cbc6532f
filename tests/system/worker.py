"""A training process: a plain Ray actor that holds one `Checkpointer`."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import ray_ckpt
from tests.system import states
from tests.system.waiting import eventually, pause

MakeState = Callable[[int, int, int], Any]


class Worker:
    """One process of a job; used again by the next test unless it was killed."""

    def __init__(self) -> None:
        self.rank = self.world = 0
        self.ckpt: ray_ckpt.Checkpointer = None  # type: ignore[assignment]
        self.state: Any = None
        self.messages: list[str] = []
        self.done = 0
        self._gate, self._held = threading.Event(), threading.Event()
        self._gate.set()
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ray_ckpt").addHandler(handler)
        logging.getLogger("ray_ckpt").setLevel(logging.INFO)

    def open(self, url: str, rank: int, world: int, **settings: Any) -> int:
        """Make the Checkpointer; this process's number."""
        self.rank, self.world = rank, world
        self.messages.clear()
        self.state, self.done = None, 0
        self._gate.set()
        self.ckpt = ray_ckpt.Checkpointer(url, rank=rank, world_size=world, **settings)
        return os.getpid()

    def restore(self, make: MakeState = states.small, step: int | None = None, **options: Any) -> int | None:
        """Restore into a target of zeros; the restored step."""
        like = states.zeros_like(make(self.rank, self.world, 1))
        self.state = self.ckpt.restore(like, step, **options)
        return self.ckpt.restored_step

    def train(self, first: int, last: int, make: MakeState = states.small, pace_s: float = 0.0) -> list[int]:
        """Report the steps from first to last; the one in which `should_stop` was seen, which ends it.

        ``pace_s`` is the average time of a step. Ranks take turns in being the faster one, and drift some steps
        apart as in a job whose collectives run behind.
        """
        self._last = last
        for step in range(first, last + 1):
            if not self._gate.is_set():
                self._held.set()
                self._gate.wait(60.0)
            if step > self._last:
                break
            self.state = make(self.rank, self.world, step)
            self.ckpt.step(step, self.state)
            self.done = step
            if self.ckpt.should_stop:
                return [step]
            if pace_s and (step // 8 + self.rank) % 2:
                pause(2 * pace_s)
        return []

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of the Checkpointer."""
        return getattr(self.ckpt, method)(*arguments, **options)

    def get(self, name: str) -> Any:
        """An attribute of the Checkpointer, or ``messages``, ``done``, ``state`` of this process."""
        if name == "state":
            return states.plain(self.state)
        return getattr(self, name) if name in ("messages", "done") else getattr(self.ckpt, name)

    def wait_to_go_on(self) -> None:
        """Return with `go_on`."""
        self._gate.clear()
        assert self._gate.wait(60.0), f"rank {self.rank} was left to wait"

    def hold(self) -> int:
        """Have `train` wait between two steps; the last step that it has completed."""
        self._held.clear()
        self._gate.clear()
        assert self._held.wait(60.0), f"rank {self.rank} is still in the step after {self.done}"
        return self.done

    def go_on(self, last: int) -> None:
        """Have a `train` that is held go on up to this step."""
        self._last = last
        self._gate.set()

    def save(self, step: int, make: MakeState = states.small, **options: Any) -> None:
        """Save explicitly."""
        self.ckpt.save(step, make(self.rank, self.world, step), **options)

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(self, ...)`` in this process."""
        return function(self, *arguments)

    def leave(self) -> None:
        """Leave as after an exception: nothing is saved."""
        if self.ckpt is not None:
            self.ckpt.__exit__(RuntimeError, RuntimeError("the test is over"), None)

    def die_after(self, step: int, make: MakeState = states.small) -> None:
        """Report a step, and be killed before the next line runs."""
        self.ckpt.step(step, make(self.rank, self.world, step))
        os.kill(os.getpid(), signal.SIGKILL)


def until_planned(worker: Worker) -> None:
    """Wait for plan and memory, which the first save would wait for and a snapshot for memory alone does not."""
    ckpt = worker.ckpt
    eventually(lambda: ckpt._link.logic.plan_ready is not None, "a plan")
    eventually(lambda: ckpt._saver.slots.nbytes > 0, "memory")
