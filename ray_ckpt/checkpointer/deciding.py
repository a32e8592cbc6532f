"""What a decision asks of the training thread: a snapshot, a stop; and how the saves that it took part in ended."""

from __future__ import annotations

from typing import Any

from ray_ckpt.checkpointer.link import Link
from ray_ckpt.checkpointer.saving import Saver
from ray_ckpt.errors import RayCkptError, SaveError
from ray_ckpt.protocol.messages import Proposal, SaveOutcome, Trigger
from ray_ckpt.protocol.worker import Due
from ray_ckpt.target import is_function
from ray_ckpt.train import Pointer

_STOP_WAIT_S = 120.0
_CALL_S = 30.0


class Decisions:
    """Carries out in the training thread what has been decided. ``save_timeout_s``: within which a save ends."""

    def __init__(self, link: Link, saver: Saver, save_timeout_s: float) -> None:
        self._link = link
        self._saver = saver
        self._limit_s = save_timeout_s + _CALL_S
        self._told: set[int] = set()
        self._stop: Proposal | None = None

    @property
    def stop(self) -> Proposal | None:
        """What all workers have stopped for at the step that was told last; a loop that goes on has not."""
        stop = self._stop
        return stop if stop is not None and stop.step == self._link.logic.step else None

    def act(self, due: Due, state: Any) -> None:
        """Take the snapshot that is due; `stop` is set if all workers stop at this step.

        Raises:
            SaveError: all workers stop at this step with an error.
            RayCkptError: as `Saver.save`.
        """
        if due.snapshot == "memory":
            self._saver.remember(due.step, resolve(state))
        elif due.snapshot is not None:
            try:
                self._saver.save(due.step, resolve(state), due.snapshot)
            except RayCkptError:
                # The caller hears of it here and now; `wait` need not say it again.
                self._told.add(due.step)
                raise
        if due.stop is not None:
            self._heed(due.stop)

    def _heed(self, stop: Proposal) -> None:
        """Wait until it is sure that all workers stop at this step, so that none enters a collective alone."""
        link = self._link
        link.courier.nudge()
        what = f"the decision to stop at step {stop.step}"
        link.wait(lambda: link.logic.stop_state(stop) != "open", _STOP_WAIT_S, what)
        decided = link.logic.stop_state(stop) == "decided"
        if decided and stop.error is not None:
            raise SaveError(f"{link.url}: all workers stop at step {stop.step}: {stop.error}")
        if decided:
            self._stop = stop

    def ask(self, step: int, state: Any, trigger: Trigger) -> None:
        """Save this step, for this reason, unless it is saved already."""
        with self._link.condition:
            due = self._link.logic.arrive(step, ask=trigger)
        if due is not None:
            self.act(due, state)

    def check_not_failed(self, step: int) -> None:
        """A decided save stays so. The failure of one that was not asked for by `save` is only warned about.

        Raises:
            SaveError: the save of this step failed.
        """
        logic = self._link.logic
        with self._link.condition:
            outcome, trigger = logic.outcomes.get(step), logic.snapshots.get(step, "explicit")
        failed = outcome is not None and outcome.state == "failed"
        if step in self._told or (failed and trigger == "explicit"):
            why = f": {outcome.error}" if outcome is not None and outcome.error else ""
            raise SaveError(f"{self._link.url}: the save of step {step} has failed{why}; save at a later step")

    def wait(self, timeout_s: float | None) -> None:
        """Wait until all is decided. Raises `SaveError` for the newest failure that was not raised before."""
        failed = [outcome for outcome in self.settle(timeout_s) if outcome.step not in self._told]
        self._told.update(outcome.step for outcome in failed)
        if failed:
            raise SaveError(f"{self._link.url}: step {failed[-1].step} was not saved: {failed[-1].error}")

    def settle(self, timeout_s: float | None = None) -> list[SaveOutcome]:
        """Wait until all is decided; the failures of late, by step."""
        logic = self._link.logic
        with self._link.condition:
            awaited = list(logic.undecided)
        limit = self._limit_s if timeout_s is None else timeout_s
        self._link.wait(lambda: not any(s in logic.undecided for s in awaited), limit, f"the saves of steps {awaited}")
        with self._link.condition:
            return [o for _, o in sorted(logic.outcomes.items()) if o.state == "failed" and not o.quiet]

    def newest(self) -> Pointer | None:
        """The last checkpoint that this start has committed, else the one that it restored."""
        link, logic = self._link, self._link.logic
        with link.condition:
            committed = [o for o in logic.outcomes.values() if o.state == "committed"]
            restored = logic.restore.checkpoint if logic.restore_done and logic.restore is not None else None
        last = max(committed, key=lambda outcome: outcome.step, default=restored)
        return None if last is None else Pointer(link.url, last.step, last.prefix, last.generation)


def resolve(state: Any) -> Any:
    """The state itself, where a function stands for it."""
    return state() if is_function(state) else state
