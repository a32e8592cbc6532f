"""One host: its snapshot memory, its agent around the real `HostLogic`, and the writers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_ckpt.bundle import shard_name
from ray_ckpt.protocol.host import Free, HostLogic, Keep, Mirror, StartWrite
from ray_ckpt.protocol.messages import HostView, WorkerReport
from ray_ckpt.testing.simulator.actions import encode_shard, shard_run
from ray_ckpt.testing.simulator.memory import Slot
from ray_ckpt.testing.simulator.mirror import Asked
from ray_ckpt.testing.simulator.world import Process, World
from ray_ckpt.types import ShardReport

if TYPE_CHECKING:
    from ray_ckpt.testing.simulator.coordinator import Coordinator
    from ray_ckpt.testing.simulator.trainer import Trainer

BEAT_S = 0.5


class Host:
    """A machine. ``coordinator`` is the one its agent talks to at present."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.name = f"host{number}"
        self.gone = False
        self.slots: dict[str, Slot] = {}
        self.trainers: dict[str, Trainer] = {}
        self.coordinator: Coordinator | None = None
        self.agent: Agent | None = None
        self._incarnations = 0

    def start_agent(self) -> None:
        """Start the agent, again after the last one died."""
        self._incarnations += 1
        self.agent = Agent(self, self._incarnations)

    def slots_of(self, rank: int, count: int) -> list[Slot]:
        """The segments of a rank, made if they are not there."""
        for number in range(count):
            self.add_slot(rank, str(number))
        return [slot for slot in self.slots.values() if slot.rank == rank and not slot.replica]

    def copies_of(self, rank: int) -> list[Slot]:
        """The segments with copies of what a rank on another host took."""
        return [slot for slot in self.slots.values() if slot.rank == rank and slot.replica]

    def add_slot(self, rank: int, mark: str, *, replica: bool = False) -> Slot:
        """The segment of this name, made if it is not there."""
        name = f"{self.name}/r{rank}.{mark}"
        return self.slots.setdefault(name, Slot(name, rank, replica))

    def find(self, rank: int, save: tuple[int, int], asker: str) -> Slot | None:
        """What this host's agent answers who asks for a rank's snapshot: the own one before a copy."""
        if self.gone or self.agent is None or not self.agent.alive or not self.world.talks(self.name, asker):
            return None
        held = [s for s in self.slots.values() if s.whole and s.info and (s.info.rank, s.info.save) == (rank, save)]
        return min(held, key=lambda slot: slot.replica, default=None)

    def lose(self) -> None:
        """The machine is gone with all that ran and lay on it."""
        self.gone = True
        for trainer in self.trainers.values():
            trainer.kill()
        if self.agent is not None:
            self.agent.kill()
        self.slots.clear()


