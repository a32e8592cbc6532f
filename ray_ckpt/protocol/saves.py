"""The saves of the present generation, each from its first sealed snapshot to commit or abort.

A save fails when some rank can no longer contribute, when a shard cannot be written, or at its deadline.
Commits happen in the order of their steps, so the newest commit never goes back (I2).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from ray_ckpt.protocol.flows import (
    Committed,
    Flow,
    Flows,
    HasIndex,
    Io,
    IoFailedError,
    PutClaim,
    PutIndex,
    PutMetadata,
    ReadHead,
    Until,
)
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import HostReport, JobConfig, SaveOutcome, SegmentInfo
from ray_ckpt.protocol.roster import Roster
from ray_ckpt.protocol.save_state import Key, SaveState, writers_of
from ray_ckpt.types import Checkpoint, Claim, LogRecord

_DROPPED_S = 2.0
"""A rank that has refused a step may be just there, and about to save it because it is asked to."""


class Saves:
    """All saves of the present generation.

    ``worker_of`` names a rank's worker (None: not heard of); ``decided_proposal`` says whether the step was agreed
    on by all, ``dropped_at`` since when no proposal of it stands; ``described`` whether the layouts of all its
    snapshots have arrived; ``check`` returns an error text for a fully sealed save that must not commit; ``on_end``
    hears of each end.
    """

    def __init__(self, flows: Flows, ledger: Ledger, roster: Roster) -> None:
        self._flows = flows
        self._ledger = ledger
        self._roster = roster
        self._config: JobConfig | None = None
        self._counter = 0
        self._settling_since: float | None = None
        self.active: dict[Key, SaveState] = {}
        self.outcomes: dict[Key, SaveOutcome] = {}
        self.worker_of: Callable[[int], str | None] = lambda _: None
        self.decided_proposal: Callable[[int], bool] = lambda _: False
        self.dropped_at: Callable[[int], float | None] = lambda _: None
        self.described: Callable[[SaveState], bool] = lambda _: True
        self.check: Callable[[SaveState], str | None] = lambda _: None
        self.on_end: Callable[[SaveState], None] = lambda _: None

    # -- events ----------------------------------------------------------------------------------------

    def begin(self, config: JobConfig) -> None:
        """A new generation is sealed: nothing of an older one can commit any more."""
        self._config = config
        self._settling_since = None
        for save in self.active.values():
            save.fail("the job was started again before this save could commit", quiet=True)

    def settle(self, config: JobConfig | None) -> None:
        """A new generation waits to be sealed: decide what is under way, soon, and open nothing more."""
        self._config = self._config or config
        if self._settling_since is None:
            self._settling_since = self._ledger.now

    def unsettle(self) -> None:
        """No new generation waits any more: it was sealed, or it failed and the present one goes on."""
        self._settling_since = None

    @property
    def settled(self) -> bool:
        """No save is undecided."""
        return not self.active

    def update(self, config: JobConfig | None) -> None:
        """Take in the roster after an event."""
        self._config = self._config or config
        if self._config is None or self._ledger.head.generation is None:
            return
        for host in list(self._roster.hosts.values()):
            self._take_in(host.report)
        for save in list(self.active.values()):
            self._judge(save, self._config)

    def _take_in(self, report: HostReport) -> None:
        for segment in report.segments:
            ours = segment.directory == self._ledger.head.directory
            save = self._save_of(segment) if ours and segment.trigger != "memory" and not segment.kept else None
            if save is None:
                continue
            if (segment.plan_id, segment.world_size) != (save.plan_id, save.world_size):
                save.fail(
                    f"rank {segment.rank} saved another structure of the state at step {save.step} than rank "
                    f"{next(iter(save.segments), '?')}: change the structure at the same step on every rank"
                )
            else:
                save.segments.setdefault(segment.rank, segment)
                known = save.replicas.get(segment.rank)
                if not segment.replica:
                    save.holders[segment.rank] = report.host
                elif known is None or self._roster.lost(known):
                    save.replicas[segment.rank] = report.host
        by_attempt = {save.attempt: save for save in self.active.values()}
        for shard in report.shards:
            owner = by_attempt.get(shard.attempt)
            if owner is not None:
                owner.shards.setdefault(shard.writer, shard)
        for failure in report.failures:
            owner = by_attempt.get(failure.attempt)
            if owner is not None and failure.writer not in owner.shards:
                owner.fail(f"shard of writer {failure.writer} on {report.name or report.host}: {failure.error}")

    def _save_of(self, segment: SegmentInfo) -> SaveState | None:
        """The undecided save of a snapshot, opened if it is new; None if it is decided or of another generation."""
        known = self.active.get(segment.save)
        if known is not None:
            return known
        if self.decided(segment.save) or segment.generation != self._generation or self._settling_since is not None:
            return None
        return self._open(segment)

    @property
    def _generation(self) -> int:
        generation = self._ledger.head.generation
        return generation.number if generation else 0

    def decided(self, key: Key) -> bool:
        """Whether this save is committed or has failed, as far as can be known.

        What a restarted coordinator finds below the newest commit of its generation was decided before it.
        """
        if key in self.active:
            return False
        if key in self.outcomes:
            return True
        newest = max((c.step for c in self._ledger.head.live if c.generation == key[0]), default=-1)
        return key[1] <= newest

    @property
    def decided_steps(self) -> list[int]:
        """Steps of the present generation whose saves have ended."""
        return [step for generation, step in self.outcomes if generation == self._generation]

    def outcome(self, key: Key) -> SaveOutcome | None:
        """How a save ended, from memory or from the log."""
        if key in self.active:
            return None
        found = self.outcomes.get(key)
        if found is None:
            head = self._ledger.head
            for c in (*head.live, *(d.checkpoint for d in head.dying)):
                if (c.generation, c.step) == key:
                    return SaveOutcome(*key, "committed", c.prefix)
        return found

    def _open(self, segment: SegmentInfo) -> SaveState:
        assert self._config is not None
        self._counter += 1
        save = SaveState(
            key=segment.save,
            attempt=f"e{self._ledger.epoch:06d}-{self._counter:06d}",
            plan_id=segment.plan_id,
            world_size=segment.world_size,
            num_writers=segment.num_writers,
            max_tries=self._config.max_tries,
            copies=1 + self._config.replicas,
            opened=self._ledger.now,
            deadline=self._ledger.now + self._config.save_timeout_s,
            basename=self._config.basename,
        )
        self.active[save.key] = save
        self._flows.start(self._run(save))
        return save

    # -- can it still succeed? ---------------------------------------------------------------------------

    def _judge(self, save: SaveState, config: JobConfig) -> None:
        if save.failure is not None:
            return
        for rank in range(save.world_size):
            if rank not in save.segments:
                proposed = all(s.trigger == "proposal" for s in save.segments.values())
                hopeless = self._hopeless(save, rank, config)
                passed = self._passed(save, rank, proposed=proposed) if hopeless is None else None
                if hopeless is not None or passed is not None:
                    # A loop that has jumped over the step takes back what it has agreed on.
                    agreed = self.decided_proposal(save.step) and passed is None
                    save.fail(hopeless or passed or "", quiet=proposed and not agreed)
                    return
        lost = self._lost_host(save, config)
        if lost is not None:
            save.fail(f"{lost}: {self.late(save)}")
        if self._settling_since is not None and self._ledger.now > self._settling_since + config.settle_timeout_s:
            save.fail(f"not finished in time for the next start of the job: {self.late(save)}")
        if self._ledger.now > save.deadline and save.stage != "committing":
            save.fail(f"not finished within {config.save_timeout_s:.0f} s: {self.late(save)}")

    def _lost_host(self, save: SaveState, config: JobConfig) -> str | None:
        """What is wrong with a host that is gone and still owes a snapshot or a shard, unless a replica serves."""
        for rank in range(save.world_size):
            segment = save.segments.get(rank)
            worker = self.worker_of(rank)
            if segment is None:
                host = self._roster.worker_hosts.get(worker or "")
                gone = self._gone(host, config) if host and worker and self._roster.worker(worker) else None
            elif any(w not in save.shards for w in writers_of(segment)):
                gone = self._gone_writer(save, rank, config)
                if gone is not None and self._take_over(save, rank, config):
                    gone = None
            else:
                gone = None
            if gone is not None:
                return gone
        return None

    def _holder(self, save: SaveState, rank: int) -> str:
        """The host that is to write a rank's snapshot."""
        held = save.taken_over.get(rank) or save.holders.get(rank)
        return held or self._roster.worker_hosts.get(self.worker_of(rank) or "", "")

    def _gone_writer(self, save: SaveState, rank: int, config: JobConfig) -> str | None:
        """Why a rank's snapshot is not written any more where it lies."""
        holder = self._holder(save, rank)
        if holder:
            return self._gone(holder, config)
        # A coordinator that was lost with the host, and started elsewhere, has heard of the copy alone.
        late = self._ledger.now > save.opened + config.host_timeout_s
        return f"the host of rank {rank} has not been heard of since the coordinator started" if late else None

    def _take_over(self, save: SaveState, rank: int, config: JobConfig) -> bool:
        """Have the copy of a rank's snapshot written, whose host is gone; False where there is none left to write."""
        replica = save.replicas.get(rank)
        if replica is None or rank in save.taken_over or self._gone(replica, config) is not None:
            return False
        save.taken_over[rank] = replica
        return True

    def _gone(self, host: str, config: JobConfig) -> str | None:
        """Why nothing more is expected of a host: Ray says it is dead, or its agent is silent for longer than any
        restart of it takes.
        """
        known = self._roster.hosts.get(host)
        if self._roster.lost(host):
            return f"{self._roster.name(host)} is gone"
        if known is not None and self._roster.host_silent(known, self._ledger.now - 2 * config.host_timeout_s):
            return f"{self._roster.name(host)} was not heard of for {2 * config.host_timeout_s:.0f} s"
        return None

    def _hopeless(self, save: SaveState, rank: int, config: JobConfig) -> str | None:
        """Why a rank without a snapshot will never have one; None while it may."""
        worker = self.worker_of(rank)
        report = self._roster.worker(worker) if worker else None
        if worker is None or report is None:
            waited = self._settling_since is not None and (
                self._ledger.now > self._settling_since + config.host_timeout_s
            )
            return f"rank {rank} has not been heard of since the coordinator started" if waited else None
        where = f"rank {rank} on {self._roster.host_name(worker)}"
        if self._roster.dead(worker):
            what = "host" if self._roster.lost(self._roster.worker_hosts.get(worker, "")) else "training process"
            return f"the {what} of {where} ended before its snapshot of step {save.step}"
        skipped = dict(report.skipped).get(save.step)
        if skipped is not None:
            return f"{where}: {skipped}"
        if report.finished and report.step <= save.step:
            return f"{where} left after step {report.step} without saving step {save.step}"
        if self._settling_since is not None and report.step <= save.step:
            return f"{where} had not taken its snapshot when the job was started again"
        return None

    def _passed(self, save: SaveState, rank: int, *, proposed: bool) -> str | None:
        """Why a rank that goes on will have no snapshot of this step; None while it may."""
        worker = self.worker_of(rank)
        report = self._roster.worker(worker) if worker else None
        if worker is None or report is None:
            return None
        where = f"rank {rank} on {self._roster.host_name(worker)}"
        if report.step > save.step:
            return f"{where} went past step {save.step} without saving it: call save() on every rank, or request_save()"
        dropped = self.dropped_at(save.step)
        if proposed and dropped is not None and self._ledger.now >= max(dropped, save.opened) + _DROPPED_S:
            # Not all loops tell when they have passed it, nor go on while a rank waits for this save.
            return f"not all ranks have agreed on step {save.step}, and {where} has no snapshot of it"
        return None

    def late(self, save: SaveState) -> str:
        """What a save waits for, for people."""
        missing = [r for r in range(save.world_size) if r not in save.segments]
        if missing:
            return f"no snapshot from rank {', '.join(map(str, missing[:8]))}"
        for rank, segment in sorted(save.segments.items()):
            open_ = [w for w in writers_of(segment) if w not in save.shards]
            if open_:
                name = self._roster.name(self._holder(save, rank))
                copy = ", from its replica" if rank in save.taken_over else ""
                return f"shard of writer {open_[0]} (rank {rank} on {name}{copy})"
        return f"storage, in stage {save.stage}" + (f" ({self._ledger.trouble})" if self._ledger.trouble else "")

    # -- the flow of one save -----------------------------------------------------------------------------

    def _run(self, save: SaveState) -> Flow:
        try:
            yield from self._claim(save)
            if save.failure is None:
                save.to("writing")
                yield Until(lambda: save.failure is not None or (save.whole and self.described(save)))
            if save.failure is None:
                problem = self.check(save)
                if problem:
                    save.fail(problem, fatal=True)
            if save.failure is None:
                yield from self._index(save)
        except IoFailedError as error:
            save.fail(f"storage: {error}")
        if save.failure is None:
            save.to("committing")
            self._ledger.submit(lambda _: self._commit_record(save), lambda record: self._committed(save, record))
            yield Until(lambda: save.failure is not None or save.stage == "committed")
        if save.stage == "committed":
            yield from self._announce(save)
        else:
            self._abort(save)

    def _claim(self, save: SaveState) -> Generator[Io, Any, None]:
        """Find a prefix that no other attempt has used or will use (see the design page, "Who may write")."""
        bare = f"{save.basename}-{save.step}"
        own = f"{save.attempt}/{bare}"
        for prefix in (bare, own) if save.step > self._ledger.head.high_water else (own,):
            # The log does not know what plain TensorFlow has put here, and whose claim it were would be swept one day.
            if prefix == bare and (yield HasIndex(bare)):
                continue
            save.prefix = prefix
            existing = yield PutClaim(self._claim_of(save))
            top = yield ReadHead()
            if top is None or top.epoch != self._ledger.epoch:
                if top is not None and top.epoch > self._ledger.epoch:
                    self._ledger.fence()
                save.fail("another coordinator has taken the directory over")
                return
            # The claim file of an older attempt may have been swept a moment ago: then the mark is high enough.
            if existing is None and (prefix == own or save.step > top.high_water):
                return

    def _claim_of(self, save: SaveState) -> Claim:
        return Claim(save.attempt, self._ledger.epoch, *save.key, save.prefix, save.order.num_shards)

    def _index(self, save: SaveState) -> Generator[Io | Until, Any, None]:
        save.to("indexing")
        metadata = yield PutMetadata(save)
        save.nbytes = yield PutIndex(save, metadata)
        yield Until(lambda: save.failure is not None or self._is_next(save))

    def _is_next(self, save: SaveState) -> bool:
        return all(s.step >= save.step for s in self.active.values() if s.failure is None)

    def _commit_record(self, save: SaveState) -> LogRecord | None:
        head = self._ledger.head
        if save.failure is not None or head.generation is None or head.generation.number != save.key[0]:
            save.fail("the job was started again before this save could commit", quiet=True)
            return None
        checkpoint = Checkpoint(
            step=save.step,
            prefix=save.prefix,
            attempt=save.attempt,
            generation=save.key[0],
            time=self._ledger.now,
            nbytes=save.nbytes,
            num_shards=save.order.num_shards,
            world_size=save.world_size,
        )
        older = tuple(replace(c, superseded=c.superseded or c.step == save.step) for c in head.live)
        save.appending = True
        return self._ledger.next_record(
            "commit",
            live=(*older, checkpoint),
            high_water=max(head.high_water, save.step),
            attempt=save.attempt,
            step=save.step,
        )

    def _committed(self, save: SaveState, record: LogRecord) -> None:
        del record
        save.to("committed")
        self._end(save, SaveOutcome(*save.key, "committed", save.prefix))

    def _announce(self, save: SaveState) -> Generator[Io, Any, None]:
        try:
            yield Committed(save)
        except IoFailedError as error:
            self._ledger.trouble = f"timeline of step {save.step}: {error}"

    def _abort(self, save: SaveState) -> None:
        save.to("failed")
        self._end(save, SaveOutcome(*save.key, "failed", error=save.failure or "", quiet=save.quiet))
        self._ledger.submit(lambda _: self._abort_record(save), lambda _: None)

    def _abort_record(self, save: SaveState) -> LogRecord:
        high_water = max(self._ledger.head.high_water, save.step)
        return self._ledger.next_record(
            "abort", high_water=high_water, attempt=save.attempt, step=save.step, reason=save.failure or ""
        )

    def _end(self, save: SaveState, outcome: SaveOutcome) -> None:
        del self.active[save.key]
        self.outcomes[save.key] = outcome
        for key in list(self.outcomes)[:-1024]:
            del self.outcomes[key]
        self.on_end(save)
