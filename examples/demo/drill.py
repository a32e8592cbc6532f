"""The story: train on all hosts, lose a process in the middle of a save, go on with one host less."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

import ray_ckpt
from examples.demo.checks import snapshot_steps
from examples.demo.display import Display
from examples.demo.fleet import Fleet
from examples.demo.journal import Story
from examples.demo.trainer import Job
from ray_ckpt.errors import UsageError

_LOOK_S = 0.2
_HUNT_S = 0.01
_PATIENCE_S = 120.0


class DrillError(Exception):
    """The demo could not go on; the text says where it stood."""


@dataclass
class Outcome:
    """What happened. Times in seconds since the epoch; ``killed_step`` is the step whose save was under way."""

    before: list[Story] = field(default_factory=list)
    after: list[Story] = field(default_factory=list)
    killed_at: float = 0.0
    killed_step: int = -1
    killed_host: int = -1
    newest: int = -1
    committed: set[int] = field(default_factory=set)

    @property
    def abandoned(self) -> set[int]:
        """Steps of which there were snapshots, but no commit."""
        return snapshot_steps([*self.before, *self.after]) - self.committed


class Drill:
    """Runs both starts. ``job``: the first one, without an end of its own; ``steps`` or ``seconds``: of each start."""

    def __init__(self, console: Console, job: Job, steps: int | None, seconds: float) -> None:
        self._console = console
        self._job = job
        self._steps = steps
        self._seconds = seconds
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Both starts, and the kill between them.

        Raises:
            DrillError: something did not happen in time.
            FleetError: a training process ended that should not have.
        """
        self._first_start()
        hosts = tuple(host for host in self._job.hosts if host != self.outcome.killed_host)
        limits: dict[str, Any] = {"steps": self._steps} if self._steps else {"seconds": self._seconds}
        self._second_start(replace(self._job, start=2, hosts=hosts, **limits))
        return self.outcome

    def _first_start(self) -> None:
        outcome, fleet = self.outcome, Fleet(self._job)
        outcome.before = fleet.stories
        try:
            with Display(self._console, 1, outcome.committed) as display:
                fleet.start()
                self._watch(fleet, display, lambda _: self._trained_enough(fleet), _LOOK_S)
                self._console.print("  [yellow]now waiting for a save to be under way, to kill a process in it[/]")
                self._watch(fleet, display, lambda status: self._strike(fleet, status), _HUNT_S)
                self._await_decision(display, fleet)
        finally:
            fleet.end()
        found = ray_ckpt.checkpoints(self._job.url)
        outcome.newest = found[-1].step
        outcome.committed.update(c.step for c in found)

    def _second_start(self, job: Job) -> None:
        outcome, fleet = self.outcome, Fleet(job)
        outcome.after = fleet.stories
        try:
            with Display(self._console, 2, outcome.committed) as display:
                fleet.start()
                told = False
                while fleet.running:
                    fleet.update()
                    display.show(fleet.stories, self._status())
                    told = told or self._tell_restore(fleet.stories)
                    time.sleep(_LOOK_S)
                fleet.update()
        finally:
            fleet.end()
        outcome.committed.update(c.step for c in ray_ckpt.checkpoints(job.url))

    def _tell_restore(self, stories: list[Story]) -> bool:
        """The moment that the whole demo is about; True once it has been told."""
        story = stories[0]
        if story.restored is None or not story.steps:
            return False
        restored = story.restored
        was = {event.step: event.eval_loss for event in self.outcome.before[0].steps}.get(restored.step or -1)
        self._console.print(
            f"  [green]restored[/] step {restored.step} on {len(stories)} hosts in {restored.seconds_s:.2f} s: "
            f"loss on the fixed batch {restored.eval_loss:.6f}, before the kill {was or 0:.6f}; "
            f"step {story.steps[0].step} now has loss {story.steps[0].loss:.4f}"
        )
        return True

    def _trained_enough(self, fleet: Fleet) -> bool:
        steps = fleet.stories[0].steps
        if not steps or not self.outcome.committed:
            return False
        return len(steps) >= self._steps if self._steps else steps[-1].ended - steps[0].began >= self._seconds

    def _strike(self, fleet: Fleet, status: Any) -> bool:
        """Kill one process if a save is under way with all its snapshots taken and not all its shards written."""
        for save in status.saves if status is not None else ():
            if save.sealed == status.world_size and save.shards_done < save.shards:
                rank = len(self._job.hosts) // 2
                self.outcome.killed_at = fleet.kill(rank)
                self.outcome.killed_step, self.outcome.killed_host = save.step, self._job.hosts[rank]
                self._console.print(
                    f"  [red]SIGKILL[/] to the training process of host {self.outcome.killed_host} during the save of "
                    f"step {save.step} ({save.shards_done} of {save.shards} shards are written)"
                )
                return True
        return False

    def _await_decision(self, display: Display, fleet: Fleet) -> None:
        """The other processes miss the dead one's part of the sums; the save misses none of them."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            status = self._status()
            display.show(fleet.stories, status)
            if status is not None and not status.saves:
                self._tell_fate()
                return
            time.sleep(_HUNT_S)
        raise DrillError(f"after {_PATIENCE_S:.0f} s the save of step {self.outcome.killed_step} is still undecided")

    def _tell_fate(self) -> None:
        step, committed = self.outcome.killed_step, self.outcome.committed
        fate = "was committed all the same" if step in committed else "was abandoned"
        self._console.print(f"  the save of step {step} {fate}; the other processes cannot go on and are ended")

    def _watch(self, fleet: Fleet, display: Display, done: Callable[[Any], bool], every_s: float) -> None:
        deadline = time.monotonic() + _PATIENCE_S + self._seconds
        while time.monotonic() < deadline:
            fleet.update()
            status = self._status()
            display.show(fleet.stories, status)
            if done(status):
                return
            time.sleep(every_s)
        raise DrillError(f"start 1 did not come far enough in {_PATIENCE_S + self._seconds:.0f} s")

    def _status(self) -> Any:
        try:
            return ray_ckpt.status(self._job.url)
        except UsageError:
            # No coordinator yet.
            return None
