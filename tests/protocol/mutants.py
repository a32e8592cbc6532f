"""Planted bugs, each a small patch of the real protocol or of what surrounds it. The simulation must find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ray_ckpt.protocol import generation as generation_module
from ray_ckpt.protocol import host as host_module
from ray_ckpt.protocol import views as views_module
from ray_ckpt.protocol.choice import Choice
from ray_ckpt.protocol.cut import Cut
from ray_ckpt.protocol.flows import Append, DeleteClaim, DeleteData, DeleteIndex, IoFailedError, PutClaim, Until
from ray_ckpt.protocol.host import HostLogic
from ray_ckpt.protocol.keeper import Keeper
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import SegmentInfo
from ray_ckpt.protocol.recall import Recall, Snapshot
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.protocol.saves import Saves
from ray_ckpt.protocol.views import Views
from ray_ckpt.protocol.worker import WorkerLogic
from ray_ckpt.testing.simulator.disk import Disk, Op
from ray_ckpt.testing.simulator.host import Writer
from ray_ckpt.testing.simulator.memory import Slot
from ray_ckpt.testing.simulator.mirror import Copy

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """``oracles``: who may find it. ``seed``: where to look first, since some bugs show in few runs only."""

    name: str
    patch: Patch
    oracles: tuple[str, ...]
    seed: int


MUTANTS: list[Mutant] = []


def mutant(*oracles: str, seed: int = 0) -> Callable[[Patch], Patch]:
    """Register a patch under its function's name."""

    def register(patch: Patch) -> Patch:
        MUTANTS.append(Mutant(patch.__name__, patch, oracles, seed))
        return patch

    return register


@mutant("commits")
def commit_before_all_shards_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = property(lambda self: self.sealed and len(self.shards) >= self.num_writers - 1)
    monkeypatch.setattr(SaveState, "whole", whole)


@mutant("commits", "crash of the code")
def commit_before_all_ranks_have_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaveState, "sealed", property(lambda self: bool(self.segments)))
    monkeypatch.setattr(SaveState, "whole", property(lambda self: len(self.shards) >= len(self.segments)))


@mutant("files")
def reuse_a_claimed_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    def claim(self: Saves, save: SaveState) -> Any:
        save.prefix = f"model.ckpt-{save.step}"
        yield PutClaim(self._claim_of(save))

    monkeypatch.setattr(Saves, "_claim", claim)


@mutant("training", "quiet", "progress", seed=1117)
def vote_for_a_step_that_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def vote(self: WorkerLogic, proposal: Any) -> None:
        self._accepted[proposal.id] = proposal

    monkeypatch.setattr(WorkerLogic, "_vote", vote)


@mutant("training", "quiet", "progress", seed=771)
def decide_a_step_that_one_rank_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Cut._tally

    def tally(self: Cut, proposal: Any, world_size: int, reports: Any, gone: Any) -> None:
        original(self, proposal, 1, reports, gone)

    monkeypatch.setattr(Cut, "_tally", tally)


@mutant("commits", "files", seed=49)
def mix_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    save_of = Saves._save_of

    def any_generation(self: Saves, segment: SegmentInfo) -> SaveState | None:
        same_step = (s for s in self.active.values() if s.step == segment.step)
        return next(same_step, None) or save_of(self, segment)

    monkeypatch.setattr(Saves, "_save_of", any_generation)

    def startable(self: HostLogic, orders: Any) -> Any:
        for order in orders:
            for segment in self._segments.values():
                if segment.step == order.step and segment.plan_id == order.plan_id:
                    for local in range(segment.writers):
                        start = host_module.StartWrite(segment, local, order)
                        if self._wanted(start):
                            self._writing.add((segment.name, local))
                            yield start

    monkeypatch.setattr(HostLogic, "_startable", startable)
    monkeypatch.setattr(HostLogic, "_settled", lambda self, segment, view: segment.step in {s for _, s in view.decided})


@mutant("log")
def commit_a_save_of_the_last_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saves, "begin", lambda self, config: setattr(self, "_settling_since", None))
    monkeypatch.setattr(Saves, "settled", True)
    original = Saves._commit_record

    def commit_record(self: Saves, save: SaveState) -> Any:
        key, number = save.key, self._generation
        save.key = (number, key[1])
        record = original(self, save)
        save.key = key
        if record is None:
            return None
        last = record.live[-1]
        return replace(record, live=(*record.live[:-1], replace(last, generation=key[0])))

    monkeypatch.setattr(Saves, "_commit_record", commit_record)


@mutant("memory", seed=57)
def free_a_segment_under_its_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HostLogic.take

    def take(self: HostLogic) -> Any:
        writing, self._writing = self._writing, set()
        actions = original(self)
        self._writing |= writing
        starts = host_module.StartWrite
        return [a for a in actions if not isinstance(a, starts) or (a.segment.name, a.local) not in writing]

    monkeypatch.setattr(HostLogic, "take", take)


@mutant("commits", "memory")
def write_what_the_segment_holds_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "_holds", lambda self: bool(self._slot.contents))
    monkeypatch.setattr(Slot, "free", property(lambda self: self.state != "filling"))


@mutant("files")
def forget_the_tries_when_the_agent_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "next_try", lambda self, writer, order: 0)


@mutant("files", "tensorflow")
def delete_data_before_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Keeper._delete_record

    def delete_record(self: Keeper, judged: Any, head: Any, config: Any, protected: Any) -> Any:
        for victim in self._choose(head, config, protected).deleted:
            self._flows.start(self._ledger.retry(DeleteData(victim.prefix, victim.attempt, victim.num_shards)))
        return original(self, judged, head, config, protected)

    monkeypatch.setattr(Keeper, "_delete_record", delete_record)


