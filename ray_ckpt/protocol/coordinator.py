"""The coordinator as a pure machine: reports, ticks and I/O results in; actions and views out.

After every event it derives everything anew from what is known (`_step`), so the order in which messages arrive does
not matter, and a restarted coordinator needs nothing but the log and the next reports.
"""

from __future__ import annotations

from typing import Any

from ray_ckpt.protocol.cut import Cut
from ray_ckpt.protocol.flows import Flows, Io
from ray_ckpt.protocol.generation import Generations
from ray_ckpt.protocol.keeper import Keeper
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import (
    HostReport,
    HostView,
    RunStatus,
    SaveOutcome,
    SaveStatus,
    WorkerReport,
    WorkerView,
)
from ray_ckpt.protocol.planner import Planner, replica_mismatch
from ray_ckpt.protocol.roster import Roster
from ray_ckpt.protocol.saves import Saves, SaveState
from ray_ckpt.types import LogRecord

_FORGET_S = 300.0
"""A host that was silent for so long does not keep its run's coordinator alive."""


class CoordinatorLogic:
    """One epoch of the global save coordinator. Not thread safe."""

    def __init__(self, url: str, owner: str) -> None:
        self.url = url
        self.flows = Flows()
        self.ledger = Ledger(self.flows, owner)
        self.roster = Roster()
        self.saves = Saves(self.flows, self.ledger, self.roster)
        self.generations = Generations(self.flows, self.ledger, self.roster, self.saves)
        self.planner = Planner()
        self.cut = Cut(self.ledger, self.saves)
        self.keeper = Keeper(self.flows, self.ledger)
        self.failures_in_a_row = 0
        self.last_error = ""
        self._version = 0
        self._generation_seen: int | None = None
        self.saves.worker_of = lambda rank: self.generations.members.get(rank)
        self.saves.decided_proposal = self.cut.decided
        self.saves.described = self._described
        self.saves.check = self._check
        self.saves.on_end = self._on_end

    # -- events -------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Take the directory over."""
        self.ledger.now = now
        self.ledger.start()

    def on_report(self, report: HostReport, now: float) -> None:
        """A host has reported."""
        self.ledger.now = max(self.ledger.now, now)
        if self.ledger.active and report.epoch > self.ledger.epoch:
            # The host drops our views already; without an append of our own we would never find out.
            self.ledger.fence()
        if self.roster.update(report, self.ledger.now):
            for layout in report.layouts:
                self.planner.layouts[layout.fingerprint] = layout
        self._step()

    def on_tick(self, now: float) -> None:
        """Time has passed."""
        self.ledger.now = max(self.ledger.now, now)
        self._step()

    def on_io(self, io_id: int, result: Any, now: float) -> None:
        """An action has ended with a result or an `IoFailedError`."""
        self.ledger.now = max(self.ledger.now, now)
        self.flows.done(io_id, result)
        self._step()

    def request_save(self, request_id: str, reason: str, now: float) -> None:
        """The driver or the command line asks for a save soon."""
        self.ledger.now = max(self.ledger.now, now)
        if request_id not in self.cut.request_outcomes:
            self.cut.requests.setdefault(request_id, reason)
        self._step()

    def request_stop(self, reason: str, now: float) -> None:
        """All workers shall save and stop at one step."""
        self.ledger.now = max(self.ledger.now, now)
        self.cut.want_stop(reason)
        self._step()

    def take(self) -> list[tuple[int, Io]]:
        """The actions to execute now; each is answered by `on_io`. A fenced coordinator does nothing more."""
        actions = self.flows.take()
        return [] if self.ledger.phase == "fenced" else actions

    # -- deriving -----------------------------------------------------------------------------------------

    def _step(self) -> None:
        self.flows.poll()
        if not self.ledger.active:
            return
        self.generations.update()
        config = self.generations.config
        self.saves.update(config)
        self.flows.poll()
        generation = self.generations.current
        if generation is not None and generation.number != self._generation_seen:
            self._begin(generation.number)
        if config is not None and generation is not None:
            reports = self.generations.reports()
            self.planner.update(generation.world_size, reports, self._is_sealed)
            if self.planner.error:
                self.cut.want_stop("the state cannot be saved", self.planner.error.text)
            gone = frozenset(rank for rank in reports if self.generations.is_gone(rank))
            self.cut.update(config, generation.number, generation.world_size, reports, gone)
        self.keeper.update(config, self._protected())
        self.flows.poll()
        self._version += 1

    def _begin(self, generation: int) -> None:
        self._generation_seen = generation
        self.planner.reset()
        self.cut.reset()
        self.failures_in_a_row = 0

    def _is_sealed(self, rank: int, step: int) -> bool:
        generation = self.generations.current
        worker = self.generations.members.get(rank)
        if generation is None or worker is None:
            return False
        return self.roster.segment(worker, rank, (generation.number, step)) is not None

    def _protected(self) -> frozenset[str]:
        """What a generation that has not started is about to read."""
        decision = self.generations.decision()
        chosen = decision.checkpoint if decision and not self.generations.started else None
        return frozenset({chosen.prefix} if chosen else ())

    def _described(self, save: SaveState) -> bool:
        return all(s.fingerprint in self.planner.layouts for s in save.segments.values())

    def _check(self, save: SaveState) -> str | None:
        return replica_mismatch(save.segments)

    def _on_end(self, save: SaveState) -> None:
        if save.stage == "committed":
            self.failures_in_a_row = 0
            return
        self.keeper.on_abort(save.attempt)
        if save.quiet:
            return
        self.failures_in_a_row += 1
        self.last_error = f"save of step {save.step} failed: {save.failure}"
        config = self.generations.config
        limit = config.max_failures if config else 1
        if save.fatal or self.failures_in_a_row >= limit:
            count = f" ({self.failures_in_a_row} in a row)" if self.failures_in_a_row > 1 else ""
            self.cut.want_stop("saves fail", self.last_error + count)

    # -- views ----------------------------------------------------------------------------------------------

    def view(self, host: str) -> HostView | None:
        """What concerns one host now; None while the directory is not owned.

        A coordinator that was fenced is silent: whether a worker may go on is for its successor to say, by the
        generations in the log.
        """
        if not self.ledger.active:
            return None
        known = self.roster.hosts.get(host)
        if known is None:
            return None
        report = known.report
        generation = self.generations.current
        writing = [s for s in self.saves.active.values() if s.stage == "writing" and s.failure is None]
        return HostView(
            epoch=self.ledger.epoch,
            version=self._version,
            workers=tuple(self._worker_view(report, worker) for worker in report.workers),
            orders=tuple(save.order for save in writing),
            decided=tuple(s.save for s in report.segments if self.saves.decided(s.save)),
            oldest_generation=generation.number if generation else 0,
            fingerprints=tuple(self._fingerprints(report)),
        )

    def _fingerprints(self, report: HostReport) -> list[str]:
        named = {w.fingerprint for w in report.workers} | {s.fingerprint for s in report.segments}
        return sorted(f for f in named if f and f in self.planner.layouts)

    def _worker_view(self, report: HostReport, worker: WorkerReport) -> WorkerView:
        name = worker.worker
        if name in self.generations.refused:
            return WorkerView(name, refused=self.generations.refused[name])
        forming = self.generations.forming
        joining = forming is not None and forming.members.get(worker.rank) == name
        if forming is not None and joining:
            late = self.generations.waiting_for(forming) or self._settling_text()
            error = self.generations.errors.get(name)
            return WorkerView(name, roll_call=forming.roll_call, error=error, late=late)
        if self.generations.members.get(worker.rank) != name:
            return WorkerView(name, late="the coordinator has just heard of this worker")
        return self._member_view(report, worker)

    def _settling_text(self) -> str:
        saves = sorted(self.saves.active.values(), key=lambda s: s.step)
        return f"the save of step {saves[0].step}: {self.saves.late(saves[0])}" if saves else "the commit log"

    def _member_view(self, report: HostReport, worker: WorkerReport) -> WorkerView:
        generation = self.generations.current
        assert generation is not None
        plan = self.planner.plan
        fresh = plan is not None and worker.plan_id != plan.plan_id
        return WorkerView(
            worker=worker.worker,
            generation=generation.number,
            error=self.generations.errors.get(worker.worker) or self.planner.error,
            restore=self.generations.decision(),
            restore_done=self.generations.started,
            plan=plan.ranks[worker.rank] if plan is not None and fresh else None,
            plan_fingerprint=self.planner.fingerprints[worker.rank] if fresh else None,
            proposals=tuple(self.cut.proposals.values()),
            outcomes=self._outcomes(report, worker, generation.number),
            requests=tuple(
                (r, self.cut.request_outcomes[r]) for r, _ in worker.requests if r in self.cut.request_outcomes
            ),
            late=self._late(),
        )

    def _late(self) -> str:
        if not self.generations.started:
            return self.generations.not_restored()
        saves = sorted(self.saves.active.values(), key=lambda s: s.step)
        if saves:
            return f"step {saves[0].step}: {self.saves.late(saves[0])}"
        if self.planner.plan is None:
            reports = self.generations.reports()
            missing = [r for r in self.generations.members if r not in reports or not reports[r].fingerprint]
            return f"the structure of the state from rank {missing[:8]}" if missing else ""
        return self.ledger.trouble

    def _outcomes(self, report: HostReport, worker: WorkerReport, generation: int) -> tuple[SaveOutcome, ...]:
        """Answers to exactly what the worker has not heard of yet."""
        held = {s.step for s in report.segments if s.rank == worker.rank and s.generation == generation}
        found = []
        for step in worker.pending:
            key = (generation, step)
            outcome = self.saves.outcome(key)
            if outcome is not None:
                found.append(outcome)
            elif key not in self.saves.active and step not in held:
                found.append(self._unknown(key, worker))
        if worker.due_step is not None:
            # It may be held for a plan or memory that a save which has failed already will not need.
            outcome = self.saves.outcome((generation, worker.due_step))
            found.extend([outcome] if outcome is not None else [])
        return tuple(found)

    def _unknown(self, key: tuple[int, int], worker: WorkerReport) -> SaveOutcome:
        """The answer for a save of which neither the log nor anybody's memory has a trace."""
        reason = dict(worker.skipped).get(key[1])
        if reason is None and self.saves.decided(key):
            text = "a later save is committed, and whether this one was is forgotten: it is not kept in any case"
            return SaveOutcome(*key, "failed", error=text, quiet=True)
        return SaveOutcome(*key, "failed", error=reason or "its snapshot is gone, and no coordinator has heard of it")

    def status(self) -> RunStatus:
        """What is going on, for people."""
        starting = self.ledger.phase == "starting"
        head: LogRecord | None = None if starting else self.ledger.head
        generation = head.generation if head else None
        forming = self.generations.forming
        return RunStatus(
            url=self.url,
            phase=self.ledger.phase,
            epoch=self.ledger.epoch,
            generation=generation.number if generation else None,
            world_size=generation.world_size if generation else 0,
            steps=tuple(r.step for _, r in sorted(self.generations.reports().items())) if head else (),
            saves=tuple(
                SaveStatus(
                    *s.key,
                    s.stage,
                    s.attempt,
                    len(s.segments),
                    len(s.shards),
                    s.num_writers,
                    self.saves.late(s),
                )
                for s in self.saves.active.values()
            ),
            checkpoints=head.live if head else (),
            failures_in_a_row=self.failures_in_a_row,
            last_error=self.last_error,
            waiting=self.generations.waiting_for(forming) if forming else self.ledger.trouble,
        )

    @property
    def idle(self) -> bool:
        """No worker that goes on, no save, no deletion: the coordinator may end."""
        if not self.ledger.active:
            return self.ledger.phase == "fenced"
        forgotten = self.ledger.now - _FORGET_S
        going_on = any(
            not w.finished
            and w.worker not in self.generations.refused
            and not self.roster.dead(w.worker)
            and not self.roster.silent(w.worker, forgotten)
            for _, w in self.roster.workers()
        )
        return not going_on and not self.saves.active and self.keeper.idle and self.flows.idle