class Agent(Process):
    """The host agent: reports in beats, starts writers, frees segments."""

    kind = "agent"

    def __init__(self, host: Host, incarnation: int) -> None:
        super().__init__(host.world, f"agent {host.name}.{incarnation}", host.name)
        self.host = host
        self.logic = HostLogic(host.name, f"{incarnation:06d}", max_writes=2)
        self.writers: set[Writer] = set()
        self._kicked = False
        self.later(0.01, self._beat)

    def kill(self) -> None:
        """Its writer tasks mostly die with it; some go on as zombies."""
        super().kill()
        for writer in sorted(self.writers, key=lambda w: w.name):
            if not self.host.gone and self.world.faulty("zombie_writer", 0.7):
                writer.lag_s = 3.0
            else:
                writer.kill()
        self.world.at(self.world.rng.uniform(0.2, 1.0), self._start_again)

    def _start_again(self) -> None:
        if not self.host.gone:
            self.host.start_agent()

    def _beat(self) -> None:
        self.later(BEAT_S * self.world.rng.uniform(0.8, 1.2), self._beat)
        self.act()

    def kick(self) -> None:
        """Something has changed: act and report soon."""
        if not self._kicked:
            self._kicked = True
            self.later(0.02, self._kick)

    def _kick(self) -> None:
        self._kicked = False
        self.act()

    def act(self) -> None:
        """Look around, do what is to be done, report."""
        self.world.point(self)
        self._notice_dead()
        sealed = [slot for slot in self.host.slots.values() if slot.whole]
        self.logic.on_segments(
            [replace(slot.info, fills=slot.fills, kept=slot.state == "kept") for slot in sealed if slot.info],
            {slot.layout.fingerprint: slot.layout for slot in sealed if slot.layout},
        )
        for action in self.logic.take():
            self.world.point(self)
            if isinstance(action, Free):
                self._free(action)
            elif isinstance(action, Keep):
                self._keep(action)
            elif isinstance(action, Mirror):
                Asked(self, action)
            else:
                self._write(action)
        self._report()

    def _notice_dead(self) -> None:
        for name in list(self.logic.workers):
            if not self.host.trainers[name].alive:
                self.logic.on_worker_dead(name)

    def _report(self) -> None:
        target = self.host.coordinator
        if target is None or not target.alive:
            return
        report = self.logic.report()
        self.world.send(self.where, target.where, lambda: target.on_report(report, self))
        self.world.point(self)

    def on_view(self, view: HostView) -> None:
        """The coordinator's answer."""
        if self.alive:
            self.world.point(self)
            before = self.logic.view
            self.logic.on_view(view)
            after = self.logic.view
            if before is None or after is None or after.workers != before.workers:
                for name in self.logic.workers:
                    self._tell(self.host.trainers[name])
            if before is None or after is None or _to_do(after) != _to_do(before):
                self.kick()

    def on_worker(self, report: WorkerReport, trainer: Trainer) -> None:
        """A training process on this host reports; it is answered with its view."""
        if not self.alive:
            return
        self.world.point(self)
        known = self.logic.workers.get(report.worker)
        self.logic.on_worker(report)
        self._tell(trainer)
        if known is None or replace(report, sequence=0, step=0) != replace(known, sequence=0, step=0):
            self.kick()

    def _tell(self, trainer: Trainer) -> None:
        view = self.logic.worker_view(trainer.name)
        if view is not None:
            self.world.send(self.where, self.where, lambda: trainer.on_view(*view))

    def _free(self, action: Free) -> None:
        slot = self.host.slots.get(action.segment.name)
        if slot is not None and slot.whole and slot.fills == action.segment.fills:
            self.world.oracles.memory.freed(slot, action.segment, self)
            slot.release()
        self.logic.on_freed(action.segment.name)

    def _keep(self, action: Keep) -> None:
        slot = self.host.slots.get(action.segment.name)
        if slot is not None and slot.state == "sealed" and slot.fills == action.segment.fills:
            self.world.oracles.memory.kept(slot, action.segment, self)
            slot.state = "kept"

    def _write(self, start: StartWrite) -> None:
        slot = self.host.slots.get(start.segment.name)
        if slot is None or not slot.whole or slot.fills != start.segment.fills:
            self.logic.on_write_failed(start, "the snapshot is gone", final=True)
            return
        number = slot.next_try(start.local, start.order.epoch)
        if number is None or number >= start.order.max_tries:
            self.logic.on_write_failed(start, "no try is left", final=True)
            return
        self.writers.add(Writer(self, slot, start, number))


def _to_do(view: HostView) -> tuple[Any, ...]:
    return view.orders, view.decided, view.kept_from, view.peer


class Writer(Process):
    """A writer task: reads its range of the segment, checks that it still holds the same snapshot, puts the shard."""

    kind = "writer"

    def __init__(self, agent: Agent, slot: Slot, start: StartWrite, number: int) -> None:
        name = f"writer {start.writer} of {start.order.attempt} try {number} on {agent.where}"
        super().__init__(agent.world, name, agent.where)
        self.agent = agent
        self._slot = slot
        self._start = start
        self._number = number
        self._fills = slot.fills
        slot.users.add(self)
        self.later(self.world.rng.uniform(0.01, 0.2) + self.world.scenario.write_s, self._read)

    def kill(self) -> None:
        """Let go of the segment; the agent hears of it."""
        if self.alive:
            super().kill()
            self._fail("the writer died")

    def _tell_agent(self, tell: Any) -> None:
        agent = self.agent

        def deliver() -> None:
            if agent.alive:
                agent.writers.discard(self)
                tell(agent.logic)
                agent.kick()

        self.world.at(0.01, deliver)

    def _read(self) -> None:
        self.world.point(self)
        if not self._holds():
            self._fail("the snapshot has been replaced", final=True)
            return
        order = self._start.order
        data = encode_shard(self._slot.contents[self._start.local])
        shard_id = self._start.shard_id(self._number)
        path = shard_name(order.prefix, shard_id, order.num_shards)
        self.use_store(lambda store: store.put(path, data), lambda result: self._put(result, path, shard_id, data))

    def _holds(self) -> bool:
        return self._slot.whole and self._slot.fills == self._fills

    def _put(self, result: Any, path: str, shard_id: int, data: bytes) -> None:
        if isinstance(result, Exception):
            self._fail(str(result))
            return
        start = self._start
        report = ShardReport(
            start.order.attempt,
            start.writer,
            self._number,
            shard_id,
            path,
            len(data),
            shard_run(data),
            b"",
            0.1,
            self.where,
        )
        self._end(lambda logic: logic.on_written(start, report))

    def _fail(self, error: str, *, final: bool = False) -> None:
        final = final or self._number + 1 >= self._start.order.max_tries
        self._end(lambda logic: logic.on_write_failed(self._start, error, final=final))

    def _end(self, tell: Any) -> None:
        self.alive = False
        self._slot.users.discard(self)
        self._tell_agent(tell)
