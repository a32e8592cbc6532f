"""The machines: which of them there are, what Ray says of them, and how they are lost."""

from __future__ import annotations

from collections.abc import Callable

from ray_ckpt.protocol.messages import Nodes
from ray_ckpt.testing.simulator.host import Host
from ray_ckpt.testing.simulator.world import World

_FOR_EVER_S = 1e6


class Cluster:
    """``hosts`` are those that Ray places work on. A lost one never comes back; a new one may, under another name.

    ``on_new`` hears of a new host, ``on_loss`` that one is lost; ``placed``: by rank, where the newest start of the job
    runs.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.hosts: list[Host] = []
        self.on_new: Callable[[Host], None] = lambda _: None
        self.on_loss: Callable[[], None] = lambda: None
        self.placed: list[str] = []
        self._all: dict[str, Host] = {}
        self._dead: frozenset[str] = frozenset()
        world.cluster = self
        for _ in range(world.scenario.hosts):
            self._add()

    def plan_losses(self) -> None:
        """Have hosts lost in the course of the run."""
        world, horizon = self.world, self.world.scenario.horizon
        if world.faulty("crash_host"):
            for _ in range(world.rng.randint(1, 2)):
                world.at(world.rng.uniform(0.5, horizon), self._lose_one)
        if world.faulty("false_death"):
            world.at(world.rng.uniform(0.5, horizon), self._give_one_up)
        for at in world.scenario.lose_at:
            world.at(at, self._lose_one)

    def named(self, name: str) -> Host | None:
        """A host that runs, whatever Ray believes."""
        host = self._all.get(name)
        return host if host is not None and not host.gone else None

    def nodes(self) -> Nodes:
        """What Ray says at present."""
        size = self.world.scenario.slice_size
        domains = tuple((host.name, f"slice{host.number // size}") for host in self.hosts) if size else ()
        return Nodes(self._dead, domains)

    def agents(self) -> dict[str, str]:
        """The hosts with an agent, as Ray says; be it one that is just being restarted."""
        return {host.name: host.name for host in self.hosts}

    @property
    def is_spread(self) -> bool:
        """Whether the newest start of the job runs on several hosts."""
        return len({name for name in self.placed if self.named(name) in self.hosts}) > 1

    @property
    def running(self) -> list[Host]:
        """All hosts whose memory is there, also those that Ray has given up."""
        return [host for host in self._all.values() if not host.gone]

    def lose(self, host: Host) -> None:
        """The machine is gone with all that ran and lay on it; Ray notices after a while."""
        self.world.tell("%s is lost", host.name)
        self.world.oracles.saving.host_lost(host)
        host.lose()
        self.on_loss()
        self._give_up(host, self.world.rng.uniform(0.3, 2.0))

    def _lose_one(self) -> None:
        if self.hosts:
            self.lose(self.world.rng.choice(self.hosts))

    def _give_one_up(self) -> None:
        """Ray takes a host for dead that was only cut off; what runs there goes on for a while."""
        if len(self.hosts) < 2:
            return
        host = self.world.rng.choice(self.hosts)
        self.world.tell("%s is believed dead", host.name)
        self.world.isolate(host.name, _FOR_EVER_S)
        self._give_up(host, 0.0)
        self.world.at(self.world.rng.uniform(0.5, 6.0), host.lose)

    def _give_up(self, host: Host, notice_s: float) -> None:
        if host in self.hosts:
            self.hosts.remove(host)
        self.world.at(notice_s, lambda: self._tell_dead(host))
        if not self.hosts or self.world.rng.random() < 0.6:
            self.world.at(notice_s + self.world.rng.uniform(0.0, 2.0), self._replace)

    def _tell_dead(self, host: Host) -> None:
        self._dead |= {host.name}

    def _replace(self) -> None:
        new = self._add()
        self.world.tell("%s takes the place of a lost one", new.name)
        self.on_new(new)

    def _add(self) -> Host:
        host = Host(self.world, len(self._all))
        self._all[host.name] = host
        self.hosts.append(host)
        host.start_agent()
        return host
