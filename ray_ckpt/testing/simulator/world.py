"""Simulated time, chance, network and death: what the simulated processes live in."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ray_ckpt.errors import StorageError
from ray_ckpt.log.records import LOG
from ray_ckpt.protocol.messages import RestoreWish
from ray_ckpt.storage import Store
from ray_ckpt.testing.simulator.disk import Call, Disk, Op
from ray_ckpt.testing.simulator.scenario import Scenario

if TYPE_CHECKING:
    from ray_ckpt.testing.simulator.cluster import Cluster
    from ray_ckpt.testing.simulator.oracles import Oracles

CRASH_RATE = 0.004
MAX_RANDOM_CRASHES = 3


class Crashed(BaseException):
    """The process whose code runs dies here."""


class Violation(AssertionError):
    """An invariant does not hold; ``oracle`` names who found it."""

    def __init__(self, oracle: str, text: str) -> None:
        super().__init__(f"[{oracle}] {text}")
        self.oracle = oracle


class World:
    """Clock, dice, wires, disk and the story of one run. ``wish``: what the newest start of the job wants."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.now = 0.0
        self.disk = Disk()
        self.oracles: Oracles
        self.cluster: Cluster
        self.wish: RestoreWish | None = None
        self.story: list[tuple[float, str, tuple[Any, ...]]] = []
        self.points: Counter[str] = Counter()
        self.events = 0
        self._random_crashes = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._isolated: dict[str, float] = {}
        self._deaf: dict[str, float] = {}
        self._planned = {kind: set(numbers) for kind, numbers in scenario.crashes.items()}

    # -- time -------------------------------------------------------------------------------------------

    def at(self, delay: float, act: Callable[[], None]) -> None:
        """Do something after ``delay`` seconds."""
        self.events += 1
        heapq.heappush(self._heap, (self.now + delay, self.events, act))

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._heap:
            return False
        self.now, _, act = heapq.heappop(self._heap)
        with suppress(Crashed):
            act()
        return True

    def tell(self, text: str, *values: Any) -> None:
        """Add a line to the story."""
        self.story.append((self.now, text, values))

    # -- faults -----------------------------------------------------------------------------------------

    def faulty(self, kind: str, rate: float = 1.0) -> bool:
        """Whether a fault of this kind strikes here and now."""
        if kind not in self.scenario.faults or self.now >= self.scenario.horizon:
            return False
        return self.rng.random() < rate

    def point(self, process: Process, where: str = "") -> None:
        """A place where the process may die; ``where`` sets those around storage operations apart."""
        kind = process.kind + where
        self.points[kind] += 1
        planned = kind in self._planned and self.points[kind] in self._planned[kind]
        rate = CRASH_RATE if not where else 3 * CRASH_RATE
        drawn = self._random_crashes < MAX_RANDOM_CRASHES and self.faulty(f"crash_{process.kind}", rate)
        if planned or drawn:
            self._random_crashes += drawn
            self.tell("%s crashes (point %d of %s)", process.name, self.points[kind], kind)
            process.kill()
            raise Crashed

    def isolate(self, where: str, seconds: float) -> None:
        """Cut a place off the network for a while."""
        self.tell("%s is cut off for %.1f s", where, seconds)
        self._isolated[where] = self.now + seconds

    def deafen(self, where: str, seconds: float) -> None:
        """Let nothing in to a place for a while, though its own messages get out."""
        self.tell("%s hears nothing for %.1f s", where, seconds)
        self._deaf[where] = self.now + seconds

    def hears(self, where: str) -> bool:
        """Whether messages reach a place from elsewhere."""
        return self._deaf.get(where, -1.0) <= self.now

    def reachable(self, source: str, target: str) -> bool:
        """Whether a message can pass from one place to the other now."""
        connected = all(self._isolated.get(where, -1.0) <= self.now for where in (source, target))
        return source == target or (connected and self.hears(target))

    def talks(self, one: str, other: str) -> bool:
        """Whether questions and answers pass between two places now."""
        return self.reachable(one, other) and self.reachable(other, one)

    def send(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """One message; it may be lost, doubled, late, and so come out of order."""
        if not self.reachable(source, target) or self.faulty("loss", 0.1):
            return
        for _ in range(2 if self.faulty("duplicate", 0.1) else 1):
            delay = self.rng.uniform(0.01, 0.05)
            if self.faulty("delay", 0.15):
                delay += self.rng.uniform(0.0, 3.0)
            self.at(delay, lambda: deliver() if self.reachable(source, target) else None)

    # -- storage ----------------------------------------------------------------------------------------

    def latency(self) -> float:
        """How long one storage operation takes."""
        slow = self.faulty("slow_store", 0.05)
        return self.rng.uniform(1.0, 6.0) if slow else self.rng.uniform(0.01, 0.06)

    def operate(self, op: Op, actor: str) -> Any:
        """Carry a storage operation out, or fail it, or both."""
        if op.kind == "list" and op.path == LOG and self.faulty("stale_list"):
            return self.disk.apply(op, actor, self.rng.randint(0, 3))
        if self.faulty("late_effect", 0.05):
            if op.writes:
                self.tell("%s: no answer, %s %s happens late", actor, op.kind, op.path)
                self.at(self.rng.uniform(0.1, 2.0), lambda: self._apply(op, actor))
            return StorageError(f"{op.kind} {op.path}: simulated time-out")
        if self.faulty("store_error", 0.06):
            if op.writes and self.rng.random() < 0.5:
                self.tell("%s: answer lost", actor)
                self._apply(op, actor)
            return StorageError(f"{op.kind} {op.path}: simulated failure")
        return self._apply(op, actor)

    def _apply(self, op: Op, actor: str) -> Any:
        result = self.disk.apply(op, actor)
        if op.writes:
            self.tell("%s: %s %s -> %s", actor, op.kind, op.path, result)
        return result


class Process:
    """Something that can die. ``where`` is its place in the network."""

    kind = ""

    def __init__(self, world: World, name: str, where: str) -> None:
        self.world = world
        self.name = name
        self.where = where
        self.alive = True
        self.lag_s = 0.0

    def kill(self) -> None:
        """Die now: nothing runs any more, but what is on its way to the store may still arrive."""
        self.alive = False

    def later(self, delay: float, act: Callable[[], None]) -> None:
        """Do something after a while, unless dead by then."""
        self.world.at(delay, lambda: act() if self.alive else None)

    def use_store(self, run: Callable[[Store], Any], done: Callable[[Any], None]) -> None:
        """Carry a call on a store out over time; ``done`` gets its result or the error it raised."""
        self._advance(Call(run), done)

    def _advance(self, call: Call, done: Callable[[Any], None]) -> None:
        while True:
            op = call.advance()
            if op is None:
                done(call.result)
                return
            if op.writes or self.world.scenario.interleaved:
                delay = self.world.latency() + self.lag_s * self.world.rng.random()
                self.world.at(delay, lambda op=op: self._carry_out(call, op, done))  # type: ignore[misc]
                return
            call.answer(self.world.operate(op, self.name))

    def _carry_out(self, call: Call, op: Op, done: Callable[[Any], None]) -> None:
        if not self.alive:
            if op.writes and self.world.rng.random() < 0.5:
                self.world.disk.apply(op, f"{self.name} (dead)")
            return
        self.world.point(self, ".store")
        answer = self.world.operate(op, self.name)
        self.world.point(self, ".store")
        call.answer(answer)
        self._advance(call, done)
