"""One host's side of the protocol: which sealed snapshots to write, copy, keep or free, and what to report.

A snapshot is let go only once its save is decided and no writer of it may live, and freed only once no restart needs it
either; a shard's path is used by one try (the number comes from a counter in the snapshot itself, so it survives this
process).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_ckpt.protocol.messages import (
    HostReport,
    HostView,
    SegmentInfo,
    WorkerReport,
    WorkerView,
    WriteFailure,
    WriteOrder,
)
from ray_ckpt.protocol.pace import is_news
from ray_ckpt.types import Layout, ShardReport


@dataclass(frozen=True, slots=True)
class StartWrite:
    """Write the range of this rank's ``local`` writer to a shard of the order; answer with `on_written` or
    `on_write_failed`.
    """

    segment: SegmentInfo
    local: int
    order: WriteOrder

    @property
    def writer(self) -> int:
        """The writer's number among all of the save."""
        return self.segment.writer_base + self.local

    def shard_id(self, attempt_try: int) -> int:
        """The shard that this try owns. Those of a copy follow on all that the snapshot itself can have."""
        first = self.order.max_tries if self.segment.replica else 0
        return (first + attempt_try) * self.order.num_writers + self.writer


@dataclass(frozen=True, slots=True)
class Free:
    """The snapshot in this segment is no longer needed."""

    segment: SegmentInfo


@dataclass(frozen=True, slots=True)
class Keep:
    """No save needs the snapshot in this segment any more; it stays until the memory is needed."""

    segment: SegmentInfo


@dataclass(frozen=True, slots=True)
class Mirror:
    """Have the ``peer`` copy this snapshot; answer with `on_mirrored`."""

    segment: SegmentInfo
    peer: str


Action = StartWrite | Free | Keep | Mirror


