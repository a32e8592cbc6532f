"""At which step do all workers save (or stop), when no cadence of their own tells them?

The coordinator proposes a step a margin ahead of the fastest worker. Every rank accepts only if its loop has not
reached the step; once all have accepted, it is decided. A refusal drops the proposal and doubles the margin, which
goes back to what was needed once one was accepted. A rank whose stride has jumped over a decided step refuses it
too: then it is dropped, and what it was for proposed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ray_ckpt.policy import align, crosses, first_crossing
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import JobConfig, Proposal, SaveOutcome, StopWish, WorkerReport
from ray_ckpt.protocol.pace import WATCHED_S
from ray_ckpt.protocol.saves import Saves

_MARGIN_MAX = 1 << 20
_MARGIN_SMALL = 8
"""Steps that are not worth a refusal."""

_OPEN_MAX_S = 60.0
_KEPT = 16
_AHEAD_S = 2 * WATCHED_S
"""So long before a save by time is due, the loops' steps are watched."""

Reports = dict[int, WorkerReport]


class Cut:
    """Proposals of the present generation and the wishes they come from.

    ``stepped`` says when a worker's own word last came in.
    """

    def __init__(self, ledger: Ledger, saves: Saves) -> None:
        self._ledger = ledger
        self._saves = saves
        self.requests: dict[str, str] = {}
        self.request_outcomes: dict[str, SaveOutcome] = {}
        self.stepped: Callable[[], float] = lambda: self._ledger.now
        self.reset()

    def reset(self) -> None:
        """A new generation starts: nothing proposed to an older one counts."""
        self.proposals: dict[str, Proposal] = {}
        self.stop: Proposal | None = None
        self._margin = 1
        self._entered: dict[str, float] = {}
        self._asked_at: dict[str, int] = {}
        self._request_steps: dict[str, int] = {}
        self._armed_step = -1
        self._timer: float | None = None
        self._count = 0
        self._wishes: set[tuple[str, StopWish]] = set()
        self._ignored: set[str] = set()
        self._since: float | None = None
        self._watching_since: float | None = None

    def want_stop(self, reason: str, error: str | None = None, *, preempted: bool = False) -> None:
        """All workers shall stop at one step; with ``error`` they raise it instead of saving.

        ``preempted``: a host is about to go.
        """
        known = self.stop
        if known is None or (error is not None and known.error is None):
            self.stop = Proposal("", -1, "stop", reason=reason, error=error, preempted=preempted)
        elif preempted and not known.preempted and known.error is None:
            self.stop = replace(known, reason=f"{known.reason}; {reason}", preempted=True)

    def decided(self, step: int) -> bool:
        """Whether all ranks have agreed to save at this step."""
        return any(p.step == step and p.state == "decided" for p in self.proposals.values())

    def dropped_at(self, step: int) -> float | None:
        """Since when no proposal of this step stands (seconds); None while one does, and if none is known."""
        proposals = [p for p in self.proposals.values() if p.step == step]
        if any(p.state != "dropped" for p in proposals):
            return None
        return max((self._entered[p.id] for p in proposals), default=None)

    # -- events -----------------------------------------------------------------------------------------

    def update(
        self, config: JobConfig, generation: int, world_size: int, reports: Reports, gone: frozenset[int]
    ) -> None:
        """Take in the members' newest reports after an event; ``gone`` are ranks that have died or left.

        A save, and a stop with one, needs every rank; a stop with an error is for those that still step.
        """
        self._take_requests(reports)
        self._adopt(reports)
        for proposal in [p for p in self.proposals.values() if p.state == "open"]:
            self._tally(proposal, world_size, reports, gone if proposal.error is not None else frozenset())
        self._drop_jumped(reports, gone)
        self._end_ignored_stop(world_size, reports)
        self._answer_requests(generation, reports, self._is_over(config, world_size, reports))
        stepping = {rank: r for rank, r in reports.items() if rank not in gone}
        complete = len(reports) == world_size and all(r.started for r in reports.values())
        failing = self.stop is not None and self.stop.error is not None
        able = complete and bool(stepping) and (not gone or failing)
        if able and self._is_fresh:
            self._propose(config, stepping)
        if not (able and self._is_wanted(config)):
            self._watching_since = None
        elif self._watching_since is None:
            self._watching_since = self._ledger.now

    @property
    def watching(self) -> bool:
        """Whether a proposal is near, so that the steps which the loops have reached are to be told at once."""
        return self._watching_since is not None

    @property
    def busy(self) -> bool:
        """Whether a proposal is near or open."""
        return self.watching or any(p.state == "open" for p in self.proposals.values())

    @property
    def _is_fresh(self) -> bool:
        """Whether the steps known are the loops' present ones, or nobody tells newer ones for a while."""
        now = self._ledger.now
        waited = self._watching_since is not None and now >= self._watching_since + WATCHED_S
        return waited or now <= self.stepped() + WATCHED_S

    def _is_wanted(self, config: JobConfig) -> bool:
        """Whether the next proposal is due, or soon will be."""
        if self._stopping:
            return False
        if config.save_steps is not None and config.overlap != "wait":
            return True
        if any(p.state == "open" for p in self.proposals.values()):
            return False
        if self.stop is not None or any(r not in self._request_steps for r in self.requests):
            return True
        timed = config.save_secs is not None and self._timer is not None
        return timed and self._ledger.now >= (self._timer or 0.0) + (config.save_secs or 0.0) - _AHEAD_S

    def _take_requests(self, reports: Reports) -> None:
        for report in reports.values():
            for request_id, reason in report.requests:
                if request_id not in self.request_outcomes:
                    self.requests.setdefault(request_id, reason)
            wish = report.stop_request
            if wish is not None and (report.worker, wish) not in self._wishes:
                self._wishes.add((report.worker, wish))
                self.want_stop(wish.reason, preempted=wish.preempted)

    def _adopt(self, reports: Reports) -> None:
        """Workers remember what a coordinator before this one proposed; of our own, all unknown were dropped."""
        mine = f"p{self._ledger.epoch:06d}-"
        for report in reports.values():
            for held in report.accepted:
                if held.id not in self.proposals:
                    state = "dropped" if held.id.startswith(mine) else held.state
                    self.proposals[held.id] = replace(held, state=state)
                    self._entered[held.id] = self._ledger.now
                elif held.state == "decided" and self.proposals[held.id].state == "open":
                    self._decide(self.proposals[held.id])

    def _tally(self, proposal: Proposal, world_size: int, reports: Reports, gone: frozenset[int]) -> None:
        asked = [r for rank, r in reports.items() if rank not in gone]
        accepted = sum(any(p.id == proposal.id for p in r.accepted) for r in asked)
        late = [r for r in asked if proposal.id in r.refused]
        if late:
            behind = max(r.reached for r in late) - proposal.step
            stride = max(r.stride for r in late)
            missed = max(behind, 0) // max(stride, 1) + 1
            self._margin = min(2 * max(self._margin, missed), _MARGIN_MAX)
            self._drop(proposal)
        elif asked and accepted >= world_size - len(gone):
            self._decide(proposal)
            self._shrink_margin(proposal, asked)
        elif self._ledger.now > self._entered[proposal.id] + _OPEN_MAX_S:
            self._drop(proposal)

    def _drop_jumped(self, reports: Reports, gone: frozenset[int]) -> None:
        """Drop what was decided and a rank has gone past all the same: its loop did not come to that step."""
        refused = {i for r in reports.values() for i in r.refused}
        stepping = {i for rank, r in reports.items() if rank not in gone for i in r.refused}
        for proposal in list(self.proposals.values()):
            refusals = refused if proposal.error is None else stepping
            if proposal.state == "decided" and proposal.id in refusals:
                # What was to be saved by time is due at once.
                self._timer = float("-inf")
                self._drop(proposal)

    def _end_ignored_stop(self, world_size: int, reports: Reports) -> None:
        """A loop need not stop where it is told to: if all have gone on, saves are made as before."""
        for proposal in self._stops:
            gone_on = len(reports) == world_size and all(r.step > proposal.step for r in reports.values())
            if gone_on and proposal.error is None:
                self._ignored.add(proposal.id)
                if self.stop is not None and self.stop.reason == proposal.reason:
                    self.stop = None

    def _drop(self, proposal: Proposal) -> None:
        self.proposals[proposal.id] = replace(proposal, state="dropped")
        self._entered[proposal.id] = self._ledger.now
        for request_id in [r for r, step in self._request_steps.items() if step == proposal.step]:
            del self._request_steps[request_id]
        if self._armed_step == proposal.step:
            self._armed_step = -1
        self._forget_old()

    def _decide(self, proposal: Proposal) -> None:
        self.proposals[proposal.id] = replace(proposal, state="decided")
        self._timer = self._ledger.now
        self._forget_old()

    def _shrink_margin(self, proposal: Proposal, asked: Iterable[WorkerReport]) -> None:
        """After one hitch of seconds the margin would let saves wait for as long for many saves to come."""
        reached, stride = max(r.reached for r in asked), max(r.stride for r in asked)
        needed = (reached - self._asked_at.get(proposal.id, reached)) // max(stride, 1) + 1
        self._margin = max(min(self._margin - self._margin // 8, max(2 * needed, _MARGIN_SMALL)), 1)

    def _forget_old(self) -> None:
        closed = [p.id for p in self.proposals.values() if p.state != "open"]
        for proposal_id in closed[:-_KEPT]:
            del self.proposals[proposal_id]
            self._entered.pop(proposal_id, None)
            self._asked_at.pop(proposal_id, None)

    def _is_over(self, config: JobConfig, world_size: int, reports: Reports) -> bool:
        """Whether no rank will take a further step. Those that nobody has heard of have left before this coordinator
        started.
        """
        self._since = self._ledger.now if self._since is None else self._since
        heard = len(reports) == world_size or self._ledger.now > self._since + config.host_timeout_s
        return heard and bool(reports) and all(r.finished for r in reports.values())

    def _answer_requests(self, generation: int, reports: Reports, over: bool) -> None:
        for request_id in list(self.requests):
            step = self._request_steps.get(request_id)
            outcome = self._saves.outcome((generation, step)) if step is not None else None
            if outcome is None and over:
                outcome = self._last_outcome(generation, max((r.step for r in reports.values()), default=-1))
            if outcome is not None:
                self.request_outcomes[request_id] = outcome
                del self.requests[request_id]
                self._request_steps.pop(request_id, None)
        for request_id in list(self.request_outcomes)[:-256]:
            del self.request_outcomes[request_id]

    def _last_outcome(self, generation: int, last: int) -> SaveOutcome | None:
        """What a request comes to that no further step will serve: the save of the last one."""
        key = generation, last
        if key in self._saves.active or self._saves.outcome(key) is not None:
            return self._saves.outcome(key)
        kept = [c for c in self._ledger.head.live if c.step == last and not c.superseded]
        if kept:
            return SaveOutcome(*key, "committed", kept[-1].prefix)
        return SaveOutcome(*key, "failed", error=f"training ended at step {last}, before all workers could save")

    # -- proposing ----------------------------------------------------------------------------------------

    def _propose(self, config: JobConfig, reports: Reports) -> None:
        if any(p.state == "open" for p in self.proposals.values()) or self._stopping:
            return
        if self._timer is None:
            self._timer = self._ledger.now
        seen = max(self._restored_step, *(r.reached for r in reports.values()))
        stride = max([config.stride, *(r.stride for r in reports.values())])
        earliest = seen + self._margin * stride
        # A bound need not be a step that the loop will report; where it has reported one, the stride counts from there.
        told = max(r.step for r in reports.values())
        origin = told if told >= 0 else seen
        if self.stop is not None:
            self._open(replace(self.stop, step=align(earliest, origin, stride)), seen)
            return
        if len(self._saves.active) >= config.slots:
            return
        step = self._wanted_step(config, seen, origin, earliest, stride)
        if step is not None:
            self._open(Proposal("", step, reason=self._reason(config)), seen)

    @property
    def _restored_step(self) -> int:
        """Where the loops begin: of those that have not told a step yet no more is known."""
        generation = self._ledger.head.generation
        return -1 if generation is None or generation.restored_step is None else generation.restored_step

    @property
    def _stopping(self) -> bool:
        return bool(self._stops)

    @property
    def _stops(self) -> list[Proposal]:
        """The stops that all ranks have agreed on."""
        stops = (p for p in self.proposals.values() if p.kind == "stop" and p.state == "decided")
        return [p for p in stops if p.id not in self._ignored]

    def _wanted_step(self, config: JobConfig, seen: int, origin: int, earliest: int, stride: int) -> int | None:
        """The next step to save at, None while nothing is wanted."""
        assert self._timer is not None
        open_requests = [r for r in self.requests if r not in self._request_steps]
        timed = config.save_secs is not None and self._ledger.now >= self._timer + config.save_secs
        if open_requests or (timed and seen >= 0):
            return align(earliest, origin, stride)
        if config.save_steps is None or config.overlap == "wait" or self._armed_step > seen:
            return None
        last = max([0, self._armed_step, *self._saves.decided_steps])
        if config.overlap == "coalesce" and crosses(last, seen, config.save_steps):
            self._armed_step = align(earliest, origin, stride)
        else:
            self._armed_step = first_crossing(origin, earliest, config.save_steps, stride)
        return self._armed_step

    def _reason(self, config: JobConfig) -> str:
        if self.requests:
            return "; ".join(dict.fromkeys(self.requests.values()))
        return f"every {config.save_secs} s" if config.save_secs else f"every {config.save_steps} steps"

    def _open(self, proposal: Proposal, seen: int) -> None:
        self._count += 1
        proposal = replace(proposal, id=f"p{self._ledger.epoch:06d}-{self._count:06d}")
        self.proposals[proposal.id] = proposal
        self._entered[proposal.id] = self._ledger.now
        self._asked_at[proposal.id] = seen
        if proposal.kind == "save":
            for request_id in self.requests:
                self._request_steps.setdefault(request_id, proposal.step)
