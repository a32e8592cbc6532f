"""How far ahead a step is proposed: far after a hitch, near again as soon as that was enough."""

from __future__ import annotations

from tests.protocol.harness import Job, beat
from tests.protocol.loop import TWO, Loop

HITCH = 500
"""Steps that the loops go on by while nobody hears of them."""


def propose_to_one(loop: Loop, request: str) -> None:
    """A save is asked for, and a step proposed of which rank 1 has not heard."""
    loop.job.workers[0].request(request, "wanted")
    while not any(p.state == "open" for p in loop.world.coordinator.cut.proposals.values()):
        loop.job.hosts[0].beat()
        loop.world.tick(0.2)


def after_a_hitch() -> Loop:
    """A loop whose ranks had gone far past a proposal before they heard of it."""
    loop = Loop()
    loop.serve("before", lambda _: 1)
    propose_to_one(loop, "late")
    for rank in range(2):
        loop.run(rank, HITCH)
    beat(loop.world, loop.job.hosts)
    return loop


def test_only_the_first_save_after_a_hitch_waits() -> None:
    loop = after_a_hitch()
    loop.until(lambda: "late" in loop.job.workers[0].request_outcomes, lambda _: 1, runs=3 * HITCH)
    before = loop.steps[0]
    loop.serve("next", lambda _: 1)
    assert loop.steps[0] - before < HITCH / 10


def test_a_new_start_does_not_inherit_the_margin() -> None:
    loop = after_a_hitch()
    loop.job.die()
    beat(loop.world, loop.job.hosts)
    loop.world.tick(TWO.host_timeout_s)
    loop.job = Job(loop.world, TWO, "b").start()
    loop.steps = [loop.job.workers[0].restored_step or 0] * 2
    before = loop.steps[0]
    loop.serve("first", lambda _: 1)
    assert loop.steps[0] - before < HITCH / 10


def test_before_the_first_step_the_restored_one_counts() -> None:
    loop = Loop()
    loop.serve("before", lambda _: 10 * HITCH)
    loop.job.die()
    beat(loop.world, loop.job.hosts)
    loop.world.tick(TWO.host_timeout_s)
    loop.job = Job(loop.world, TWO, "b").start()
    restored = loop.job.workers[0].restored_step
    assert restored is not None
    assert restored > HITCH
    loop.steps = [restored, restored]
    propose_to_one(loop, "at once")
    loop.until(lambda: "at once" in loop.job.workers[0].request_outcomes, lambda _: 1)
    assert loop.steps[0] - restored < HITCH / 10
