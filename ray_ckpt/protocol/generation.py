"""Which workers form one start of the job, and the one checkpoint they all restore.

A worker joins by reporting without being bound to a generation. When all ranks have joined, answered the roll call
(a dead one cannot) and asked for the same restore, every older save is decided (I10), the choice is recorded in the
log, and only then told. A worker is bound once all ranks have read their part ("started"); until then it
may be drafted into a newer generation.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ray_ckpt.protocol.choice import Choice, choose, hindrance
from ray_ckpt.protocol.flows import Flow, Flows, Io, IoFailedError, ListAgents, ReadHead, Until
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import (
    Holders,
    JobConfig,
    Problem,
    RestoreDecision,
    RestoreResult,
    RestoreWish,
    WorkerReport,
)
from ray_ckpt.protocol.recall import Recall
from ray_ckpt.protocol.roster import Roster
from ray_ckpt.protocol.saves import Saves
from ray_ckpt.types import Generation, LogRecord

_INVENTORY_S = 5.0
"""So long at least a start waits for hosts that may hold a newer snapshot than those that have spoken: an agent that
was killed comes back.
"""


@dataclass(slots=True)
class Forming:
    """Workers that have joined the next generation so far, by rank.

    ``dispute``: at ``opened`` it took the place of one with other settings, which this text names.
    """

    config: JobConfig
    members: dict[int, str] = field(default_factory=dict)
    roll_call: int = 0
    dispute: str = ""
    opened: float = 0.0
    sealing: bool = False
    failed: Problem | None = None


class Generations:
    """Forms, seals and starts generations; knows who is a member of the present one."""

    def __init__(self, flows: Flows, ledger: Ledger, roster: Roster, saves: Saves, recall: Recall) -> None:
        self._flows = flows
        self._ledger = ledger
        self._roster = roster
        self._saves = saves
        self._recall = recall
        self.forming: Forming | None = None
        self.members: dict[int, str] = {}
        self.config: JobConfig | None = None
        self.started = False
        self.refused: dict[str, str] = {}
        self.errors: dict[str, Problem] = {}
        self.note = ""
        self._known: set[str] = set()
        self._bad: set[str] = set()
        self._falling_back = False
        self._roll_calls = 0
        self._holders: dict[tuple[int, int], Holders] = {}
        self._asked_since: float | None = None
        self._unheard = ""

    @property
    def current(self) -> Generation | None:
        """The newest sealed generation, as the log has it."""
        return self._ledger.head.generation

    def reports(self) -> dict[int, WorkerReport]:
        """Rank -> newest report of the present generation's members that have been heard of."""
        found = {rank: self._roster.worker(worker) for rank, worker in self.members.items()}
        return {rank: report for rank, report in found.items() if report is not None}

    @property
    def closed(self) -> bool:
        """Whether all ranks have ended with all that they had to save saved: the next start reads it in the store."""
        current, reports = self.current, self.reports()
        return current is not None and len(reports) == current.world_size and all(r.closed for r in reports.values())

    def is_gone(self, rank: int) -> bool:
        """Whether a member's process has died or has said that no step follows."""
        worker = self.members[rank]
        report = self._roster.worker(worker)
        if self._roster.dead(worker) or (report is not None and report.finished):
            return True
        patience = 2 * self.config.host_timeout_s if self.config else float("inf")
        return report is not None and self._roster.silent(worker, self._ledger.now - patience)

    def update(self) -> None:
        """Take in the roster after an event."""
        for _, report in list(self._roster.workers()):
            if report.finished and self.members.get(report.rank) != report.worker and not report.started:
                # It has left before it began; its host only repeats its last word.
                continue
            if report.worker not in self.refused:
                self._sort_in(report)
        if self.forming is not None:
            self._check_forming(self.forming)
        if (self.forming is None or not self.forming.sealing) and self._ledger.appending != "seal":
            self._saves.unsettle()
        self._check_start()

    def _sort_in(self, report: WorkerReport) -> None:
        current = self.current
        bound = report.generation is not None and current is not None
        if bound and current is not None and report.generation == current.number:
            holder = self.members.setdefault(report.rank, report.worker)
            if holder != report.worker:
                self._refuse(report.worker, f"rank {report.rank} of generation {current.number} is another process")
                return
            if self.config is None or report.rank == 0:
                self.config = report.config
            self.started = self.started or report.started
        elif report.started or (bound and self.members.get(report.rank) != report.worker):
            # Not started, but left out when a newer generation was sealed: a leftover that must not join the next.
            number = current.number if current else 0
            self._refuse(
                report.worker,
                f"generation {report.generation} is over: the job was started again (now generation {number})",
            )
        elif self.members.get(report.rank) != report.worker and not self._roster.dead(report.worker):
            self._join(report)

    def _refuse(self, worker: str, reason: str) -> None:
        self.refused[worker] = reason

    # -- forming --------------------------------------------------------------------------------------

    def _join(self, report: WorkerReport) -> None:
        forming = self.forming
        if forming is not None and forming.members.get(report.rank) == report.worker:
            return
        if self.config is not None and report.config.start < self.config.start:
            self._refuse(report.worker, f"start {report.config.start} of the job is over: now is {self.config.start}")
            return
        newcomer = report.worker not in self._known
        self._known.add(report.worker)
        if forming is not None and forming.failed is not None:
            for rank, worker in forming.members.items():
                self._refuse(worker, f"rank {rank} joined a start of the job that failed: {forming.failed.text}")
            forming = None
        if forming is None:
            forming = self.forming = Forming(report.config)
        if report.config != forming.config:
            mine, theirs = report.config.start, forming.config.start
            if mine < theirs or (mine == theirs and not newcomer):
                self._refuse(report.worker, _disagreement(report.rank, report.config, forming.config))
                return
            dispute = _disagreement(min(forming.members), forming.config, report.config) if mine == theirs else ""
            for rank, worker in forming.members.items():
                self._refuse(worker, _disagreement(rank, forming.config, report.config))
            forming = self.forming = Forming(report.config, dispute=dispute, opened=self._ledger.now)
        if report.rank in forming.members:
            if not newcomer:
                self._refuse(report.worker, f"a newer process joined as rank {report.rank}")
                return
            self._refuse(forming.members[report.rank], f"a newer process joined as rank {report.rank}")
        forming.members[report.rank] = report.worker
        self._call_roll(forming)

    def _call_roll(self, forming: Forming) -> None:
        """Ask all members for a sign of life; the epoch in the number keeps answers to earlier coordinators apart."""
        self._roll_calls += 1
        forming.roll_call = (self._ledger.epoch << 32) + self._roll_calls

    def _check_forming(self, forming: Forming) -> None:
        self._draft(forming)
        silent = self._ledger.now - forming.config.host_timeout_s
        for rank, worker in list(forming.members.items()):
            if self._roster.dead(worker) or self._roster.silent(worker, silent):
                del forming.members[rank]
                self._refuse(worker, f"rank {rank} was not heard of for too long")
        if not forming.members:
            self.forming = None
        elif forming.failed is not None:
            self._fail(forming, forming.failed)
        elif forming.dispute and not forming.sealing and forming.opened < silent:
            # Not the last start's workers on their way out, then: these ranks' own partners were refused.
            self._fail(forming, Problem("UsageError", forming.dispute))
        elif not forming.sealing and self._is_complete(forming):
            forming.sealing = True
            self._flows.start(self._seal(forming))

    def _draft(self, forming: Forming) -> None:
        """Members of a sealed generation that has not started follow into the one that is forming."""
        if self.started:
            return
        for rank, report in self.reports().items():
            if not report.started and rank not in forming.members and report.config == forming.config:
                del self.members[rank]
                forming.members[rank] = report.worker
                self._call_roll(forming)

    def _is_complete(self, forming: Forming) -> bool:
        if len(forming.members) < forming.config.world_size:
            return False
        wishes = set()
        for worker in forming.members.values():
            report = self._roster.worker(worker)
            if report is None or report.roll_call != forming.roll_call or report.restore is None:
                return False
            wishes.add(report.restore)
        if len(wishes) > 1:
            named = "; ".join(sorted(_wish_text(w) for w in wishes))
            self._fail(forming, Problem("UsageError", f"the ranks ask for different restores: {named}"))
            return False
        return True

    def waiting_for(self, forming: Forming) -> str:
        """Whom the start waits for, for people."""
        missing = sorted(set(range(forming.config.world_size)) - forming.members.keys())
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            text = f"rank {shown} of {forming.config.world_size} has not joined"
            return f"{text} ({forming.dispute})" if forming.dispute else text
        silent = [
            f"rank {rank} on {self._roster.host_name(worker)}"
            for rank, worker in sorted(forming.members.items())
            if (report := self._roster.worker(worker)) is None
            or report.restore is None
            or report.roll_call != forming.roll_call
        ]
        return f"{', '.join(silent[:8])} has not called restore() or step() yet" if silent else ""

    # -- sealing ----------------------------------------------------------------------------------------

    def _seal(self, forming: Forming) -> Flow:
        problem = hindrance(self._ledger.head.live, self._wish_of(forming), forming.config)
        if problem and self._saves.settled:
            # Before anything is given up for a start that cannot succeed.
            self._fail(forming, problem)
            return
        self._saves.settle(self.config)
        yield Until(lambda: self.forming is not forming or self._saves.settled)
        yield from self._take_inventory(forming)
        top = yield from self._ledger.retry(ReadHead())
        if top is None or top.epoch != self._ledger.epoch:
            # The directory was emptied under us, or is another's: a coordinator that knows it as it is must choose.
            self._ledger.fence()
            return
        if self.forming is not forming or not self._is_complete(forming):
            forming.sealing = False
            return
        wish, members = self._wish_of(forming), dict(forming.members)
        self._ledger.submit(
            lambda head: self._seal_record(head, forming, wish),
            lambda record: self._sealed(record, forming, members),
        )

    def _take_inventory(self, forming: Forming) -> Generator[Io | Until, Any, None]:
        """Hear of what lies in the memory of all hosts, those without a worker of this start too.

        Those that stay silent are left out, so that no choice counts on them.
        """
        self._unheard = ""
        try:
            hosts: Mapping[str, str] = yield ListAgents()
        except IoFailedError:
            return
        patience = max(_INVENTORY_S, forming.config.host_timeout_s)
        until = self._ledger.now + patience

        def awaited() -> list[str]:
            silent = self._silent(hosts, forming.config.host_timeout_s)
            self._roster.leave_out(silent)
            # What is silent can hold nothing newer than a snapshot of which all parts are there.
            return [] if self._recall.newest_is_whole else sorted(hosts[host] for host in silent & hosts.keys())

        yield Until(lambda: self.forming is not forming or not awaited() or self._ledger.now >= until)
        if names := awaited():
            named = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
            self._unheard = (
                f"no answer within {patience:.0f} s from the agents on {len(names)} of the hosts, {named}: "
                "snapshots in memory there, which may be newer, were not considered"
            )

    def _silent(self, hosts: Collection[str], timeout_s: float) -> frozenset[str]:
        """Hosts whose agents do not speak: of ``hosts``, where there is one, and those that have spoken before."""
        known, before = self._roster.hosts, self._ledger.now - timeout_s
        unheard = {host for host in hosts if host not in known}
        silent = {name for name, host in known.items() if self._roster.host_silent(host, before)}
        return frozenset(host for host in unheard | silent if not self._roster.lost(host))

    def _fail(self, forming: Forming, problem: Problem) -> None:
        forming.failed = problem
        forming.sealing = False
        for worker in forming.members.values():
            self.errors[worker] = problem

    def _wish_of(self, forming: Forming) -> RestoreWish:
        report = self._roster.worker(next(iter(forming.members.values())))
        assert report is not None
        assert report.restore is not None
        return report.restore

    def _seal_record(self, head: LogRecord, forming: Forming, wish: RestoreWish) -> LogRecord | None:
        if self.forming is not forming:
            return None
        problem = hindrance(head.live, wish, forming.config)
        if problem:
            self._fail(forming, problem)
            return None
        # Of this very head: the generation before may have fallen back to another choice a moment ago.
        chosen = choose(head.live, self._recall, wish)
        number = head.generation.number + 1 if head.generation else 1
        generation = Generation(number, forming.config.world_size, chosen.step, snapshot=chosen.snapshot)
        keep = wish.kind == "none" and not forming.config.fresh
        live = head.live if keep else chosen.mark(head.live)
        reason = self._unheard if wish.kind == "newest" and not wish.stored else ""
        return self._ledger.next_record("seal", generation=generation, live=live, reason=reason)

    def _sealed(self, record: LogRecord, forming: Forming, members: dict[int, str]) -> None:
        if self.forming is forming:
            self.forming = None
        for worker in set(self.members.values()) - set(members.values()):
            self._refuse(
                worker,
                f"the job was started again (generation {record.generation and record.generation.number})",
            )
        self.members = members
        first = self._roster.worker(members[0])
        # Where ranks may differ, the first one's settings count.
        self.config = first.config if first is not None else forming.config
        self.started = False
        self.note = record.reason
        self._bad = set()
        self._saves.begin(self.config)

    # -- the restore ----------------------------------------------------------------------------------

    def decision(self) -> RestoreDecision | None:
        """What the members of the present generation read; None while that is not known (yet)."""
        current = self.current
        if current is None:
            return None
        key, chosen = (current.number, current.round), None
        if current.snapshot is None and current.restored_step is not None:
            matching = [c for c in self._ledger.head.live if c.step == current.restored_step]
            matching = [c for c in matching if c.generation < current.number] or matching
            chosen = matching[-1] if matching else None
        if key not in self._holders:
            of = current.snapshot or ((chosen.generation, chosen.step) if chosen else None)
            holders = self._recall.holders(of)
            if current.snapshot is not None and not holders and self._is_early(current):
                return None
            self._holders = {key: holders}
        # Not told any more once all have read: with thousands of ranks it is the largest part of a view.
        holders = () if self.started else self._holders[key]
        return RestoreDecision(*key, chosen, self.note, current.snapshot, holders, self._ledger.head.directory)

    def _is_early(self, current: Generation) -> bool:
        """Whether hosts that hold the snapshot may not have spoken to this coordinator yet."""
        if self._asked_since is None:
            self._asked_since = self._ledger.now
        patience = self.config.host_timeout_s if self.config is not None else _INVENTORY_S
        return len(self.members) < current.world_size or self._ledger.now < self._asked_since + patience

    def _check_start(self) -> None:
        current = self.current
        if current is None or self.started or self._falling_back or len(self.members) < current.world_size:
            return
        reports = self.reports()
        results = self._results(current, reports)
        damage = {rank: r.damage for rank, r in results.items() if r.damage is not None}
        if damage:
            self._fall_back(current, damage, reports)
        elif len(results) == current.world_size:
            self.started = True
        else:
            self._check_left(results)

    def _check_left(self, results: dict[int, RestoreResult]) -> None:
        """A rank that is gone before it has restored will not come back into this generation."""
        for rank in self.members.keys() - results.keys():
            if self.is_gone(rank):
                text = f"the job cannot start: {self.not_restored()}; start all workers again"
                for other in self.members.values():
                    self.errors.setdefault(other, Problem("UnavailableError", text))
                return

    @staticmethod
    def _results(current: Generation, reports: dict[int, WorkerReport]) -> dict[int, RestoreResult]:
        """How the present round's read ended, on the ranks where it has."""
        return {
            rank: r.restored
            for rank, r in reports.items()
            if r.generation == current.number
            and r.restored is not None
            and (r.restored.generation, r.restored.round) == (current.number, current.round)
        }

    def not_restored(self) -> str:
        """Which members the start waits for, for people."""
        reports = self.reports()
        done = self._results(self.current, reports) if self.current else {}
        texts = []
        for rank in sorted(self.members.keys() - done.keys())[:8]:
            worker = self.members[rank]
            state = "has left without restoring" if self.is_gone(rank) else "has not restored yet"
            texts.append(f"rank {rank} on {self._roster.host_name(worker)} {state}")
        return ", ".join(texts)

    def _fall_back(self, current: Generation, damage: dict[int, str], reports: dict[int, WorkerReport]) -> None:
        rank, what = sorted(damage.items())[0]
        decision = self.decision()
        wish = reports[rank].restore
        assert wish is not None
        tried, where = current.snapshot, "?"
        if tried is not None:
            where = f"the snapshot of step {tried[1]} in host memory"
        elif decision is not None and decision.checkpoint is not None:
            tried, where = (decision.checkpoint.generation, decision.checkpoint.step), decision.checkpoint.prefix
            self._bad.add(where)
        newest = wish.kind == "newest"
        chosen = choose(self._ledger.head.live, self._recall, wish, self._bad, tried) if newest else Choice(None)
        # By the log: another coordinator may have found a checkpoint damaged before the memory that was tried instead.
        stored = current.snapshot is None or any(
            (c.generation, c.step) > current.snapshot for c in self._ledger.head.live
        )
        if chosen.step is None and stored:
            self._give_up(f"{where} cannot be read (rank {rank}: {what})", wish)
            return
        # That memory is lost happens; where nothing was ever committed the job begins again then.
        instead = "starting afresh" if chosen.step is None else f"taking step {chosen.step}"
        instead += " from host memory" if chosen.snapshot is not None else ""
        self.note = f"{where} is damaged (rank {rank}: {what}): {instead} instead"
        self._falling_back = True
        self._ledger.submit(lambda head: self._fall_back_record(head, current, chosen), lambda _: self._fallen_back())

    def _give_up(self, text: str, wish: RestoreWish) -> None:
        if wish.kind == "newest":
            text += " and there is no older checkpoint to take instead"
        else:
            others = ", ".join(str(c.step) for c in self._ledger.head.live if c.prefix not in self._bad) or "none"
            text += f"; other steps are there: {others}"
        for worker in self.members.values():
            self.errors[worker] = Problem("DamagedError", text)

    def _fall_back_record(self, head: LogRecord, current: Generation, chosen: Choice) -> LogRecord | None:
        if head.generation is None or head.generation.number != current.number:
            self._falling_back = False
            return None
        generation = replace(
            head.generation, restored_step=chosen.step, round=head.generation.round + 1, snapshot=chosen.snapshot
        )
        return self._ledger.next_record("seal", generation=generation, live=chosen.mark(head.live), reason=self.note)

    def _fallen_back(self) -> None:
        self._falling_back = False


def _wish_text(wish: RestoreWish) -> str:
    return {"newest": "the newest", "none": "no restore"}.get(wish.kind, f"step {wish.step}")


def _disagreement(rank: int, mine: JobConfig, theirs: JobConfig) -> str:
    names = [f.name for f in fields(JobConfig) if f.compare and getattr(mine, f.name) != getattr(theirs, f.name)]
    texts = [f"{n}={getattr(mine, n)!r} against {getattr(theirs, n)!r}" for n in names]
    return f"rank {rank} was started with {', '.join(texts)} elsewhere: give all ranks the same settings"
