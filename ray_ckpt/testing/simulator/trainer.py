"""A training process around the real `WorkerLogic`: a loop that reads like the Checkpointer's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator
from typing import TYPE_CHECKING, TypeAlias

from ray_ckpt.protocol.messages import RestoreResult, SegmentInfo, Trigger, WorkerView
from ray_ckpt.protocol.worker import Due, WorkerLogic
from ray_ckpt.testing.simulator.host import Host
from ray_ckpt.testing.simulator.memory import Slot
from ray_ckpt.testing.simulator.reading import Read, read
from ray_ckpt.testing.simulator.world import Process
from ray_ckpt.types import Box, Layout, LeafSpec

if TYPE_CHECKING:
    from ray_ckpt.testing.simulator.job import Start

WAIT_S = 25.0
START_WAIT_S = 60.0
CLOSE_WAIT_S = 3.0
_POLL_S = 0.5
_LARGE = 20 << 20

Wait: TypeAlias = "float | Callable[[], bool]"
Thread: TypeAlias = Generator[Wait, None, None]


class TrainingError(Exception):
    """The training loop ends with an error."""


def layout(rank: int, changed: bool, large: bool) -> Layout:
    """The state of one rank: an array of its own, a replica, and one more after its structure has changed."""
    shape = (_LARGE,) if large else (4,)
    names = [f"rank{rank}/a", f"rank{rank}/b"] + ([f"rank{rank}/new"] if changed else [])
    leaves = [LeafSpec(name, "float32", shape, (Box.whole(shape),), "numpy") for name in names]
    leaves.append(LeafSpec("shared", "float32", (8,), (Box.whole((8,)),), "numpy"))
    return Layout(tuple(leaves), "{}", hashlib.blake2b(repr(leaves).encode(), digest_size=8).hexdigest())


class Trainer(Process):
    """One rank of one start of the job."""

    kind = "worker"

    def __init__(self, start: Start, rank: int, host: Host) -> None:
        super().__init__(host.world, f"worker {start.number}.{rank}", host.name)
        self.start = start
        self.rank = rank
        self.host = host
        self.scenario = self.world.scenario
        self.logic = WorkerLogic(self.name, rank, self.scenario.config(start.number))
        self.ended_well = False
        self.failure: str | None = None
        self.stopped_at: int | None = None
        self.origin: Read | None = None
        self._layout: Layout | None = None
        self.step = -1
        self.progress: int | None = None
        self._pace = self.world.rng.uniform(0.2, 0.6)
        self._deaf_until = 0.0
        host.trainers[self.name] = self
        self._wait: Wait = 0.0
        self._thread = self._main()
        self.later(self.world.rng.uniform(0.0, 0.5), self._resume)
        self.later(self.world.rng.uniform(0.0, 0.1), self._poll)

    # -- driving ----------------------------------------------------------------------------------------

    def _resume(self) -> None:
        self.world.point(self)
        try:
            self._wait = next(self._thread)
        except StopIteration:
            self._close()
            return
        except TrainingError as error:
            self.failure = str(error)
            self.world.tell("%s fails: %s", self.name, error)
            self._close()
            return
        if isinstance(self._wait, float):
            self.later(self._wait, self._resume)
        else:
            self._look()

    def _look(self) -> None:
        wait = self._wait
        if callable(wait) and wait():
            self._wait = 0.0
            self.later(0.001, self._resume)

    def _close(self) -> None:
        self.alive = False
        self.world.oracles.training.closed(self)

    def _poll(self) -> None:
        self.later(_POLL_S, self._poll)
        self.report()
        self._look()

    def report(self) -> None:
        """Tell the agent everything, as the background thread does."""
        agent = self.host.agent
        if agent is not None and agent.alive:
            report = self.logic.report()
            self.world.send(self.where, self.where, lambda: agent.on_worker(report, self))

    def on_view(self, epoch: int, version: int, view: WorkerView) -> None:
        """The coordinator's word, through the agent."""
        if not self.alive or self.world.now < self._deaf_until:
            return
        self.logic.on_view(epoch, version, view)
        self.world.oracles.training.told(self)
        if self.logic.refused is not None:
            self.failure = f"refused: {self.logic.refused}"
            self.world.tell("%s is %s", self.name, self.failure)
            self._close()
            return
        self._look()

    def cut_off(self) -> None:
        """Left over by a start that is over: it goes on, more slowly, and may not hear for a while that it is."""
        self.world.tell("%s goes on as a zombie", self.name)
        self._pace *= self.world.rng.choice((1.0, 3.0, 8.0))
        seconds = self.world.rng.choice((0.0, 3.0, 8.0))
        self._deaf_until = self.world.now + seconds
        if self.world.faulty("partition", 0.5):
            self.world.deafen(self.where, seconds)

    # -- the training thread ------------------------------------------------------------------------------

    def _main(self) -> Thread:
        self.logic.wish(self.scenario.wish(self.start.number))
        self.report()
        yield from self._restore()
        self._layout = layout(self.rank, False, self.scenario.two_writers)
        self.logic.set_layout(self._layout)
        self.report()
        self.progress = self.logic.restored_step or 0
        first = self.progress + 1
        for step in range(first, self.scenario.steps + 1, self.scenario.stride):
            yield self._pace * self.world.rng.uniform(0.5, 1.5)
            yield lambda step=step: self.start.may_enter(step)  # type: ignore[misc]
            self.step = self.progress = step
            yield from self._save(step, "explicit" if step in self.scenario.explicit else None)
            if self.stopped_at is not None:
                break
        yield from self._finish()

    def _restore(self) -> Thread:
        known: tuple[int, int] | None = None
        give_up = self.world.now + START_WAIT_S
        while not self.logic.restore_done:
            yield lambda known=known: self._restore_news(known) or self.world.now > give_up  # type: ignore[misc]
            self._check()
            if self.world.now > give_up:
                raise TrainingError(f"no start within {START_WAIT_S} s: {self.logic.late}")
            decision = self.logic.restore
            if decision is None or decision.key == known:
                continue
            known = decision.key
            self.origin = yield from read(self, decision)
            self.world.oracles.training.read(self, decision, self.origin)
            if self.logic.restore is decision:
                self.logic.restore_read(RestoreResult(*decision.key, self.origin.damage))
                self.report()
        self.world.oracles.training.started(self)

    def _restore_news(self, known: tuple[int, int] | None) -> bool:
        decision = self.logic.restore
        news = decision is not None and decision.key != known
        return news or self.logic.restore_done or self.logic.error is not None

    def _check(self) -> None:
        if self.logic.error is not None:
            raise TrainingError(self.logic.error.text)

    def _save(self, step: int, ask: Trigger | None) -> Thread:
        self._check()
        due = self.logic.arrive(step, ask=ask)
        if due is None:
            return
        if due.snapshot == "memory":
            yield from self._remember(due.step)
        elif due.snapshot is not None:
            yield from self._snapshot(due.step, due.snapshot)
        if due.stop is not None:
            yield from self._stop(due)

    def _stop(self, due: Due) -> Thread:
        stop = due.stop
        assert stop is not None
        yield lambda: self.logic.stop_state(stop) != "open"
        if self.logic.stop_state(stop) == "decided":
            self.stopped_at = due.step
            if stop.error is not None:
                raise TrainingError(stop.error)

    def _remember(self, step: int) -> Thread:
        """A snapshot for a restart alone: only where plan and memory are at hand."""
        # With copies, one is not given up that has its copies for one that has none yet.
        loose = self.logic.loose if self.scenario.replicas else None
        mine, slot = self._layout_at(step), self._free_slot(loose)
        if mine == self._layout and self.logic.plan_ready is not None and slot is not None:
            yield from self._fill(slot, mine, step, "memory")

    def _layout_at(self, step: int) -> Layout:
        changed = self.scenario.change_at is not None and step >= self.scenario.change_at
        return layout(self.rank, changed, self.scenario.two_writers)

    def _snapshot(self, step: int, trigger: Trigger) -> Thread:
        mine = self._layout_at(step)
        if mine != self._layout:
            self._layout = mine
            self.logic.set_layout(mine)
        if self.logic.plan_ready is None:
            self.logic.await_plan(step)
            self.report()
        yield from self._wait_for(lambda: self.logic.plan_ready is not None, step, trigger, "a plan")
        if self.logic.plan_ready is None:
            return
        yield from self._wait_for(lambda: self._free_slot() is not None, step, trigger, "memory")
        slot = self._free_slot()
        if slot is not None:
            yield from self._fill(slot, mine, step, trigger)

    def _wait_for(self, ready: Callable[[], bool], step: int, trigger: Trigger, what: str) -> Thread:
        """Wait until it is there, or the snapshot is not needed any more, or for too long."""
        logic, give_up = self.logic, self.world.now + WAIT_S
        yield lambda: ready() or logic.is_off(step, trigger) or logic.error is not None or self.world.now > give_up
        self._check()
        if ready():
            return
        if logic.is_off(step, trigger):
            logic.go_on()
        else:
            logic.skip(step, f"no {what} for {WAIT_S} s")

    def _free_slot(self, loose: Collection[tuple[int, int]] | None = None) -> Slot | None:
        slots = self.host.slots_of(self.rank, self.scenario.slots)
        free = [slot for slot in slots if slot.free and (loose is None or slot.info is None or slot.info.save in loose)]
        return min(free, key=lambda slot: (slot.state == "kept", slot.sealed_at), default=None)

    def _fill(self, slot: Slot, mine: Layout, step: int, trigger: Trigger) -> Thread:
        self.world.oracles.memory.filling(self.host, slot)
        slot.begin(self)
        plan, generation = self.logic.plan, self.logic.generation
        assert plan is not None
        assert generation is not None
        yield self.world.rng.uniform(0.01, 0.1)
        token = self.world.oracles.commits.taken(self, step, mine)
        rows = [[mine.leaves[c.leaf].name, list(c.box.offset), list(c.box.shape), token] for c in plan.copies]
        info = SegmentInfo(
            rank=self.rank,
            generation=generation,
            step=step,
            world_size=self.logic.config.world_size,
            plan_id=plan.plan_id,
            trigger=trigger,
            writers=len(plan.writers),
            writer_base=plan.writer_base,
            num_writers=plan.num_writers,
            fingerprint=mine.fingerprint,
            digests=tuple((mine.leaves[leaf].name, step) for leaf in plan.checks),
            name=slot.name,
            directory=self.logic.directory,
        )
        keep = trigger == "memory" and not self.scenario.replicas
        slot.seal(info, mine, [rows[w.first : w.stop] for w in plan.writers], self.world.now, keep=keep)
        self.world.tell("%s sealed step %d of generation %d (%s)", self.name, step, generation, trigger)
        self.world.oracles.memory.sealed(self.host, slot)
        if trigger != "memory":
            self.logic.snapshotted(step, trigger)
        self.report()

    def _finish(self) -> Thread:
        # What was restored from memory is not in the store yet.
        last = self.step if self.step >= 0 else self.logic.restored_step
        if last is not None:
            yield from self._save(last, "final")
        self.logic.finish()
        self.report()
        yield lambda: not self.logic.undecided and not self.waiting_requests
        outcome = self.logic.outcomes.get(last) if last is not None else None
        self.logic.finish(closed=outcome is None or outcome.state == "committed")
        self.world.oracles.memory.leaving(self)
        self.report()
        give_up = self.world.now + CLOSE_WAIT_S
        yield lambda: self._heard_of_finish() or self.world.now > give_up
        self.ended_well = True
        self.world.tell("%s finished at step %d", self.name, self.step)

    @property
    def waiting_requests(self) -> list[str]:
        """Requests of this worker without an outcome."""
        return [r for r in self.start.requests.get(self.name, []) if r not in self.logic.request_outcomes]

    def _heard_of_finish(self) -> bool:
        agent = self.host.agent
        known = agent.logic.workers.get(self.name) if agent is not None else None
        return known is not None and known.finished and known.closed == self.logic.closed
