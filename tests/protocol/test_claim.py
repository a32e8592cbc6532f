"""How an attempt finds a prefix that is its own: the races that random runs meet too rarely to rely on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from ray_ckpt.protocol.flows import DeleteIndex, Flows, HasIndex, Io, PutClaim, ReadHead
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import JobConfig
from ray_ckpt.protocol.roster import Roster
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.protocol.saves import Saves
from ray_ckpt.types import Claim, LogRecord
from tests.protocol.harness import Job, World, beat

HEAD = LogRecord(7, "claim", 2, "me", 0.0, (), (), None, 3)
OTHER = Claim("e000001-000001", 1, 1, 5, "model.ckpt-5", 3)


def claiming(step: int) -> tuple[Ledger, SaveState, Generator[Any, Any, None]]:
    flows = Flows()
    ledger = Ledger(flows, "me")
    ledger._head, ledger.epoch, ledger.phase = HEAD, 2, "active"
    save = SaveState((1, step), "e000002-000001", "plan", 1, 1, 2, 0.0, 9.0)
    return ledger, save, Saves(flows, ledger, Roster())._claim(save)


def ended(flow: Generator[Any, Any, None], answer: Any) -> bool:
    try:
        flow.send(answer)
    except StopIteration:
        return True
    return False


def test_a_free_prefix_above_the_mark_is_taken() -> None:
    _, save, flow = claiming(5)
    assert next(flow) == HasIndex("model.ckpt-5")
    assert flow.send(False) == PutClaim(Claim(save.attempt, 2, 1, 5, "model.ckpt-5", 3))
    assert isinstance(flow.send(None), ReadHead)
    assert ended(flow, HEAD)
    assert (save.prefix, save.failure) == ("model.ckpt-5", None)


def test_a_step_below_the_mark_gets_a_prefix_of_its_own() -> None:
    _, save, flow = claiming(3)
    assert isinstance(next(flow), PutClaim)
    assert save.prefix == "e000002-000001/model.ckpt-3"


def test_a_claimed_prefix_is_left_alone() -> None:
    _, save, flow = claiming(5)
    next(flow)
    flow.send(False)
    flow.send(OTHER)
    assert flow.send(HEAD) == PutClaim(Claim(save.attempt, 2, 1, 5, "e000002-000001/model.ckpt-5", 3))


def test_what_tensorflow_has_put_there_is_left_alone() -> None:
    _, save, flow = claiming(5)
    next(flow)
    # Not even claimed: what is under a dead claim is deleted.
    assert flow.send(True) == PutClaim(Claim(save.attempt, 2, 1, 5, "e000002-000001/model.ckpt-5", 3))
    flow.send(None)
    assert ended(flow, HEAD)
    assert save.prefix == "e000002-000001/model.ckpt-5"


def test_a_claim_that_was_swept_a_moment_ago_is_seen_by_the_mark() -> None:
    """Its attempt may have written the same paths: that they are free again means nothing."""
    _, save, flow = claiming(5)
    next(flow)
    flow.send(False)
    flow.send(None)
    assert isinstance(flow.send(replace(HEAD, high_water=5)), PutClaim)
    assert save.prefix == "e000002-000001/model.ckpt-5"


def test_a_newer_epoch_after_the_claim_ends_this_coordinator() -> None:
    ledger, save, flow = claiming(5)
    next(flow)
    flow.send(False)
    flow.send(None)
    assert ended(flow, replace(HEAD, epoch=3))
    assert save.failure is not None
    assert ledger.phase == "fenced"


class SharedWorld(World):
    """Plain TensorFlow has written step 20 here, which the log does not know."""

    foreign = "model.ckpt-20"

    def _execute(self, io: Io) -> Any:
        if isinstance(io, DeleteIndex):
            self.deleted.append(io.prefix)
        return io.prefix == self.foreign if isinstance(io, HasIndex) else super()._execute(io)


def test_no_later_coordinator_deletes_what_tensorflow_has_put_there() -> None:
    world = SharedWorld()
    config = JobConfig(world_size=1, save_steps=10, delete_grace_s=0.0)
    job = Job(world, config, "a").start()
    for step in (10, 20):
        job.step(step)
        beat(world, job.hosts)
    assert [c.prefix == world.foreign for c in world.log[-1].live] == [False, False]
    assert world.committed == [10, 20]
    world.restart_coordinator()
    beat(world, job.hosts)
    assert world.coordinator.keeper.idle
    assert world.foreign not in world.deleted
