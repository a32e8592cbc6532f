"""A small, fault-free world around the pure machines, for tests that need one precise schedule.

The simulator meets schedules at random; here a test says what happens when. Storage is a dict, time stands still
unless a test moves it, and every host reports when it is told to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray_ckpt.protocol import flows
from ray_ckpt.protocol.coordinator import CoordinatorLogic
from ray_ckpt.protocol.host import Free, HostLogic, Keep, Mirror
from ray_ckpt.protocol.messages import JobConfig, RestoreResult, RestoreWish, SegmentInfo, Trigger
from ray_ckpt.protocol.worker import WorkerLogic
from ray_ckpt.types import Box, Claim, Layout, LeafSpec, LogRecord, ShardReport

ROWS = 64
NEWEST = RestoreWish("newest")


def layout(rank: int, world_size: int) -> Layout:
    """One array, cut over all ranks."""
    box = Box((ROWS * rank,), (ROWS,))
    return Layout((LeafSpec("w", "float32", (ROWS * world_size,), (box,), "numpy"),), "{}", f"layout-{rank}")


def shard(attempt: str, writer: int) -> ShardReport:
    """A finished shard."""
    return ShardReport(attempt, writer, 0, writer, f"data-{writer}", 1, b"", b"", 0.0, "")


class World:
    """Storage, time and the coordinator. ``hung`` says which I/O never ends, ``agents`` the hosts that Ray knows of."""

    def __init__(self) -> None:
        self._owners = itertools.count()
        self.log: list[LogRecord] = []
        self.claims: dict[str, Claim] = {}
        self.deleted: list[str] = []
        self.now = 0.0
        self.hung: Callable[[flows.Io], bool] = lambda _: False
        self.agents: dict[str, str] = {}
        self.restart_coordinator()

    def restart_coordinator(self) -> None:
        """All that the coordinator held in memory is gone."""
        self.coordinator = CoordinatorLogic("memory://run", f"owner {next(self._owners)}")
        self.coordinator.start(self.now)
        self._pump()

    @property
    def committed(self) -> list[int]:
        """The steps that the log lists."""
        return [c.step for c in self.log[-1].live]

    def tick(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.coordinator.on_tick(self.now)
        self._pump()

    def exchange(self, host: Host) -> None:
        """A host's report up, its view down to host and workers."""
        self.coordinator.on_report(host.logic.report(), self.now)
        self._pump()
        view = self.coordinator.view(host.logic.host)
        if view is not None:
            host.logic.on_view(view)
        for worker in host.workers:
            answer = host.logic.worker_view(worker.worker)
            if answer is not None:
                worker.on_view(*answer)

    def _pump(self) -> None:
        while actions := self.coordinator.take():
            for io_id, io in actions:
                if not self.hung(io):
                    self.coordinator.on_io(io_id, self._execute(io), self.now)

    def _execute(self, io: flows.Io) -> Any:
        match io:
            case flows.ReadHead():
                return self.log[-1] if self.log else None
            case flows.Append(record):
                if self.log and record.sequence <= self.log[-1].sequence:
                    return False, self.log[-1]
                self.log.append(record)
                return True, record
            case flows.PutClaim(claim):
                held = self.claims.setdefault(claim.prefix, claim)
                return None if held == claim else held
            case flows.PutMetadata(save):
                return shard(save.attempt, save.num_writers)
            case flows.PutIndex():
                return 10
            case flows.HasIndex():
                return False
            case flows.ListClaims():
                return tuple(self.claims.values())
            case flows.DeleteData(prefix):
                self.deleted.append(prefix)
            case flows.DeleteClaim(prefix):
                self.claims.pop(prefix, None)
            case flows.ReadForeign() | flows.ListPins() | flows.ReadState():
                return frozenset()
            case flows.ListAgents():
                return self.agents
        return None


class Host:
    """One host: its agent, its workers and its snapshot memory.

    ``writes``: whether shards get written; ``mirrors``: what a peer was to copy.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.logic = HostLogic(name, "1", name=name)
        self.workers: list[WorkerLogic] = []
        self.segments: dict[str, SegmentInfo] = {}
        self.mirrors: list[Mirror] = []
        self.writes = True

    def beat(self) -> None:
        """Take the workers' reports in, look at the memory, act, and speak with the coordinator."""
        for worker in self.workers:
            self.logic.on_worker(worker.report())
        self.logic.on_segments(self.segments.values())
        for action in self.logic.take():
            if isinstance(action, Free):
                del self.segments[action.segment.name]
                self.logic.on_freed(action.segment.name)
            elif isinstance(action, Keep):
                self.segments[action.segment.name] = replace(action.segment, kept=True)
            elif isinstance(action, Mirror):
                self.mirrors.append(action)
            elif self.writes:
                self.logic.on_written(action, shard(action.order.attempt, action.writer))
        self.world.exchange(self)

    def seal(self, worker: WorkerLogic, step: int, trigger: Trigger = "cadence") -> None:
        """The worker's snapshot of this step lies in memory."""
        plan, name = worker.plan, f"{worker.worker}-{step}"
        assert plan is not None
        assert worker.generation is not None
        self.segments[name] = SegmentInfo(
            rank=worker.rank,
            generation=worker.generation,
            step=step,
            world_size=worker.config.world_size,
            plan_id=plan.plan_id,
            trigger=trigger,
            writers=len(plan.writers),
            writer_base=plan.writer_base,
            num_writers=plan.num_writers,
            fingerprint=f"layout-{worker.rank}",
            name=name,
            directory=worker.directory,
        )
        worker.snapshotted(step, trigger)


class Job:
    """One start of a job: a worker on a host for each rank."""

    def __init__(self, world: World, config: JobConfig, name: str, wish: RestoreWish = NEWEST) -> None:
        self.world = world
        self.hosts = [Host(world, f"{name}-host{rank}") for rank in range(config.world_size)]
        self.workers = [WorkerLogic(f"{name}{rank}", rank, config) for rank in range(config.world_size)]
        for host, worker in zip(self.hosts, self.workers, strict=True):
            worker.wish(wish)
            host.workers.append(worker)

    def start(self) -> Job:
        """Join, restore, register the state: ready to train."""
        beat(self.world, self.hosts)
        for worker in self.workers:
            assert worker.restore is not None
            worker.restore_read(RestoreResult(*worker.restore.key))
        beat(self.world, self.hosts)
        for worker in self.workers:
            worker.set_layout(layout(worker.rank, worker.config.world_size))
        beat(self.world, self.hosts)
        assert all(w.restore_done and w.plan_ready for w in self.workers)
        return self

    def step(self, step: int) -> None:
        """Every rank completes a step, and saves it if that is due."""
        for host, worker in zip(self.hosts, self.workers, strict=True):
            due = worker.arrive(step)
            if due is not None and due.snapshot is not None:
                host.seal(worker, step, due.snapshot)

    def die(self) -> None:
        """All training processes are killed."""
        for host, worker in zip(self.hosts, self.workers, strict=True):
            host.logic.on_worker_dead(worker.worker)
            host.workers.remove(worker)


def beat(world: World, hosts: Sequence[Host], rounds: int = 6) -> None:
    """Let all hosts speak a few times, a moment apart."""
    for _ in range(rounds):
        for host in hosts:
            host.beat()
        world.tick(0.2)
