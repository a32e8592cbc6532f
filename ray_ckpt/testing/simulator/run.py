"""One run from its first event to quiet, and its verdict."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from unittest.mock import patch

from ray_ckpt.log import decode_record, records
from ray_ckpt.testing.simulator.cluster import Cluster
from ray_ckpt.testing.simulator.coordinator import Head
from ray_ckpt.testing.simulator.job import Job, Reader
from ray_ckpt.testing.simulator.oracles import Oracles, named, prefix_of
from ray_ckpt.testing.simulator.rule import newest, top_record
from ray_ckpt.testing.simulator.scenario import Scenario
from ray_ckpt.testing.simulator.world import Violation, World
from ray_ckpt.types import LogRecord

LONGEST_S = 240.0
_STORY_LINES = 200


class SimulationError(AssertionError):
    """A run broke an invariant; the text is its scenario and its story. ``oracle``: who found it."""

    def __init__(self, scenario: Scenario, world: World, cause: BaseException) -> None:
        self.oracle = cause.oracle if isinstance(cause, Violation) else "crash of the code"
        lines = [f"{at:8.3f}  {text % values}" for at, text, values in world.story[-_STORY_LINES:]]
        story = "\n".join(lines)
        super().__init__(f"seed {scenario.seed}: {cause!r}\n{scenario}\n{story}\n{world.now:8.3f}  {cause!r}")


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. ``points``: crash points passed, by kind of process."""

    scenario: Scenario
    points: dict[str, int]
    events: int
    seconds_s: float
    commits: int
    starts: int


def run(scenario: Scenario) -> Result:
    """Simulate one scenario. Raises `SimulationError`."""
    world = World(scenario)
    try:
        with _fast_decoding():
            return Simulation(world).run()
    except (Exception, RecursionError) as error:
        raise SimulationError(scenario, world, error) from error


@lru_cache(maxsize=4096)
def _decoded(raw: bytes, source: str) -> LogRecord:
    return decode_record(raw, source)


def _fast_decoding() -> AbstractContextManager[object]:
    """Records are immutable: those of equal bytes need to be made only once."""
    return patch.object(records, "decode_record", _decoded)


class Simulation:
    """All processes of one run."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.oracles = Oracles(world)
        self.cluster = Cluster(world)
        self.head = Head(world, self.cluster.hosts)
        self.cluster.on_new, self.cluster.on_loss = self.head.meet, self.head.on_loss
        self.cluster.plan_losses()
        self.job = Job(world, self.head)
        for number, at in enumerate(world.scenario.readers):
            world.at(at, lambda number=number: self._read(number))  # type: ignore[misc]
        if world.faulty("partition"):
            for _ in range(3):
                world.at(world.rng.uniform(0.0, world.scenario.horizon), self._partition)

    def run(self) -> Result:
        """Let everything happen until it is quiet."""
        world = self.world
        quiet_since: float | None = None
        while world.step():
            if not self._quiet():
                quiet_since = None
            elif quiet_since is None:
                quiet_since = world.now
            elif world.now > quiet_since + 3.0:
                break
            if world.now > LONGEST_S:
                raise Violation("quiet", f"still not quiet after {LONGEST_S} s: {self._waiting()}")
        self._judge_end()
        return Result(
            world.scenario,
            dict(world.points),
            world.events,
            world.now,
            len(world.oracles.log.commits),
            len(self.job.starts),
        )

    def _read(self, number: int) -> None:
        self.world.oracles.files.readers.append(Reader(self.world, number))

    def _partition(self) -> None:
        if not self.cluster.hosts:
            return
        host = self.world.rng.choice(self.cluster.hosts)
        cut = self.world.rng.choice((self.world.isolate, self.world.deafen))
        cut(host.name, self.world.rng.uniform(0.5, 6.0))

    def _quiet(self) -> bool:
        world, head = self.world, self.head.current
        return (
            self.job.finished_at is not None
            and world.now > world.scenario.horizon
            and head is not None
            and head.alive
            and head.logic.idle
            and all(
                host.agent is not None and host.agent.alive and host.agent.logic.idle for host in self.cluster.hosts
            )
            and not any(t.alive for start in self.job.starts for t in start.trainers)
        )

    def _waiting(self) -> str:
        head = self.head.current
        alive = [t for start in self.job.starts for t in start.trainers if t.alive]
        busy = [host.name for host in self.cluster.hosts if host.agent is None or not host.agent.logic.idle]
        return (
            f"job finished at {self.job.finished_at}, workers {[(t.name, t.logic.late) for t in alive]}, busy {busy}, "
            f"coordinator {head.logic.status() if head else None}"
        )

    def _judge_end(self) -> None:
        objects = self.world.disk.objects
        record = top_record(objects)
        self._require(not record["dying"], f"never deleted: {record['dying']}")
        live = [c["prefix"] for c in record["live"]]
        best = newest(record)
        expected = [best["prefix"], *(c["prefix"] for c in record["live"] if not c["superseded"])] if best else []
        self._require(named(objects) == expected, f"`checkpoint` names {named(objects)}, expected {expected}")
        late = self.world.oracles.files.late
        orphans = [path for path in objects if (prefix_of(path) or live[:1]) not in (*live, live[:1])]
        orphans = [path for path in orphans if path not in late]
        self._require(not orphans, f"never swept: {orphans}")
        # Those of a job that is over are copied, and then kept, no longer than their agents live.
        held = [slot for host in self.cluster.hosts for slot in host.slots.values() if slot.state == "sealed"]
        sealed = [slot.name for slot in held if slot.info is not None and slot.info.trigger != "memory"]
        self._require(not sealed, f"segments never freed: {sealed}")
        waiting = {t.name: t.waiting_requests for t in self.job.last.trainers if t.waiting_requests}
        self._require(not waiting, f"requests without an outcome: {waiting}")
        self.world.oracles.saving.judge_end()

    @staticmethod
    def _require(holds: bool, text: str) -> None:
        if not holds:
            raise Violation("quiet", text)
