"""What each host is told: a view of what concerns it, made anew when something may have changed for it.

Most events concern one host or none; `take_changed` says whose view is worth making, so that thousands of open
questions are not gone through at each. A view is made only of what all conclusions are drawn from: a worker that was
heard of a moment ago may be a member, and a proposal that it holds may be one to keep.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from typing import Any

from ray_ckpt.protocol.cut import Cut
from ray_ckpt.protocol.generation import Forming, Generations
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import HostReport, HostView, SaveOutcome, WorkerReport, WorkerView
from ray_ckpt.protocol.pace import WATCHED_S, poll_s
from ray_ckpt.protocol.planner import Planner
from ray_ckpt.protocol.recall import Recall, peers
from ray_ckpt.protocol.roster import Roster
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.protocol.saves import Saves

_HOST_TIMEOUT_S = 30.0
"""Where no job has said anything yet."""


_common_part = attrgetter("epoch", "oldest_generation", "fingerprints", "poll_s", "watched", "peer")
_worker_part = attrgetter(
    "worker", "roll_call", "generation", "refused", "error", "restore", "restore_done", "fingerprint", "proposals"
)


def adds_to(view: HostView, known: HostView) -> bool:
    """Whether a view is worth an answer at once to a host that has ``known``.

    What it only says no more is not, nor whom people would wait for, nor what need not be sent again.
    """
    if _common_part(view) != _common_part(known) or not set(view.decided) <= set(known.decided):
        return True
    ended = view.kept_from[0] > view.oldest_generation
    if (view.peer or ended) and view.kept_from != known.kept_from:
        # The next snapshots wait for the memory; and of a job that has ended well nobody may be there to tell it later.
        return True
    orders = {(order.attempt, order.replicas) for order in known.orders}
    if any((order.attempt, order.replicas) not in orders for order in view.orders):
        return True
    workers = {worker.worker: worker for worker in known.workers}
    return any(_worker_adds(worker, workers.get(worker.worker)) for worker in view.workers)


def _worker_adds(view: WorkerView, known: WorkerView | None) -> bool:
    if known is None or _worker_part(view) != _worker_part(known):
        return True
    if view.plan is not None and view.plan != known.plan:
        return True
    return not (set(view.outcomes) <= set(known.outcomes) and set(view.requests) <= set(known.requests))


class Views:
    """Reads the coordinator's parts; `refresh` after they have changed, `touch` for a host that has reported."""

    def __init__(
        self,
        ledger: Ledger,
        roster: Roster,
        saves: Saves,
        generations: Generations,
        planner: Planner,
        cut: Cut,
        recall: Recall,
    ) -> None:
        self._ledger = ledger
        self._roster = roster
        self._saves = saves
        self._generations = generations
        self._planner = planner
        self._cut = cut
        self._recall = recall
        self._peers: dict[str, str] = {}
        self._over = False
        self._kept_from = (0, 0)
        self._version = 0
        self._touched: set[str] = set()
        self._fresh: set[str] = set()
        self._stale = False
        self._awaited: frozenset[str] = frozenset()
        self._common: tuple[Any, ...] = ()
        self._poll_s = 1.0
        self._late_text: str | None = None
        self._start_text: str | None = None

    def touch(self, host: str) -> None:
        """This host's report is another one: no view is made of it before conclusions are drawn from it."""
        self._touched.add(host)
        self._fresh.add(host)

    def suspend(self) -> None:
        """Something has changed of which no conclusions are drawn yet: no view is made until then."""
        self._stale = True

    def refresh(self) -> None:
        """All conclusions are drawn."""
        self._late_text = self._start_text = None
        self._fresh.clear()
        self._stale = False
        awaited = self._find_awaited()
        self._touched |= awaited ^ self._awaited
        self._awaited = awaited
        forming = self._generations.forming
        config = self._generations.config or (forming.config if forming else None)
        timeout_s = config.host_timeout_s if config else _HOST_TIMEOUT_S
        # While somebody waits, whom for is to be told without news: it goes with the answer that says nothing else.
        waited_for = forming is not None or bool(self._saves.active)
        self._poll_s = poll_s(len(self._roster.hosts), timeout_s, watched=self._cut.watching or waited_for)
        self._peers = self._find_peers()
        self._over = forming is None and self._generations.closed
        self._kept_from = self._find_kept_from()
        common = self._find_common(forming)
        if common != self._common:
            self._common = common
            self._touched.update(self._roster.hosts)

    def take_changed(self) -> Collection[str]:
        """The hosts whose view may be another one than when this was last asked."""
        touched, self._touched = self._touched, set()
        return touched

    def is_watched(self, host: str) -> bool:
        """Whether the steps of this host's workers are waited for."""
        return self._cut.watching or host in self._awaited

    def _find_awaited(self) -> frozenset[str]:
        """Hosts of ranks whose snapshot is late: they may have gone past its step."""
        late = self._ledger.now - WATCHED_S
        members, hosts = self._generations.members, self._roster.worker_hosts
        return frozenset(
            hosts[members[rank]]
            for save in self._saves.active.values()
            if not save.sealed and save.opened < late
            for rank in range(save.world_size)
            if rank not in save.segments and members.get(rank) in hosts
        )

    def _find_peers(self) -> dict[str, str]:
        """Which host copies which one's snapshots."""
        config = self._generations.config
        if config is None or not config.replicas or not self._generations.started or not self._all_known:
            return {}
        domains = dict(self._roster.nodes.domains)
        hosts = {self._roster.worker_hosts.get(worker, "") for worker in self._generations.members.values()}
        return peers({host: domains.get(host, host) for host in hosts if host and not self._roster.lost(host)})

    @property
    def _all_known(self) -> bool:
        """Whether this coordinator has heard of every member; where the others are nobody knows."""
        current = self._generations.current
        return current is not None and len(self._generations.members) == current.world_size

    def _find_kept_from(self) -> tuple[int, int]:
        """The oldest snapshot that a restart may still need. While one is under way: all; after a clean end: none."""
        current = self._generations.current
        if self._over and current is not None:
            return (current.number + 1, 0)
        if self._generations.forming is not None or not self._generations.started or not self._all_known:
            return (0, 0)
        # With copies, the newest that any host may be lost of: the next one's are still being made.
        kept = self._recall.newest_settled if self._peers else self._recall.kept_from
        return kept or (0, 0)

    def _find_common(self, forming: Forming | None) -> tuple[Any, ...]:
        """All that views are made of beside the host's own report, as far as it is worth an answer at once."""
        generations, saves, cut = self._generations, self._saves, self._cut
        return (
            self._ledger.epoch,
            self._ledger.head.sequence,
            (forming.roll_call, len(forming.members) >= forming.config.world_size) if forming else None,
            (len(generations.refused), generations.started, frozenset(generations.errors.items())),
            (self._planner.plan.plan_id if self._planner.plan else None, self._planner.error),
            tuple(cut.proposals.values()),
            tuple(cut.request_outcomes)[-1:],
            (tuple(saves.active), tuple(save.order for save in self._writing), tuple(saves.outcomes)[-1:]),
            (tuple(tuple(save.taken_over.items()) for save in self._writing), tuple(self._peers.items())),
            self._kept_from if self._peers else None,
            (self._poll_s, cut.watching, self._over),
        )

    @property
    def _writing(self) -> list[SaveState]:
        return [s for s in self._saves.active.values() if s.stage == "writing" and s.failure is None]

    # -- one host's view ---------------------------------------------------------------------------------

    def view(self, host: str) -> HostView | None:
        """What concerns one host now; None for one of which nothing is known, or something that is not digested yet."""
        report = self._roster.report(host)
        if report is None or self._stale or host in self._fresh:
            return None
        generation = self._generations.current
        self._version += 1
        return HostView(
            epoch=self._ledger.epoch,
            version=self._version,
            workers=tuple(self._worker_view(report, worker) for worker in report.workers),
            orders=tuple(save.order_for(report) for save in self._writing),
            decided=tuple(s.save for s in report.segments if self._saves.decided(s.save)),
            oldest_generation=generation.number if generation else 0,
            fingerprints=tuple(self._fingerprints(report)),
            poll_s=self._poll_s,
            watched=self.is_watched(host),
            kept_from=self._kept_from,
            peer=self._peers.get(host, ""),
            directory=self._ledger.head.directory,
        )

    def _fingerprints(self, report: HostReport) -> list[str]:
        named = {w.fingerprint for w in report.workers} | {s.fingerprint for s in report.segments}
        return sorted(f for f in named if f and f in self._planner.layouts)

    def _worker_view(self, report: HostReport, worker: WorkerReport) -> WorkerView:
        name = worker.worker
        if name in self._generations.refused:
            return WorkerView(name, refused=self._generations.refused[name])
        forming = self._generations.forming
        joining = forming is not None and forming.members.get(worker.rank) == name
        if forming is not None and joining:
            error = self._generations.errors.get(name)
            # Before the last rank has joined, an answer to the roll call would have to be given again.
            roll_call = forming.roll_call if len(forming.members) >= forming.config.world_size else -1
            return WorkerView(name, roll_call=roll_call, error=error, late=self._late_start(forming))
        if self._generations.members.get(worker.rank) != name:
            return WorkerView(name, late="the coordinator has just heard of this worker")
        return self._member_view(report, worker)

    def _late_start(self, forming: Forming) -> str:
        if self._start_text is None:
            self._start_text = self._generations.waiting_for(forming) or self._settling_text()
        return self._start_text

    def _settling_text(self) -> str:
        saves = sorted(self._saves.active.values(), key=lambda s: s.step)
        return f"the save of step {saves[0].step}: {self._saves.late(saves[0])}" if saves else "the commit log"

    def _member_view(self, report: HostReport, worker: WorkerReport) -> WorkerView:
        generation = self._generations.current
        assert generation is not None
        plan = self._planner.plan
        fresh = plan is not None and worker.plan_id != plan.plan_id
        return WorkerView(
            worker=worker.worker,
            generation=generation.number,
            error=self._generations.errors.get(worker.worker) or self._planner.error,
            restore=self._generations.decision(),
            restore_done=self._generations.started,
            plan=plan.ranks[worker.rank] if plan is not None and fresh else None,
            plan_fingerprint=self._planner.fingerprints[worker.rank] if fresh else None,
            proposals=tuple(self._cut.proposals.values()),
            outcomes=self._outcomes(report, worker, generation.number),
            requests=tuple(
                (r, self._cut.request_outcomes[r]) for r, _ in worker.requests if r in self._cut.request_outcomes
            ),
            late=self._late,
        )

    @property
    def _late(self) -> str:
        """Whom all wait for: the same for all workers, and found in thousands of reports, so it is found once."""
        if self._late_text is None:
            self._late_text = self._find_late()
        return self._late_text

    def _find_late(self) -> str:
        if not self._generations.started:
            return self._generations.not_restored()
        saves = sorted(self._saves.active.values(), key=lambda s: s.step)
        if saves:
            return f"step {saves[0].step}: {self._saves.late(saves[0])}"
        if self._planner.plan is None:
            reports = self._generations.reports()
            missing = [r for r in self._generations.members if r not in reports or not reports[r].fingerprint]
            return f"the structure of the state from rank {missing[:8]}" if missing else ""
        return self._ledger.trouble

    def _outcomes(self, report: HostReport, worker: WorkerReport, generation: int) -> tuple[SaveOutcome, ...]:
        """Answers to exactly what the worker has not heard of yet."""
        held = {
            s.step
            for s in report.segments
            if (s.rank, s.generation) == (worker.rank, generation) and not s.kept and s.trigger != "memory"
        }
        found = []
        for step in worker.pending:
            key = (generation, step)
            outcome = self._saves.outcome(key)
            if outcome is not None:
                found.append(outcome)
            elif key not in self._saves.active and step not in held:
                found.append(self._unknown(key, worker))
        if worker.due_step is not None:
            # It may be held for a plan or memory that a save which has failed already will not need.
            outcome = self._saves.outcome((generation, worker.due_step))
            found.extend([outcome] if outcome is not None else [])
        return tuple(found)

    def _unknown(self, key: tuple[int, int], worker: WorkerReport) -> SaveOutcome:
        """The answer for a save of which neither the log nor anybody's memory has a trace."""
        reason = dict(worker.skipped).get(key[1])
        if reason is None and self._saves.decided(key):
            text = "a later save is committed, and whether this one was is forgotten: it is not kept in any case"
            return SaveOutcome(*key, "failed", error=text, quiet=True)
        return SaveOutcome(*key, "failed", error=reason or "its snapshot is gone, and no coordinator has heard of it")
