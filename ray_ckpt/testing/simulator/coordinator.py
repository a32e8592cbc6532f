"""Coordinator processes around the real `CoordinatorLogic`, and what restarts them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_ckpt.errors import RayCkptError
from ray_ckpt.protocol.coordinator import CoordinatorLogic
from ray_ckpt.protocol.flows import Io, IoFailedError
from ray_ckpt.protocol.messages import HostReport, HostView
from ray_ckpt.protocol.views import adds_to
from ray_ckpt.testing.simulator.actions import perform
from ray_ckpt.testing.simulator.world import Process, World

if TYPE_CHECKING:
    from ray_ckpt.testing.simulator.host import Agent, Host

TICK_S = 0.5
DERIVE_S = 0.02


class Coordinator(Process):
    """One start of the coordinator actor: all its state is lost when it dies."""

    kind = "coordinator"

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"coordinator {number}", f"head {number}")
        self.logic = CoordinatorLogic("sim://run", self.name)
        self._agents: dict[str, Agent] = {}
        self._said: dict[str, HostView] = {}
        self._deriving = False
        self.later(0.0, self._start)

    def _start(self) -> None:
        self.logic.start(self.world.now)
        self._pump()
        self.later(TICK_S, self._tick)

    def _tick(self) -> None:
        self.world.point(self)
        self.later(TICK_S, self._tick)
        self.logic.on_nodes(self.world.cluster.nodes(), self.world.now)
        self.logic.on_tick(self.world.now)
        self._pump()
        for agent in list(self._agents.values()):
            self._tell(agent)

    def on_report(self, report: HostReport, agent: Agent) -> None:
        """A host reports; it is answered with its view."""
        if not self.alive:
            return
        self.world.point(self)
        if self.logic.take_in(report, self.world.now):
            # As the actor does: one derivation for all that has come by then.
            self.derive_soon()
        self._agents[agent.where] = agent
        self._said.pop(agent.name, None)
        self._tell(agent)
        self.world.point(self)

    def derive_soon(self) -> None:
        """Once for several reports."""
        if not self._deriving:
            self._deriving = True
            self.later(DERIVE_S, self._derive)

    def _derive(self) -> None:
        self._deriving = False
        self.world.point(self)
        self.logic.derive(self.world.now)
        self._pump()
        for host in sorted(self.logic.views.take_changed()):
            if host in self._agents:
                self._tell(self._agents[host], at_once=True)

    def request_save(self, request_id: str) -> None:
        """The driver asks for a save."""
        self.logic.request_save(request_id, "asked by the driver", self.world.now)
        self._pump()

    def request_stop(self) -> None:
        """The driver asks for a stop."""
        self.logic.request_stop("asked by the driver", self.world.now)
        self._pump()

    def _pump(self) -> None:
        for io_id, io in self.logic.take():
            self._execute(io_id, io)

    def _execute(self, io_id: int, io: Io) -> None:
        def done(result: Any) -> None:
            if isinstance(result, RayCkptError):
                result = IoFailedError(str(result))
            elif isinstance(result, Exception) and not isinstance(result, IoFailedError):
                raise result
            self.later(0.001, lambda: self._answer(io_id, result))

        self.use_store(perform(io, self.world.now, self.world.cluster.agents()), done)

    def _answer(self, io_id: int, result: Any) -> None:
        self.world.point(self)
        self.logic.answered(io_id, result, self.world.now)
        self._pump()
        self.derive_soon()

    def _tell(self, agent: Agent, *, at_once: bool = False) -> None:
        """Send a host its view, unless it says nothing new, or nothing that is worth an answer ``at_once``."""
        view, said = self.logic.view(agent.where), self._said.get(agent.name)
        if view is None:
            return
        if said is None or (adds_to(view, said) if at_once else replace(view, version=0) != said):
            self._said[agent.name] = replace(view, version=0)
            self.world.send(self.where, agent.where, lambda: agent.on_view(view))


class Head:
    """Restarts the coordinator when it dies, and sometimes while it lives on behind a partition."""

    def __init__(self, world: World, hosts: list[Host]) -> None:
        self.world = world
        self.hosts = hosts
        self.current: Coordinator | None = None
        self.started = 0
        self.start()
        world.at(0.2, self._watch)
        if world.faulty("zombie_coordinator"):
            for _ in range(world.rng.randint(1, 2)):
                world.at(world.rng.uniform(0.5, world.scenario.horizon), self._replace)

    def start(self) -> None:
        """Start a coordinator; the hosts find it one after the other."""
        self.started += 1
        self.current = new = Coordinator(self.world, self.started)
        self.world.tell("%s starts", new.name)
        for host in self.hosts:
            if host.coordinator is None or not host.coordinator.alive:
                host.coordinator = new
            else:
                self.world.at(self.world.rng.uniform(0.0, 3.0), lambda host=host: self.meet(host))  # type: ignore[misc]

    def meet(self, host: Host) -> None:
        """A new host looks for the coordinator."""
        host.coordinator = self.current

    def on_loss(self) -> None:
        """A host is lost, perhaps the one where the coordinator ran."""
        if self.world.scenario.lose_head and self.current is not None:
            self.world.tell("%s is lost with it", self.current.name)
            self.current.kill()

    def _watch(self) -> None:
        if self.current is not None and self.current.logic.ledger.phase == "fenced":
            self.world.tell("%s ends: it is fenced", self.current.name)
            self.current.kill()
        if self.current is not None and not self.current.alive:
            self.current = None
            self.world.at(self.world.rng.uniform(0.2, 1.5), self.start)
        self.world.at(0.2, self._watch)

    def _replace(self) -> None:
        """The present coordinator seems gone, but lives: its actions come late, some hosts still talk to it."""
        old = self.current
        if old is None or self.world.now >= self.world.scenario.horizon:
            return
        self.world.tell("%s becomes a zombie", old.name)
        old.lag_s = self.world.rng.choice((0.5, 3.0))
        if self.world.rng.random() < 0.5:
            self.world.isolate(old.where, self.world.rng.uniform(0.5, 5.0))
        self.start()