class HostLogic:
    """State of one host's agent. ``max_writes`` bounds the writers at work at once."""

    def __init__(self, host: str, incarnation: str, *, name: str = "", max_writes: int = 2) -> None:
        self.host = host
        self.incarnation = incarnation
        self.name = name
        self.max_writes = max_writes
        self.view: HostView | None = None
        self.workers: dict[str, WorkerReport] = {}
        self._dead: set[str] = set()
        self._segments: dict[str, SegmentInfo] = {}
        self._layouts: dict[str, Layout] = {}
        self._writing: set[tuple[str, int]] = set()
        self._freeing: set[str] = set()
        self._mirroring: str | None = None
        self._mirrored: dict[tuple[str, int], bool] = {}
        self._decided: set[tuple[str, int]] = set()
        self._copied_by = ""
        self._shards: dict[tuple[str, int], ShardReport] = {}
        self._failures: dict[tuple[str, int], WriteFailure] = {}
        self._sequence = 0
        self._news = False

    # -- events -----------------------------------------------------------------------------------

    def on_worker(self, report: WorkerReport) -> None:
        """A local training process has reported."""
        known = self.workers.get(report.worker)
        if known is not None and known.sequence >= report.sequence:
            return
        if report.layout is not None:
            self._layouts[report.layout.fingerprint] = report.layout
        self._news |= is_news(report, known, steps=self.view is not None and self.view.watched)
        self.workers[report.worker] = replace(report, layout=None)
        self._dead.discard(report.worker)

    def on_worker_dead(self, worker: str) -> None:
        """The process of a local worker is gone."""
        if worker in self.workers and worker not in self._dead:
            self._dead.add(worker)
            self._news = True

    def on_segments(self, sealed: Iterable[SegmentInfo], layouts: Mapping[str, Layout] | None = None) -> None:
        """All sealed snapshots that lie in this host's memory now.

        Look at the memory after taking in the workers' reports: then a worker that has gone past a step
        without a snapshot of it is one that will never have one.
        """
        found = {s.name: s for s in sealed}
        self._news |= _contents(found) != _contents(self._segments)
        self._segments = found
        self._freeing &= self._segments.keys()
        self._decided &= _contents(found)
        self._mirrored = {k: whole for k, whole in self._mirrored.items() if k in _contents(found)}
        self._layouts.update(layouts or {})

    def on_view(self, view: HostView) -> None:
        """The coordinator's decisions; those of an older epoch or version are dropped."""
        if self.view is not None and (view.epoch, view.version) < (self.view.epoch, self.view.version):
            return
        self.view = view
        if view.peer and view.peer != self._copied_by:
            # What another one has copied may be lost with it.
            self._mirrored.clear()
            self._copied_by = view.peer
        # For good: a coordinator that is started later may know of a save that has failed no more.
        self._decided |= {(s.name, s.fills) for s in self._segments.values() if s.save in view.decided}
        for told in view.workers:
            if told.refused is not None and told.worker in self._dead:
                # Of a start that is over: a host outlives many.
                self._dead.discard(told.worker)
                self.workers.pop(told.worker, None)
        attempts = {o.attempt for o in view.orders}
        self._shards = {k: s for k, s in self._shards.items() if k[0] in attempts}
        self._failures = {k: f for k, f in self._failures.items() if k[0] in attempts}

    def on_written(self, start: StartWrite, shard: ShardReport) -> None:
        """A shard is whole and durable."""
        self._writing.discard((start.segment.name, start.local))
        self._shards[start.order.attempt, start.writer] = shard
        self._news = True

    def on_write_failed(self, start: StartWrite, error: str, *, final: bool) -> None:
        """A try ended without a shard; ``final``: no try is left, or none would help."""
        self._writing.discard((start.segment.name, start.local))
        if final:
            failure = WriteFailure(start.order.attempt, start.writer, error)
            self._failures[start.order.attempt, start.writer] = failure
            self._news = True

    def on_freed(self, name: str) -> None:
        """The segment has been emptied (or is gone)."""
        self._freeing.discard(name)
        self._segments.pop(name, None)
        # What is made anew under this name counts its fills from one again.
        self._decided = {key for key in self._decided if key[0] != name}
        self._mirrored = {key: whole for key, whole in self._mirrored.items() if key[0] != name}

    def on_mirrored(self, segment: SegmentInfo, *, whole: bool) -> None:
        """The peer has its copy of this snapshot, or will not have one."""
        self._mirroring = None
        self._mirrored[segment.name, segment.fills] = whole
        self._news |= not whole

    def has_copy(self, segment: SegmentInfo) -> bool:
        """Whether a copy of this snapshot lies here. A second one would be written under the numbers of the first."""
        of = (segment.rank, segment.save, segment.trigger)
        return any(s.replica and (s.rank, s.save, s.trigger) == of for s in self._segments.values())

    # -- what to do, what to say --------------------------------------------------------------------

    def take(self) -> list[Action]:
        """The actions to start now. Each is handed out once, but for `Keep`, until the segment is kept."""
        view = self.view
        if view is None:
            return []
        actions: list[Action] = []
        busy = {name for name, _ in self._writing}
        for segment in list(self._segments.values()):
            foreign = segment.directory != view.directory
            if not (foreign or self._settled(segment, view)) or segment.name in busy | self._freeing:
                continue
            if foreign or segment.save < view.kept_from:
                self._freeing.add(segment.name)
                actions.append(Free(segment))
            elif not segment.kept and not self._awaits_mirror(segment, view):
                actions.append(Keep(segment))
        actions.extend(self._startable(view.orders))
        actions.extend(self._next_mirror(view))
        return actions

    def _settled(self, segment: SegmentInfo, view: HostView) -> bool:
        """Whether no save needs the snapshot any more."""
        decided = segment.save in view.decided or (segment.name, segment.fills) in self._decided
        over = decided or segment.generation < view.oldest_generation
        return over or segment.kept or segment.trigger == "memory"

    def _awaits_mirror(self, segment: SegmentInfo, view: HostView) -> bool:
        """Whether a copy of it is to be made, or being made: nobody must overwrite it until then."""
        if segment.name == self._mirroring:
            # A copy that is overwritten under way notices it.
            return not (self._settled(segment, view) and segment.rank in self._pressed)
        if not view.peer or segment.replica or (segment.name, segment.fills) in self._mirrored:
            return False
        if self._settled(segment, view) and segment.rank in self._pressed:
            return False
        # One that is being saved too: with its host, the save would be lost.
        return segment is self._newest_of(segment.rank) or not self._settled(segment, view)

    @property
    def _pressed(self) -> set[int]:
        """Ranks whose training waits for memory, or for a plan: a save goes before copies."""
        return {r.rank for r in self.workers.values() if r.due_step is not None and r.worker not in self._dead}

    def _newest_of(self, rank: int) -> SegmentInfo | None:
        own = [s for s in self._segments.values() if s.rank == rank and not s.replica]
        return max(own, key=lambda s: s.save, default=None)

    def _next_mirror(self, view: HostView) -> Iterable[Mirror]:
        """One copy at a time, so that the training on both hosts keeps the network and the memory bus."""
        if self._mirroring is not None:
            return
        for segment in sorted(self._segments.values(), key=lambda s: s.save):
            if segment.name not in self._freeing and self._awaits_mirror(segment, view):
                self._mirroring = segment.name
                yield Mirror(segment, view.peer)
                return

    def _startable(self, orders: Sequence[WriteOrder]) -> Iterable[StartWrite]:
        for order in sorted(orders, key=lambda o: o.step):
            for segment in self._segments.values():
                if segment.save != order.save or segment.plan_id != order.plan_id or segment.trigger == "memory":
                    continue
                if self.view is None or segment.directory != self.view.directory:
                    continue
                if segment.replica and segment.rank not in order.replicas:
                    continue
                if self._settled(segment, self.view):
                    self._decline(segment, order)
                    continue
                for local in range(segment.writers):
                    if len(self._writing) >= self.max_writes:
                        return
                    start = StartWrite(segment, local, order)
                    if self._wanted(start):
                        self._writing.add((segment.name, local))
                        yield start

    def _decline(self, segment: SegmentInfo, order: WriteOrder) -> None:
        """A coordinator before this one has decided the save: its snapshot may be overwritten at any time, so no commit
        may count on it, nor later ones wait for it.
        """
        for local in range(segment.writers):
            start = StartWrite(segment, local, order)
            if self._wanted(start):
                self.on_write_failed(start, "its save was decided before", final=True)

    def _wanted(self, start: StartWrite) -> bool:
        key = (start.order.attempt, start.writer)
        settled = key in self._shards or key in self._failures or start.writer in start.order.done
        return not settled and (start.segment.name, start.local) not in self._writing

    def report(self) -> HostReport:
        """This host's whole state; what the coordinator has acknowledged is left out."""
        self._sequence += 1
        self._news = False
        acknowledged = set(self.view.fingerprints) if self.view else set()
        done = {(o.attempt, w) for o in self.view.orders for w in o.done} if self.view else set()
        wanted = {s.fingerprint for s in self._segments.values()}
        wanted |= {w.fingerprint for w in self.workers.values() if w.fingerprint}
        layouts = [self._layouts[f] for f in sorted(wanted - acknowledged) if f in self._layouts]
        return HostReport(
            host=self.host,
            incarnation=self.incarnation,
            sequence=self._sequence,
            epoch=self.view.epoch if self.view else 0,
            name=self.name,
            workers=tuple(self.workers.values()),
            dead=tuple(sorted(self._dead)),
            segments=tuple(self._told(s) for s in self._segments.values() if s.name not in self._freeing),
            layouts=tuple(layouts),
            shards=tuple(s for key, s in self._shards.items() if key not in done),
            failures=tuple(self._failures.values()),
        )

    def _told(self, segment: SegmentInfo) -> SegmentInfo:
        alone = self._mirrored.get((segment.name, segment.fills)) is False
        return replace(segment, alone=True) if alone else segment

    def worker_view(self, worker: str) -> tuple[int, int, WorkerView] | None:
        """(epoch, version, view) for one local worker; None before the first word of the coordinator."""
        if self.view is None:
            return None
        view = next((v for v in self.view.workers if v.worker == worker), None)
        if view is None:
            return None
        report = self.workers.get(worker)
        held = report.fingerprint if report and report.fingerprint in self._layouts else None
        loose = tuple(s.save for s in self._segments.values() if self._is_loose(s, self.view))
        view = replace(view, fingerprint=held, poll_s=self.view.poll_s, loose=loose)
        return self.view.epoch, self.view.version, view

    def _is_loose(self, segment: SegmentInfo, view: HostView) -> bool:
        """Whether no restart counts on it: a newer one is safe, or this one will not be safer than it is, or the start
        that it is of went further than what the present one has restored.
        """
        mirrored = self._mirrored.get((segment.name, segment.fills))
        left_behind = segment.generation < view.oldest_generation and (0, 0) < view.kept_from < segment.save
        return not view.peer or segment.save < view.kept_from or mirrored is False or left_behind

    @property
    def news(self) -> bool:
        """Whether there is something to tell that does not wait for the next beat."""
        return self._news

    @property
    def idle(self) -> bool:
        """No worker goes on, nothing is left to write: the agent may end, but for what a restart may need of it.

        A worker that was refused does not go on: for its sake no coordinator may take the directory over again.
        """
        refused = {view.worker for view in self.view.workers if view.refused is not None} if self.view else set()
        over = self._dead | refused
        going_on = any(not report.finished and worker not in over for worker, report in self.workers.items())
        unwritten = any(not s.kept and s.trigger != "memory" for s in self._segments.values())
        return not going_on and not self._writing and not unwritten

    @property
    def recoverable(self) -> bool:
        """Whether snapshots lie here of a job that has not come to its end, as far as this host knows."""
        closed = bool(self.workers) and all(report.closed for report in self.workers.values())
        return bool(self._segments) and not closed


def _contents(segments: Mapping[str, SegmentInfo]) -> set[tuple[str, int]]:
    """What lies in these segments; that it need not stay any more is no other content."""
    return {(s.name, s.fills) for s in segments.values()}
