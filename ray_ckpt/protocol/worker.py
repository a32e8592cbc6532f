"""One training process's side of the protocol: when to snapshot, what to vote, what to report.

The rule that keeps all ranks at the same step: a proposal for step S is accepted only while this loop has not
reached S, under the same lock that `arrive` runs under; from then on this worker is bound to snapshot at S.
Nobody waits for an agreement, except a worker that has reached an accepted STOP that is still undecided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray_ckpt.errors import UsageError
from ray_ckpt.policy import crosses, next_crossing
from ray_ckpt.protocol.messages import (
    JobConfig,
    Problem,
    Proposal,
    RestoreDecision,
    RestoreResult,
    RestoreWish,
    SaveOutcome,
    StopWish,
    Trigger,
    WorkerReport,
    WorkerView,
)
from ray_ckpt.types import Layout, RankPlan

_OUTCOMES_KEPT = 64
"""More than the coordinator repeats in a view, so that none is taken in twice."""

_MET_KEPT = 64
"""More than the coordinator keeps of what it has proposed."""


@dataclass(frozen=True, slots=True)
class Due:
    """What `arrive` asks of the training thread: a snapshot of this step, and/or to heed a stop."""

    step: int
    snapshot: Trigger | None
    stop: Proposal | None = None


class WorkerLogic:
    """State of one rank. Not thread safe: the caller holds one lock around every call.

    Deadlines are the caller's: it reads `generation`, `plan`, `stop_state` and so on, and calls `skip` when it
    gives up.
    """

    def __init__(self, worker: str, rank: int, config: JobConfig) -> None:
        self.worker = worker
        self.rank = rank
        self.config = config
        self.generation: int | None = None
        self.refused: str | None = None
        self.error: Problem | None = None
        self.late = ""
        self.loose: frozenset[tuple[int, int]] = frozenset()
        self.restore: RestoreDecision | None = None
        self.restore_done = False
        self.restored_step: int | None = None
        self.plan: RankPlan | None = None
        self.plan_fingerprint: str | None = None
        self.step = -1
        self.bound = -1
        self.outcomes: dict[int, SaveOutcome] = {}
        self.request_outcomes: dict[str, SaveOutcome] = {}
        self.snapshots: dict[int, Trigger] = {}
        self.finished = False
        self.closed = False
        self._wish: RestoreWish | None = None
        self._result: RestoreResult | None = None
        self._layout: Layout | None = None
        self._acknowledged: str | None = None
        self._accepted: dict[str, Proposal] = {}
        self._refused: set[str] = set()
        self._met: dict[str, None] = {}
        self._requests: dict[str, str] = {}
        self._stop_request: StopWish | None = None
        self._skipped: dict[int, str] = {}
        self._waiting_step: int | None = None
        self._due_step: int | None = None
        self._roll_call = -1
        self._stride = self._bound_stride = config.stride
        self._run_length: int | None = None
        self._jumped = False
        self._heard = False
        self._next_due = -1.0
        self._promised = -1
        self._sequence = 0
        self._seen = (0, -1)

    # -- the training thread -------------------------------------------------------------------

    def arrive(self, step: int, *, ask: Trigger | None = None) -> Due | None:
        """The loop has completed ``step``; what is due now, None for nothing.

        ``ask`` is "explicit" for `save()` and "final" for the save of a clean exit: both may name the step that
        was the last one already. Raises `UsageError` for a step that goes back.
        """
        if self.step < step < self._next_due and ask is None and not self._accepted:
            self._stride, self.step, self._due_step = step - self.step, step, None
            return None
        previous = self._previous(step, ask)
        if step > previous and self.step >= 0:
            self._stride = step - previous
        self.step = step
        saves = self.config.save_steps if self._own_cadence else None
        self._next_due = min(next_crossing(step, saves), next_crossing(step, self.config.memory_steps))
        trigger: Trigger | None = None
        if step not in self.snapshots and (step != self.saved_step or ask == "explicit"):
            if ask is not None:
                trigger = ask
            elif crosses(previous, step, saves):
                trigger = "cadence"
            elif crosses(previous, step, self.config.memory_steps):
                trigger = "memory"
        due = self._arrive_accepted(step, trigger) if self._accepted or trigger is not None else None
        if self._jumped and self._heard and step > previous:
            self._run_length = step - previous
        self._heard = True
        self._due_step = step if due is not None and due.snapshot not in (None, "memory") else None
        return due

    def reached(self, bound: int, stride: int | None = None) -> bool:
        """The loop may be at any step up to ``bound`` now; whether one that it has not told of yet has been agreed on.

        ``stride``: from one of its steps to the next, where that is not the job's. Nothing is accepted any more at or
        before the bound. While this is true, `arrive` must hear of each step.
        """
        if stride is not None and stride != self._bound_stride:
            self._bound_stride, self._run_length, self._jumped = stride, None, False
        if bound > self.bound:
            self.bound = bound
        agreed = self._promised > self.step and any(p.step > self.step for p in self._accepted.values())
        self._heard = self._heard and agreed
        return agreed

    def _previous(self, step: int, ask: Trigger | None) -> int:
        if self.step >= 0:
            if step > self.step or (ask is not None and step == self.step):
                return self.step
            raise UsageError(f"step {step} follows step {self.step}: steps must increase from call to call")
        if self.restored_step is None:
            if step < 0:
                raise UsageError(f"step {step}: steps count completed training steps, from 0")
            return 0
        if step < self.restored_step:
            raise UsageError(
                f"step {step} lies before the restored step {self.restored_step}: "
                f"start the loop at {self.restored_step + 1}"
            )
        return self.restored_step

    @property
    def directory(self) -> str:
        """Which directory this start belongs to, see `types.LogRecord`; known with the choice of a restore."""
        return self.restore.directory if self.restore is not None else ""

    @property
    def saved_step(self) -> int | None:
        """The step that was restored, if a checkpoint of it is in the store: it need not be saved again."""
        in_store = self.restore is not None and self.restore.snapshot is None
        return self.restored_step if in_store else None

    @property
    def _own_cadence(self) -> bool:
        """Skipping and coalescing must be decided for all ranks at once, so there the coordinator proposes."""
        return self.config.save_steps is not None and self.config.overlap == "wait"

    def _arrive_accepted(self, step: int, trigger: Trigger | None) -> Due | None:
        stop = None
        for proposal in list(self._accepted.values()):
            kept = proposal.step in self.snapshots or (proposal.state == "decided" and proposal.id in self._met)
            if proposal.step < step and not kept:
                # The loop's stride jumped over the step: the promise cannot be kept, so take it back.
                del self._accepted[proposal.id]
                self._refused.add(proposal.id)
                self._jumped = True
            elif proposal.step == step:
                self._met[proposal.id] = None
                if proposal.error is None and trigger in (None, "memory") and step not in self.snapshots:
                    trigger = "proposal"
                if proposal.kind == "stop":
                    stop = proposal
        for proposal_id in list(self._met)[:-_MET_KEPT]:
            del self._met[proposal_id]
        return None if trigger is None and stop is None else Due(step, trigger, stop)

    def stop_state(self, proposal: Proposal) -> str:
        """One of open, decided, dropped: as far as this worker knows."""
        held = self._accepted.get(proposal.id)
        return "dropped" if held is None else held.state

    def snapshotted(self, step: int, trigger: Trigger) -> None:
        """The snapshot of ``step`` is sealed."""
        self.snapshots[step] = trigger
        self._waiting_step = self._due_step = None

    def skip(self, step: int, reason: str) -> None:
        """No snapshot of ``step`` could be taken: the save fails for the whole job."""
        self._skipped[step] = reason
        self._waiting_step = self._due_step = None

    def is_off(self, step: int, trigger: Trigger) -> bool:
        """Whether the snapshot that is due need not be taken any more: its save has ended, or what it was agreed on
        for was dropped. Of that no save is known where no rank has taken its snapshot yet.
        """
        agreed = any(p.step == step for p in self._accepted.values())
        return step in self.outcomes or (trigger == "proposal" and not agreed)

    def go_on(self) -> None:
        """`step()` is held no longer, and the snapshot that was due is not taken."""
        self._waiting_step = self._due_step = None

    def set_layout(self, layout: Layout) -> None:
        """The structure of the state, new or changed."""
        self._layout = layout

    def await_plan(self, step: int) -> None:
        """`step()` is held for the plan of the present layout."""
        self._waiting_step = step

    @property
    def plan_ready(self) -> RankPlan | None:
        """The plan for the present layout, None while it is still to come."""
        fits = self._layout is not None and self._layout.fingerprint == self.plan_fingerprint
        return self.plan if fits else None

    def wish(self, wish: RestoreWish) -> None:
        """What this worker wants to start from; the same on all ranks."""
        self._wish = wish

    @property
    def has_wish(self) -> bool:
        """Whether the start of this worker has been settled by `restore()` or a first `step()`."""
        return self._wish is not None

    def restore_read(self, result: RestoreResult) -> None:
        """How reading the decided checkpoint went."""
        self._result = result

    def request(self, request_id: str, reason: str) -> None:
        """Ask for a save soon, from any thread."""
        self._requests[request_id] = reason

    def request_stop(self, reason: str, *, preempted: bool = False) -> None:
        """Ask that all workers stop at one agreed step; ``preempted``: since this process is about to be ended."""
        known = self._stop_request
        if known is None or reason == known.reason:
            self._stop_request = StopWish(reason, preempted)
        else:
            self._stop_request = StopWish(f"{known.reason}; {reason}", known.preempted or preempted)

    def finish(self, *, closed: bool = False) -> None:
        """No step will follow; open proposals beyond the last step are refused. ``closed``: all is saved."""
        self.finished = True
        self.closed = self.closed or closed
        for proposal in [p for p in self._accepted.values() if p.step > self.step and p.state == "open"]:
            del self._accepted[proposal.id]
            self._refused.add(proposal.id)

    @property
    def undecided(self) -> list[int]:
        """Snapshotted or skipped steps whose save is neither committed nor failed yet."""
        return sorted(s for s in {*self.snapshots, *self._skipped} if s not in self.outcomes)

    # -- the background thread -------------------------------------------------------------------

    def on_view(self, epoch: int, version: int, view: WorkerView) -> None:
        """Take in what the coordinator has decided; older views are dropped."""
        if (epoch, version) < self._seen:
            return
        self._seen = (epoch, version)
        self._roll_call = view.roll_call
        self.refused = self.refused or view.refused
        self.error = view.error
        self.late = view.late
        self.loose = frozenset(view.loose)
        self._acknowledged = view.fingerprint
        if not self.restore_done:
            self._on_start(view)
        if view.plan is not None:
            self.plan, self.plan_fingerprint = view.plan, view.plan_fingerprint
        for outcome in view.outcomes:
            if outcome.generation == self.generation:
                self._settled(outcome)
        for request_id, outcome in view.requests:
            if self._requests.pop(request_id, None) is not None:
                self.request_outcomes[request_id] = outcome
        self._on_proposals(view.proposals)

    def _on_start(self, view: WorkerView) -> None:
        self.generation = view.generation
        if view.restore is not None and (self.restore is None or view.restore.key > self.restore.key):
            self.restore = view.restore
            self._result = None
        if view.restore_done and self.restore is not None:
            self.restore_done = True
            self.restored_step = self.restore.step

    def _settled(self, outcome: SaveOutcome) -> None:
        self.outcomes[outcome.step] = outcome
        self._skipped.pop(outcome.step, None)
        for step in sorted(self.outcomes)[:-_OUTCOMES_KEPT]:
            del self.outcomes[step]
            self.snapshots.pop(step, None)

    def _on_proposals(self, proposals: tuple[Proposal, ...]) -> None:
        offered = {p.id: p for p in proposals}
        for proposal in proposals:
            held = self._accepted.get(proposal.id)
            if proposal.state == "dropped":
                self._accepted.pop(proposal.id, None)
            elif held is not None:
                self._accepted[proposal.id] = replace(held, state=proposal.state)
            elif proposal.state == "open" and proposal.id not in self._refused:
                self._vote(proposal)
            elif proposal.state == "decided" and proposal.id not in self._met:
                # Taken back or dropped before: a coordinator that was restarted may know it from other ranks only.
                self._refused.add(proposal.id)
        self._refused &= {p.id for p in offered.values() if p.state != "dropped"}
        for held in list(self._accepted.values()):
            if held.state == "decided" and held.step <= self.step and held.id not in offered:
                del self._accepted[held.id]

    def _vote(self, proposal: Proposal) -> None:
        if proposal.step > max(self.step, self.bound) and not self.finished:
            self._accepted[proposal.id] = proposal
            self._promised = max(self._promised, proposal.step)
        else:
            self._refused.add(proposal.id)

    def report(self) -> WorkerReport:
        """This worker's whole state, numbered so that older reports can be told."""
        self._sequence += 1
        layout = self._layout
        fingerprint = layout.fingerprint if layout else None
        return WorkerReport(
            worker=self.worker,
            sequence=self._sequence,
            rank=self.rank,
            config=self.config,
            generation=self.generation,
            started=self.restore_done,
            roll_call=self._roll_call,
            restore=self._wish,
            restored=self._result,
            fingerprint=fingerprint,
            layout=None if fingerprint == self._acknowledged else layout,
            plan_id=self.plan.plan_id if self.plan else None,
            step=self.step,
            bound=self.bound,
            # A loop that tells a bound reports few of its steps, so the gaps between them say nothing: but for those
            # that were told run by run, once the stride that it tells has proved wrong.
            stride=self._stride if self.bound < 0 else self._run_length or self._bound_stride,
            waiting_step=self._waiting_step,
            due_step=self._due_step,
            accepted=tuple(self._accepted.values()),
            refused=tuple(sorted(self._refused)),
            requests=tuple(self._requests.items()),
            stop_request=self._stop_request,
            skipped=tuple(self._skipped.items()),
            pending=tuple(self.undecided),
            finished=self.finished,
            closed=self.closed,
        )
