"""The job: starts of it one after the other, its driver's requests, and readers in other jobs."""

from __future__ import annotations

import json
from collections import defaultdict

from ray_ckpt import log
from ray_ckpt.storage import Store
from ray_ckpt.testing.simulator.coordinator import Head
from ray_ckpt.testing.simulator.host import Host
from ray_ckpt.testing.simulator.rule import damage_of
from ray_ckpt.testing.simulator.trainer import Trainer
from ray_ckpt.testing.simulator.world import Process, Violation, World
from ray_ckpt.types import PRIVATE_DIR

MAX_STARTS = 8


def dispose(trainer: Trainer) -> None:
    """Kill a process of a start that is over, unless it cannot be reached."""
    if trainer.world.faulty("zombie_worker", 0.6):
        trainer.cut_off()
    else:
        trainer.kill()


class Start:
    """The processes of one start of the job."""

    def __init__(self, world: World, number: int, hosts: list[Host]) -> None:
        self.world = world
        self.number = number
        self.begun = world.now
        self.over = False
        self.requests: dict[str, list[str]] = defaultdict(list)
        size = world.scenario.config(number).world_size
        world.wish = world.scenario.wish(number)
        hosts = [host for host in hosts if world.hears(host.name)] or hosts
        if world.scenario.moving:
            hosts = world.rng.sample(hosts, world.rng.randint(1, len(hosts)))
        shift = world.rng.randrange(len(hosts))
        self.trainers = [Trainer(self, rank, hosts[(rank + shift) % len(hosts)]) for rank in range(size)]
        world.cluster.placed = [trainer.where for trainer in self.trainers]

    def may_enter(self, step: int) -> bool:
        """Whether the collectives before this step are through; nothing holds back what has been cut off."""
        slack = self.world.scenario.slack
        if slack is None or self.over:
            return True
        room = (slack + 1) * self.world.scenario.stride
        return all(t.progress is not None and step <= t.progress + room for t in self.trainers)

    @property
    def done(self) -> bool:
        """All ranks have ended without an error."""
        return all(t.ended_well for t in self.trainers)

    @property
    def broken(self) -> bool:
        """Some rank has died or failed."""
        return any(not t.alive and not t.ended_well for t in self.trainers)

    def end(self) -> None:
        """Kill what still runs; what is behind a partition goes on."""
        self.over = True
        for trainer in self.trainers:
            if trainer.alive:
                dispose(trainer)


class Job:
    """Restarts the job until a start of it ends well."""

    def __init__(self, world: World, head: Head) -> None:
        self.world = world
        self.head = head
        self.starts: list[Start] = []
        self.finished_at: float | None = None
        self.driver_requests: dict[str, float] = {}
        self.answered: set[str] = set()
        self._start()
        world.at(0.3, self._watch)
        scenario = world.scenario
        for at in scenario.kill_at:
            world.at(at, self._kill_all)
        for number, at in enumerate(scenario.requests):
            world.at(at, lambda number=number: self._request(number))  # type: ignore[misc]
        if scenario.stop_at is not None:
            world.at(scenario.stop_at, self._stop)

    @property
    def last(self) -> Start:
        """The newest start."""
        return self.starts[-1]

    def _start(self) -> None:
        hosts = self.world.cluster.hosts
        if not hosts:
            self.world.at(0.5, self._start)
            return
        self.world.tell("start %d of the job", len(self.starts))
        self.starts.append(Start(self.world, len(self.starts), hosts))

    def _kill_all(self) -> None:
        if self.finished_at is None:
            self.world.tell("the job is killed")
            for trainer in self.last.trainers:
                if trainer.alive:
                    dispose(trainer)
            if not self.last.broken:
                self.last.trainers[0].kill()

    def _watch(self) -> None:
        if self.finished_at is not None:
            return
        if self.last.done:
            self.world.tell("the job has finished")
            self.finished_at = self.world.now
            return
        if not self.last.over and self.last.broken:
            self.last.end()
            if len(self.starts) == MAX_STARTS:
                raise Violation("progress", f"{MAX_STARTS} starts of the job have failed")
            self.world.at(self.world.rng.uniform(0.3, 2.0), self._start)
        self.world.at(0.3, self._watch)

    def _request(self, number: int) -> None:
        if self.finished_at is not None:
            return
        trainer = self.last.trainers[number % len(self.last.trainers)]
        if number % 2:
            self._ask(f"driver-{number}")
        elif trainer.alive and not trainer.logic.finished:
            request = f"{trainer.name}-{number}"
            self.last.requests[trainer.name].append(request)
            trainer.logic.request(request, "asked by a worker")

    def _ask(self, request: str) -> None:
        """The driver asks again until it has an answer: a coordinator may have forgotten it."""
        self.driver_requests.setdefault(request, self.world.now)
        coordinator = self.head.current
        if coordinator is not None and coordinator.alive:
            if request in coordinator.logic.cut.request_outcomes:
                self.answered.add(request)
                return
            self.world.send("driver", coordinator.where, lambda: coordinator.request_save(request))
        if self.finished_at is None:
            self.world.at(0.5, lambda: self._ask(request))

    def _stop(self) -> None:
        """A worker asks for it, so that it outlives a coordinator."""
        self.last.trainers[0].logic.request_stop("asked by a worker")


class Reader(Process):
    """Somebody else reads the newest checkpoint, slowly, under a pin."""

    kind = "reader"

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"reader {number}", "elsewhere")
        self.prefix: str | None = None
        self.holds = False
        self.later(0.0, self._look)

    def _look(self) -> None:
        self.use_store(log.live_checkpoints, self._found)

    def _found(self, found: object) -> None:
        usable = [c for c in found if not c.superseded] if isinstance(found, list) else []
        if not usable:
            return
        self.prefix = usable[-1].prefix
        pin = {"prefix": self.prefix, "by": self.name, "expires": self.world.now + 3600}
        self.use_store(lambda store: store.put(self._pin_path, json.dumps(pin).encode()), self._pinned)

    @property
    def _pin_path(self) -> str:
        return f"{PRIVATE_DIR}/pins/{(self.prefix or '').replace('/', '%2F')}.{self.name.replace(' ', '-')}"

    def _pinned(self, result: object) -> None:
        if isinstance(result, Exception):
            self.later(0.5, self._unpin)
            return
        self.use_store(log.live_checkpoints, self._checked)

    def _checked(self, found: object) -> None:
        live = [c.prefix for c in found] if isinstance(found, list) else []
        self.holds = self.prefix in live and damage_of(self.world.disk.objects, self.prefix or "") is None
        self.world.tell("%s holds %s: %s", self.name, self.prefix, self.holds)
        self.later(self.world.rng.uniform(2.0, 12.0) if self.holds else 0.0, self._unpin)

    def _unpin(self) -> None:
        self.holds = False

        def done(result: object) -> None:
            if isinstance(result, Exception):
                self.later(0.5, self._unpin)

        def delete(store: Store) -> None:
            store.delete(self._pin_path)

        self.use_store(delete, done)
