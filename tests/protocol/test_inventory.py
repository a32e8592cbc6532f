"""Whom a start hears before it chooses, for how long it waits for those that are silent, and what it says of them."""

from __future__ import annotations

from ray_ckpt.protocol.messages import RestoreDecision
from tests.protocol.harness import Job, World, beat
from tests.protocol.test_deleted import snapshot
from tests.protocol.test_fall_back import CONFIG

AGENTS = {"a-host0": "machine-0", "a-host1": "machine-1"}
WAIT_S = CONFIG.host_timeout_s


class Silence:
    """A job of two ranks with a snapshot of step 10 was killed; one of its hosts has not spoken for long."""

    def __init__(self, agents: dict[str, str]) -> None:
        self.world = World()
        first = Job(self.world, CONFIG, "a").start()
        snapshot(first, 10, "memory")
        beat(self.world, first.hosts)
        first.die()
        beat(self.world, first.hosts)
        other, self.silent = first.hosts
        self.world.agents = agents
        self.world.tick(WAIT_S + 1.0)
        self.job = Job(self.world, CONFIG, "b")
        self.heard = [other, *self.job.hosts]
        beat(self.world, self.heard)

    def wait(self) -> None:
        """For half of what a silent host is waited for."""
        self.world.tick(WAIT_S / 2)
        beat(self.world, self.heard)

    @property
    def decision(self) -> RestoreDecision | None:
        """What both ranks are to start from."""
        decisions = {worker.restore for worker in self.job.workers}
        assert len(decisions) == 1
        return decisions.pop()


def test_a_host_that_is_silent_is_waited_for_named_and_not_counted_on() -> None:
    found = Silence(AGENTS)
    found.wait()
    assert found.decision is None
    found.wait()
    assert found.decision is not None
    assert found.decision.step is None
    assert "no answer within 30 s from the agents on 1 of the hosts, machine-1" in found.decision.note
    assert found.world.log[-1].reason == found.decision.note


def test_a_host_that_speaks_again_in_time_is_counted_on() -> None:
    found = Silence(AGENTS)
    found.wait()
    beat(found.world, [*found.heard, found.silent])
    assert found.decision is not None
    assert (found.decision.step, found.decision.note) == (10, "")


def test_a_host_without_an_agent_is_neither_waited_for_nor_counted_on() -> None:
    found = Silence({"a-host0": "machine-0"})
    assert found.decision is not None
    assert (found.decision.step, found.decision.note) == (None, "")


def test_what_is_silent_is_not_waited_for_where_all_that_is_newest_is_there() -> None:
    found = Silence({**AGENTS, "far": "machine-7"})
    beat(found.world, [*found.heard, found.silent])
    assert found.decision is not None
    assert found.decision.step == 10
