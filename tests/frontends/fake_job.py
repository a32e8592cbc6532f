"""Stands for a `Checkpointer`: tests of when a hook saves, and what it tells whom, need no cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_ckpt.errors import SaveError, UsageError
from ray_ckpt.protocol.messages import SaveOutcome


class FakeJob:
    """Commits at once, or when a test says so; ``jobs`` are all that were made, newest last.

    Saves of the steps ``fails`` fail; those of ``quiet`` too, since another worker has refused the step.
    """

    jobs: list[FakeJob]
    held = False
    fails: frozenset[int] = frozenset()
    quiet: frozenset[int] = frozenset()

    def __init__(self, url: str, *, world_size: int | None = None, **settings: Any) -> None:
        self.url = url
        self.settings = settings
        self.world_size = world_size or 1
        self.jobs.append(self)
        self.generation = len(self.jobs)
        self.should_stop = False
        self.adopted: list[int | None] = []
        self.agreed: list[int] = []
        self.bounds: list[tuple[int, int | None]] = []
        self.requests: list[str] = []
        self.stops: list[str] = []
        self.values: dict[int, dict[str, Any]] = {}
        self.outcomes: dict[int, SaveOutcome] = {}
        self.ended = ""
        self._last: tuple[int, Callable[[], Any]] | None = None

    def __enter__(self) -> FakeJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def all_steps(self) -> list[int]:
        return [s for job in self.jobs if job.url == self.url for s, o in job.outcomes.items() if o.prefix]

    def adopt(self, step: int | None) -> None:
        self.adopted.append(step)

    def reached(self, bound: int, stride: int | None = None) -> bool:
        self.bounds.append((bound, stride))
        return bool(self.agreed)

    def save(self, step: int, state: Callable[[], Any], *, force: bool = False) -> None:
        if self._last is not None and step < self._last[0]:
            raise UsageError(f"step {step} follows step {self._last[0]}")
        self._last = (step, state)
        if step not in self.values:
            self.values[step] = {name: value.copy() for name, value in state().items()}
            if not self.held:
                self.decide(step)

    def step(self, step: int, state: Callable[[], Any]) -> None:
        if self._last is not None and step <= self._last[0]:
            raise UsageError(f"step {step} follows step {self._last[0]}")
        self._last = (step, state)
        if step in self.agreed:
            self.agreed.remove(step)
            self.save(step, state)

    def request_save(self, reason: str) -> None:
        self.requests.append(reason)

    def request_stop(self, reason: str) -> None:
        self.stops.append(reason)

    def decide(self, step: int) -> None:
        """Commit the save of this step, or let it fail."""
        if step in self.quiet | self.fails:
            quiet = step in self.quiet
            error = "refused" if quiet else "no space left"
            self.outcomes[step] = SaveOutcome(self.generation, step, "failed", error=error, quiet=quiet)
        else:
            prefix = f"{self.settings['basename']}-{step}"
            self.outcomes[step] = SaveOutcome(self.generation, step, "committed", prefix)

    def outcome(self, step: int) -> SaveOutcome | None:
        return self.outcomes.get(step)

    def wait(self, timeout_s: float | None = None) -> None:
        for step in self.values.keys() - self.outcomes.keys():
            self.decide(step)
        if any(o.error and not o.quiet for o in self.outcomes.values()):
            raise SaveError("one failed")

    def close(self) -> None:
        self.ended = "closed"

    def leave(self) -> None:
        self.ended = self.ended or "left"
        self._last = None
