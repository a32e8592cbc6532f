"""One run of a soak: a directory whose job trains, is struck, starts anew, and ends cleanly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ray.exceptions import RayError
from ray.util import list_named_actors

import ray_ckpt
from ray_ckpt import Timeouts
from ray_ckpt.coordinator import NAMESPACE, run_id
from ray_ckpt.errors import RayCkptError
from tests.soak import strike
from tests.soak.hosts import Host, Hosts
from tests.soak.job import Job
from tests.soak.model import Model
from tests.soak.oracle import Finding, judge_restores
from tests.soak.plan import Event, Kind, RunPlan
from tests.soak.stores import RunStore
from tests.soak.tally import Tally
from tests.soak.witness import Witness
from tests.system.waiting import pause

STUCK_S = 120.0
ENOUGH = 20
"""Violations after which a soak ends early: the first ones tell the most."""

TIMEOUTS = Timeouts(start_s=60.0, save_s=40.0, settle_s=20.0, host_s=10.0)
_LOOK_S = 0.4
_TICK_S = 0.05
_PROGRESS_S = 20.0
_RANKS_A_HOST = 2
_ARTICLES: dict[Kind, str] = {"agent": "an agent", "writer": "a writer", "coordinator": "the coordinator"}


class Stuck(Exception):
    """The run cannot go on: nothing has been committed for too long, or too much is wrong; it has been told."""


class Run:
    """Plays one `RunPlan`. ``folder``: for this run's journals."""

    def __init__(
        self, plan: RunPlan, store: RunStore, hosts: Hosts, witness: Witness, tally: Tally, folder: Path
    ) -> None:
        self._plan, self._store, self._hosts, self._witness, self._tally = plan, store, hosts, witness, tally
        model = Model(plan.seed, plan.columns)
        settings = {**plan.settings, "timeouts": TIMEOUTS, "storage_options": store.options}
        folder.mkdir(parents=True)
        self._job = Job(store.url, model, plan.pace_s, folder, settings, tally)
        self._name = f"run {plan.number}"
        self._world = plan.world
        self._newest = self._before = -1
        self._last: int | None = None
        self._disturbed = False
        self._judged: set[int] = set()
        self._looked = self._moved = self._told = time.monotonic()
        witness.watch(self._name, store.source, model)

    @property
    def id(self) -> str:
        """The package's short name for the run."""
        return run_id(self._store.url)

    def play(self, until: float) -> None:
        """All of it; no event starts after ``until``, a value of `time.monotonic`.

        Raises:
            Stuck: nothing was committed for `STUCK_S` seconds, or there are `ENOUGH` violations.
        """
        plan = self._plan
        self._tell(f"{self._world} ranks, {plan.columns * 3360 / 1e6:.1f} MB, {plan.settings}")
        self._tally.runs += 1
        self._start()
        for event in plan.events:
            self._await(event)
            if time.monotonic() > until:
                break
            self._world = event.world
            self._strike(event.kind, event)
        self._finish()

    # -- looking --------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Look at everything; a job that cannot go on starts anew."""
        self._watch()
        if not self._job.running:
            self._restart("a rank has ended")

    def _watch(self) -> None:
        pause(_TICK_S)
        self._job.look()
        now = time.monotonic()
        if now - self._looked >= _LOOK_S and self._store.readable:
            self._look()
        if now - self._told > _PROGRESS_S:
            self._told = now
            self._tell(self._tally.progress())
        if self._disturbed:
            self._moved = now
        if now - self._moved > STUCK_S:
            self._tally.violated(f"{self._name}: nothing was committed for {STUCK_S:.0f} s: {self._status()}")
            raise Stuck
        if len(self._tally.violations) >= ENOUGH:
            raise Stuck

    def _look(self) -> None:
        self._take(self._witness.look(self._name))
        self._looked = time.monotonic()
        if self._job.ranks and self._job.starts not in self._judged and self._job.all_restored:
            self._judge_start()

    def _take(self, finding: Finding) -> None:
        tally = self._tally
        tally.committed += finding.committed
        tally.abandoned += finding.abandoned
        tally.verified += finding.verified
        for text in finding.violations:
            tally.violated(f"{self._name}: {text}")
        if finding.committed:
            self._moved = time.monotonic()
        self._newest = finding.newest

    def _judge_start(self) -> None:
        """What this start's ranks have restored, as far as they lived to tell."""
        self._judged.add(self._job.starts)
        told = self._job.restored()
        for text in judge_restores(told, self._before, self._job.model):
            self._tally.violated(f"{self._name}, start {self._job.starts}: {text}")
        for one in told:
            self._tally.restores[one.source] += 1
        if told and told[0].step > self._before >= 0:
            self._tell(f"start {self._job.starts} restored step {told[0].step}, {told[0].source}")

    def _status(self) -> str:
        try:
            return f"{ray_ckpt.status(self._store.url)}; the ranks are at {self._job.reached()}"
        except (RayCkptError, RayError) as error:
            return f"no status: {error!r}; the ranks are at {self._job.reached()}"

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._tick()

    def _await(self, event: Event) -> None:
        before = self._newest
        if event.wait == "commit":
            self._until(lambda: self._newest > before)
        elif event.wait == "restore":
            self._until(lambda: self._job.all_restored)
        self._pass(event.after_s)

    def _pass(self, seconds_s: float) -> None:
        end = time.monotonic() + seconds_s
        self._until(lambda: time.monotonic() > end)

    def _tell(self, text: str) -> None:
        self._tally.tell(f"{self._name}: {text}")

    # -- starting -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._hosts.welcome()
        if self._store.readable:
            self._look()
        self._before = self._newest
        alive = self._hosts.alive
        world = min(self._world, _RANKS_A_HOST * len(alive))
        places = [alive[(self._job.starts + i) % len(alive)] for i in range(world)]
        try:
            self._job.start(places)
        except RayError as error:
            # The host is going; the next tick tries again, elsewhere.
            self._tally.failed_starts += 1
            self._tell(f"could not start: {error!r}")
        for host in alive:
            host.warm(1)

    def _restart(self, why: str) -> None:
        if self._job.ranks:
            if self._job.starts not in self._judged:
                self._judge_start()
                self._tally.failed_starts += not self._job.all_restored
            self._job.give_up()
        self._start()
        self._tell(
            f"start {self._job.starts} with {len(self._job.ranks)} ranks, as {why}; newest commit {self._before}"
        )

    # -- striking -------------------------------------------------------------------------------------------

    def _strike(self, kind: Kind, event: Event) -> None:
        if kind == "storage":
            self._storage(event)
        elif kind == "resize":
            self._restart("the job is resized")
        elif kind in ("trainer", "all trainers"):
            self._kill_trainers(kind, event)
        elif kind == "host":
            self._lose_host(event)
        else:
            self._kill_servant(kind, event)

    def _count(self, kind: str, processes: int, text: str) -> None:
        self._tally.kills[kind] += 1
        self._tally.processes += processes
        self._tell(f"killed {text}; newest commit {self._newest}")

    def _kill_trainers(self, kind: Kind, event: Event) -> None:
        count = len(self._job.ranks)
        if not count:
            return
        chosen = range(count) if kind == "all trainers" else [event.choice % count]
        killed = sum(self._job.kill(number) for number in chosen)
        self._count(kind, killed, f"rank {chosen[0]}" if kind == "trainer" else f"all {count} ranks")
        self._until_ended(chosen)

    def _until_ended(self, chosen: Iterable[int]) -> None:
        """Ray has noticed; then the job is started again."""
        ranks = [self._job.ranks[number] for number in chosen]
        while not all(rank.ended for rank in ranks):
            self._watch()
        self._restart("it was killed")

    def _kill_servant(self, kind: Kind, event: Event) -> None:
        url = self._store.url
        host = self._busy_hosts()[event.choice % len(self._busy_hosts())]
        killed = {
            "agent": lambda: strike.kill_agent(url, host),
            "writer": lambda: strike.kill_writer(self._busy_hosts()),
            "coordinator": lambda: strike.kill_coordinator(url),
        }[kind]()
        if killed:
            self._count(kind, 1, _ARTICLES[kind])
        else:
            self._tell(f"no {kind} was there to be killed")

    def _busy_hosts(self) -> list[Host]:
        return [rank.host for rank in self._job.ranks] or self._hosts.alive

    def _lose_host(self, event: Event) -> None:
        lost = self._hosts.alive[1:]
        if not self._hosts.complete:
            self._tell("a host is missing already")
            return
        host = lost[event.choice % len(lost)]
        ranks = [number for number, rank in enumerate(self._job.ranks) if rank.host is host]
        self._job.lost(host)
        processes = len(host.processes())
        self._hosts.lose(host)
        self._count("host", processes, f"a host with {processes} processes and ranks {ranks}")
        if ranks:
            self._until_ended(ranks)

    def _storage(self, event: Event) -> None:
        kind = self._store.faults[event.choice % len(self._store.faults)]
        self._tally.faults[kind] += 1
        self._tell(f"storage fault {kind} for {event.lasts_s:.1f} s; newest commit {self._newest}")
        self._disturbed = True
        with self._store.fault(kind):
            self._pass(event.lasts_s / 2)
            if event.with_kill is not None:
                self._strike(event.with_kill, event)
            self._pass(event.lasts_s / 2)
        self._disturbed = False
        self._tell(f"the storage works again; newest commit {self._newest}")

    # -- the end --------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The next save works, and a clean end leaves the last step and nothing else."""
        before = self._newest
        self._until(lambda: self._newest > before and self._job.all_restored)
        self._job.finish()
        while not all(rank.ended for rank in self._job.ranks):
            self._watch()
        self._look()
        self._last = self._job.ranks[0].last
        if any(rank.last != self._newest for rank in self._job.ranks):
            ends = [rank.error or rank.last for rank in self._job.ranks]
            self._tally.violated(f"{self._name}: not a clean end of all ranks at step {self._newest}: {ends}")
        self._job.give_up()
        self._tell(f"ended at step {self._newest}; {self._tally.progress()}")

    def abandon(self) -> None:
        """After an error: end its processes."""
        self._job.give_up()

    def left(self, hosts: Hosts) -> list[str]:
        """Snapshot memory and actors of this run that are still there."""
        files = [path for host in hosts.alive for path in host.memory.glob(f"{self.id}*/**/*.segment")]
        actors = [a["name"] for a in list_named_actors(True) if a["namespace"] == NAMESPACE and self.id in a["name"]]
        return [*map(str, files), *actors]

    def judge_end(self) -> None:
        """When its actors have ended: its files are as they will stay."""
        if self._last is not None:
            self._take(self._witness.end(self._name, self._last))
