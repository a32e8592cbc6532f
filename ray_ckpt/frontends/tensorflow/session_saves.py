"""The saves of one session: values read in one run, handed to a `Checkpointer`, and told of once they are decided."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from ray_ckpt.checkpointer import Checkpointer, retry_until_agreed
from ray_ckpt.errors import SaveError, StateError, UsageError
from ray_ckpt.frontends.tensorflow.fetch import Fetch
from ray_ckpt.frontends.tensorflow.saver_graph import SaverTensors
from ray_ckpt.protocol.messages import SaveOutcome
from ray_ckpt.tree import Named

logger = logging.getLogger(__name__)

_HOURS_OFF = 10_000
"""A Saver's default for ``keep_checkpoint_every_n_hours``, which its documentation calls off."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a hook's checkpoints go: ``<url>/<basename>-<step>``; ``options`` are those of the `Checkpointer`."""

    url: str
    basename: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot of whose save the hook is to tell once it is decided.

    ``first``: at session creation, where listeners cannot ask for a stop.
    """

    step: Any
    job: Checkpointer
    first: bool


class SessionSaves:
    """Everything that a hook does with a `Checkpointer`, for one session from its creation to its end.

    Args:
        session: the raw `tf.compat.v1.Session`.
        step_tensor: reads the global step.
        saver: the `tf.compat.v1.train.Saver` whose variables are saved, by whose settings checkpoints are kept.
        place: where.
        keep_before: as of `Checkpointer`: which older checkpoints are not this saver's to count and delete.

    Raises:
        UsageError: the saver has no variables, or they are not in the session's graph.
        RayCkptError: as `Checkpointer` and its `adopt`.
    """

    def __init__(self, session: Any, step_tensor: Any, saver: Any, place: Place, keep_before: int | None) -> None:
        self.session = session
        self.saver = saver
        self.pid = os.getpid()
        self.last_step: Any = None
        self.keep_before = keep_before
        self._tensors = SaverTensors.of(saver.saver_def, session.graph)
        if self._tensors.is_empty:
            raise UsageError("the saver has no variables to save: give the hook one that has, or make some variables")
        self._fetch = Fetch(session, [step_tensor, *self._tensors.fetches])
        self._place = place
        self._pending: deque[Taken] = deque()
        self._open(int(session.run(step_tensor)))

    @retry_until_agreed
    def _open(self, step: int) -> None:
        """Start the job (again), for a session that is at this step now."""
        settings = self.saver.saver_def
        hours = settings.keep_checkpoint_every_n_hours
        with ExitStack() as undo:
            job = undo.enter_context(
                Checkpointer(
                    self._place.url,
                    basename=self._place.basename,
                    max_to_keep=settings.max_to_keep or None,
                    keep_every_hours=hours if hours < _HOURS_OFF else None,
                    keep_hours_grid=self.saver._next_checkpoint_time - hours * 3600,
                    keep_before=self.keep_before,
                    fresh=True,
                    **self._place.options,
                )
            )
            # The session goes on from the newest checkpoint that is not ahead of it.
            job.adopt(max((s for s in job.all_steps() if s <= step), default=None))
            undo.pop_all()
        self.job = job
        self._told = self._saved = -1
        self._known_step, self._run_steps = step, 0
        if self.keep_before == 0:
            # After another start of this job, what this one has saved is not older than the saver.
            self.keep_before = job.generation

    # -- saves --------------------------------------------------------------------------------------------

    def take(self, step: Any, *, first: bool = False) -> None:
        """Snapshot the session now. ``step`` is what the global step has just been; all workers call this with it.

        Raises:
            StateError: what the saver saves cannot be saved.
            RayCkptError: the job cannot go on.
        """
        step, state = self._read(step)
        if int(step) < self._told or int(step) <= self._saved:
            self._start_anew(int(step))
        self._told = self._saved = int(step)
        self.last_step = step
        held = [state]
        # Given as a function, since the `Checkpointer` holds on to what it is given: these are the variables' own
        # buffers, and an assignment to one that somebody still looks at makes a copy of it.
        self.job.save(int(step), lambda: held.pop() if held else self._read(step)[1], force=True)
        self._pending.append(Taken(step, self.job, first))

    def reached(self, known_step: int, steps_per_run: int) -> bool:
        """The session was at this step before or after the run that has just ended; as `Checkpointer.reached`.

        What is agreed on must be a step that the loop comes to. So the runs themselves say how many steps they take;
        ``steps_per_run`` counts until they have.
        """
        moved = known_step - self._known_step
        if moved > 0:
            self._known_step = known_step
            self._run_steps = min(moved, self._run_steps or moved)
        steps = self._run_steps or steps_per_run
        return self.job.reached(known_step + steps, steps)

    def offer(self, step: Any, before: Callable[[], None]) -> bool:
        """Take a snapshot if one was agreed on for this step; ``before`` is called first then. True if it was taken.

        Raises:
            SaveError: all workers stop here, since saves have failed.
            RayCkptError: as `take`.
        """
        if int(step) <= self._told:
            return False
        self._told = int(step)
        reads = []
        calls = [before]

        def state() -> Named:
            for call in calls:
                call()
            found, values = self._read(step)
            reads.append(found)
            return values

        try:
            self.job.step(int(step), state)
        finally:
            # The `Checkpointer` holds on to the function, which must not hold on to who calls here.
            calls.clear()
        if not reads:
            return False
        if reads[-1] != step:
            logger.warning("step %s is saved with the values of step %s: another process trains them", step, reads[-1])
        self._saved = int(step)
        self.last_step = step
        self._pending.append(Taken(step, self.job, first=False))
        return True

    def _read(self, step: Any) -> tuple[Any, Named]:
        """The values, and the step that they are of: another one than ``step`` where other processes train them."""
        found, *values = self._fetch()
        if found != step and self.job.world_size > 1:
            raise StateError(
                f"the global step went from {step} to {found} while a save of step {step} began: nothing that is run"
                " by before_save or before_snapshot may train, as all workers save the same step"
            )
        return found, self._tensors.state(values)

    def _start_anew(self, step: int) -> None:
        """The global step was set back: what was saved beyond it is not where training has come from.

        Or the save of this step was given up: a job does not take a step twice.
        """
        # Raises if a newer start of the job has taken over: that is not to be taken back.
        self.job.reached(step)
        with suppress(SaveError):
            self.job.wait()
        self.leave()
        self._open(step)

    # -- what became of them --------------------------------------------------------------------------------

    @property
    def is_pending(self) -> bool:
        """Whether there are snapshots of whose saves the hook has not told yet."""
        return bool(self._pending)

    def decided(self) -> Iterator[tuple[Taken, SaveOutcome]]:
        """The saves that have ended since the last call, in the order of their snapshots.

        Not those that were given up because workers did not agree on the step: nothing is wrong with these.
        """
        while self._pending:
            outcome = self._pending[0].job.outcome(int(self._pending[0].step))
            if outcome is None:
                return
            taken = self._pending.popleft()
            if not outcome.quiet:
                yield taken, outcome
            elif taken.step == self.last_step:
                self.last_step = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all saves are decided; how they ended is for `decided` to say.

        Raises:
            UnavailableError: not in time; names who is late.
            RayCkptError: the job cannot go on.
        """
        if self._pending:
            with suppress(SaveError):
                self.job.wait(timeout_s)

    def close(self) -> None:
        """The session has come to its end: wait for all saves, and leave."""
        with suppress(SaveError):
            self.job.close()

    def leave(self) -> None:
        """Leave at once: what lies in snapshot memory is saved without this process."""
        # A fork has no part in the job, nor the threads that would answer it.
        if self.pid == os.getpid():
            self.job.leave()