@mutant("files", "tensorflow")
def delete_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def until_unused(self: Keeper, prefix: str) -> Any:
        yield Until(lambda: True)

    monkeypatch.setattr(Keeper, "_until_unused", until_unused)


@mutant("log")
def commit_again_after_a_lost_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    retry = Ledger.retry

    def hasty(self: Ledger, io: Any) -> Any:
        if not isinstance(io, Append) or io.record.kind != "commit":
            return (yield from retry(self, io))
        try:
            return (yield io)
        except IoFailedError:
            self._head = io.record
            return (yield from retry(self, Append(self.next_record("commit", attempt=io.record.attempt))))

    monkeypatch.setattr(Ledger, "retry", hasty)


@mutant("log", "training")
def choose_before_saves_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saves, "settled", True)


@mutant("log")
def commit_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saves, "_is_next", lambda self, save: True)


@mutant("training")
def take_a_superseded_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    original = generation_module.choose

    def choose(live: Any, recall: Any, wish: Any, bad: Any = (), tried: Any = None) -> Any:
        chosen = original(live, recall, wish, bad, tried)
        if wish.kind == "newest" and chosen.snapshot is None:
            return Choice(next((c for c in reversed(live) if c.prefix not in bad), None))
        return chosen

    monkeypatch.setattr(generation_module, "choose", choose)


@mutant("tensorflow", "quiet", seed=737)
def overwrite_the_checkpoint_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_if(self: Disk, op: Op, actor: str, _: int) -> bool:
        self._set(op, actor, op.data)
        return True

    monkeypatch.setattr(Disk, "_replace_if", replace_if)


@mutant("files")
def sweep_a_claim_before_the_mark_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep_one(self: Keeper, claim: Any) -> Any:
        yield from self._ledger.retry(DeleteIndex(claim.prefix))
        yield from self._ledger.retry(DeleteData(claim.prefix, claim.attempt, claim.num_shards))
        yield from self._ledger.retry(DeleteClaim(claim.prefix))

    monkeypatch.setattr(Keeper, "_sweep_one", sweep_one)


@mutant("files", "commits")
def sweep_saves_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_orphan(self: Keeper, claim: Any, before: float) -> bool:
        head = self._ledger.head
        return claim.prefix not in {c.prefix for c in head.live} | {d.checkpoint.prefix for d in head.dying}

    monkeypatch.setattr(Keeper, "_is_orphan", is_orphan)


@mutant("log")
def carry_on_when_fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(self: Ledger) -> Any:
        yield from self._claim()
        while True:
            yield Until(lambda: bool(self._queue))
            build, done = self._queue.popleft()
            record = build(self.head)
            while record is not None:
                won, top = yield from self.retry(Append(record))
                if won:
                    self._head = record
                    self._state_dirty = True
                    done(record)
                    break
                record = replace(record, sequence=top.sequence + 1)

    monkeypatch.setattr(Ledger, "_serve", serve)


@mutant("quiet")
def forget_to_tell_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saves, "_hopeless", lambda self, save, rank, config: None)
    monkeypatch.setattr(
        Views,
        "_outcomes",
        lambda self, report, worker, generation: tuple(
            o
            for s in worker.pending
            if (o := self._saves.outcome((generation, s))) is not None and o.state == "committed"
        ),
    )


@mutant("quiet", "training", "progress", "crash of the code", seed=315)
def tell_before_conclusions_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Views, "suspend", lambda self: None)
    monkeypatch.setattr(Views, "touch", lambda self, host: self._touched.add(host))


@mutant("recall", "training", "commits", "memory")
def restore_an_incomplete_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "complete", property(lambda self: bool(self.parts)))


@mutant("recall")
def restore_a_snapshot_older_than_the_newest_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recall.newer_than
    monkeypatch.setattr(Recall, "newer_than", lambda self, checkpoint, tried=None: original(self, None, tried))


@mutant("recall")
def restore_a_snapshot_of_any_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer_than(self: Recall, checkpoint: Any, tried: Any = None) -> Any:
        newest = max((s for s in self.whole if tried is None or s < tried), key=lambda s: s[1], default=None)
        return newest if newest and (checkpoint is None or checkpoint.step < newest[1]) else None

    monkeypatch.setattr(Recall, "newer_than", newer_than)


@mutant("files")
def write_copies_under_the_numbers_of_their_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host_module.StartWrite, "shard_id", lambda self, number: number * self.order.num_writers + self.writer
    )
    original = SaveState.order_for

    def order_for(self: SaveState, report: Any) -> Any:
        return replace(original(self, report), replicas=tuple(range(self.world_size)))

    monkeypatch.setattr(SaveState, "order_for", order_for)


@mutant("memory")
def give_up_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HostLogic.take

    def take(self: HostLogic) -> Any:
        actions = original(self)
        writing = {name for name, _ in self._writing}
        return [*actions, *(host_module.Keep(s) for s in self._segments.values() if s.name in writing and not s.kept)]

    monkeypatch.setattr(HostLogic, "take", take)


@mutant("memory")
def free_what_is_older_than_any_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept_from(self: Views) -> tuple[int, int]:
        return max((save for _, save, _ in self._roster.snapshots()), default=(0, 0))

    monkeypatch.setattr(Views, "_find_kept_from", kept_from)


@mutant("memory")
def free_what_has_copies_for_what_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recall, "newest_settled", property(lambda self: self.newest))


@mutant("memory")
def have_each_host_copy_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "peers", lambda domains: {host: host for host in domains})


@mutant("memory")
def seal_a_copy_before_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copy, "complete", property(lambda self: bool(self._pieces)))


@mutant("saving")
def leave_copies_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saves, "_take_over", lambda self, save, rank, config: False)


@mutant("recall")
def keep_nothing_for_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recall, "newer_than", lambda self, checkpoint, tried=None: None)
