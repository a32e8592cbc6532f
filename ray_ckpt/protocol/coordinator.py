"""The coordinator as a pure machine: reports, ticks and I/O results in; actions and views out.

It derives everything anew from what is known (`derive`), so the order in which messages arrive does not matter, and a
restarted coordinator needs nothing but the log and the next reports. Deriving costs in proportion to the workers:
whoever drives this may take many reports in before it derives once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_ckpt.protocol.cut import Cut
from ray_ckpt.protocol.flows import Flows, Io
from ray_ckpt.protocol.generation import Generations
from ray_ckpt.protocol.keeper import Keeper
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import HostReport, HostView, Leaving, Nodes, RunStatus, SaveStatus
from ray_ckpt.protocol.pace import is_host_news
from ray_ckpt.protocol.planner import Planner, replica_mismatch
from ray_ckpt.protocol.recall import Recall
from ray_ckpt.protocol.roster import Roster, Save
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.protocol.saves import Saves
from ray_ckpt.protocol.views import Views
from ray_ckpt.types import LogRecord

_LOOK_S = 60.0
_FORGET_S = 300.0
"""A host that was silent for so long does not keep its run's coordinator alive, and is not counted any more unless a
rank of the present start was there.
"""


class CoordinatorLogic:
    """One epoch of the global save coordinator. Not thread safe."""

    def __init__(self, url: str, owner: str) -> None:
        self.url = url
        self.flows = Flows()
        self.ledger = Ledger(self.flows, owner)
        self.roster = Roster()
        self.saves = Saves(self.flows, self.ledger, self.roster)
        self.recall = Recall(self.ledger, self.roster)
        self.generations = Generations(self.flows, self.ledger, self.roster, self.saves, self.recall)
        self.planner = Planner()
        self.cut = Cut(self.ledger, self.saves)
        self.keeper = Keeper(self.flows, self.ledger)
        self.views = Views(self.ledger, self.roster, self.saves, self.generations, self.planner, self.cut, self.recall)
        self.failures_in_a_row = 0
        self.last_error = ""
        self.derivations = 0
        self._leaving: Mapping[str, Leaving] = {}
        self._heeded: set[tuple[str, bool]] = set()
        self._generation_seen: int | None = None
        self._looked_for_gone = 0.0
        self._forgotten: list[str] = []
        self.cut.stepped = lambda: self.roster.stepped
        self.saves.worker_of = lambda rank: self.generations.members.get(rank)
        self.saves.decided_proposal = self.cut.decided
        self.saves.dropped_at = self.cut.dropped_at
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
        self.take_in(report, now)
        self.derive(now)

    def take_in(self, report: HostReport, now: float) -> bool:
        """Note what a host has reported. Whether something may follow from it: then `derive` is to be called soon."""
        self.ledger.now = max(self.ledger.now, now)
        if self.ledger.active and report.epoch > self.ledger.epoch:
            # The host drops our views already; without an append of our own we would never find out.
            self.ledger.fence()
        known = self.roster.report(report.host)
        if not self.roster.update(report, self.ledger.now):
            return False
        for layout in report.layouts:
            self.planner.layouts[layout.fingerprint] = layout
        news = is_host_news(report, known, steps=self.views.is_watched(report.host))
        if news:
            self.views.touch(report.host)
        return news

    def on_tick(self, now: float) -> None:
        """Time has passed."""
        self.derive(now)

    def on_io(self, io_id: int, result: Any, now: float) -> None:
        """An action has ended with a result or an `IoFailedError`."""
        self.answered(io_id, result, now)
        self.derive(now)

    def answered(self, io_id: int, result: Any, now: float) -> None:
        """Go on with the flow whose action has ended, and those that waited for it; `derive` is to be called soon."""
        self.ledger.now = max(self.ledger.now, now)
        self.views.suspend()
        self.flows.done(io_id, result)
        self.flows.poll()

    def request_save(self, request_id: str, reason: str, now: float) -> None:
        """The driver or the command line asks for a save soon."""
        self.ledger.now = max(self.ledger.now, now)
        if request_id not in self.cut.request_outcomes:
            self.cut.requests.setdefault(request_id, reason)
        self.derive(now)

    def request_stop(self, reason: str, now: float) -> None:
        """All workers shall save and stop at one step."""
        self.ledger.now = max(self.ledger.now, now)
        self.cut.want_stop(reason)
        self.derive(now)

    def on_leaving(self, hosts: Mapping[str, Leaving], now: float) -> bool:
        """The hosts that are about to go; replaces what was known before.

        Whether something has changed.
        """
        if hosts == self._leaving:
            return False
        self._leaving = dict(hosts)
        self.derive(now)
        return True

    def on_nodes(self, nodes: Nodes, now: float) -> bool:
        """What Ray says of its nodes; whether something has changed."""
        if not self.roster.told(nodes):
            return False
        self.derive(now)
        return True

    def take(self) -> list[tuple[int, Io]]:
        """The actions to execute now; each is answered by `on_io`. A fenced coordinator does nothing more."""
        actions = self.flows.take()
        return [] if self.ledger.phase == "fenced" else actions

    # -- deriving -----------------------------------------------------------------------------------------

    def derive(self, now: float) -> None:
        """Draw all conclusions from what is known."""
        self.ledger.now = max(self.ledger.now, now)
        self.derivations += 1
        self.flows.poll()
        if not self.ledger.active:
            return
        if self.roster.directory != self.ledger.head.directory:
            self.roster.directory = self.ledger.head.directory
            self.roster.changed += 1
        self._forget_gone()
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
            self._stop_if_leaving()
            gone = frozenset(rank for rank in reports if self.generations.is_gone(rank))
            self.cut.update(config, generation.number, generation.world_size, reports, gone)
        self.keeper.update(config, self._protected())
        self.flows.poll()
        self.views.refresh()

    def _stop_if_leaving(self) -> None:
        """One host that goes ends the present start of the job, once: all save while all are there."""
        if not self._leaving:
            return
        for rank, worker in sorted(self.generations.members.items()):
            host = self.roster.worker_hosts.get(worker, "")
            leaving, report = self._leaving.get(host), self.roster.worker(worker)
            if leaving is None or report is None or report.finished or (host, leaving.drained) in self._heeded:
                continue
            self._heeded.add((host, leaving.drained))
            text = f"the host of rank {rank}, {self.roster.host_name(worker)}, {leaving.text}"
            self.cut.want_stop(text, preempted=True)
            return

    def _forget_gone(self) -> None:
        """A run outlives many hosts, and how often each of the others may speak depends on their number."""
        if self.ledger.now < self._looked_for_gone + _LOOK_S:
            return
        self._looked_for_gone = self.ledger.now
        forming = self.generations.forming
        needed = [*self.generations.members.values(), *(forming.members.values() if forming else ())]
        self._forgotten += self.roster.forget(self.ledger.now - _FORGET_S, needed)

    def take_forgotten(self) -> list[str]:
        """Hosts that are gone for good, since this was last asked."""
        gone, self._forgotten = self._forgotten, []
        return gone

    def _begin(self, generation: int) -> None:
        self._generation_seen = generation
        # This start was placed there all the same, and so would be the next: it would be stopped for ever.
        self._heeded = {(host, False) for host, leaving in self._leaving.items() if not leaving.drained}
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
        """What concerns one host now; None while the directory is not owned, or until the next `derive`.

        A coordinator that was fenced is silent: whether a worker may go on is for its successor to say, by the
        generations in the log.
        """
        return self.views.view(host) if self.ledger.active else None

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
            steps=tuple(r.reached for _, r in sorted(self.generations.reports().items())) if head else (),
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
            memory_step=_step_of(self.recall.newest) if head else None,
            replicated_step=_step_of(self.recall.newest_doubled) if head else None,
            notes=tuple(f"{self.roster.name(host)} {found.text}" for host, found in sorted(self._leaving.items())),
        )

    @property
    def busy(self) -> bool:
        """Whether time matters: something under way has a deadline, or is about to fall due."""
        return bool(self.saves.active) or self.generations.forming is not None or self.cut.busy

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


def _step_of(save: Save | None) -> int | None:
    return save[1] if save is not None else None
