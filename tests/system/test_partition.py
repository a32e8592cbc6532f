"""Hosts that cannot reach one another and go on: a Ray cluster over network namespaces, its wires cut and mended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

import ray_ckpt
from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot import WHOLE, Segment
from tests.system import states
from tests.system.lan import Host, Lan, lan_of, why_not
from tests.system.trainers import KEPT, LONG_S, Job, Trainer, stop, until_more_commits
from tests.system.waiting import eventually, pause
from tests.system.witness import Witness

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    with lan_of() as found:
        yield found


@pytest.fixture(scope="module")
def head(lan: Lan) -> Host:
    return lan.add_rays(1)[0]


@pytest.fixture
def job(lan: Lan, head: Host, request: pytest.FixtureRequest) -> Iterator[Job]:
    with Job(lan, head, str(request.node.name)) as found:
        yield found


def copies(host: Host, rank: int) -> list[int]:
    """The steps of which this host has a whole copy of a rank's snapshot."""
    steps = []
    for path in host.memory.glob(f"*/{rank:05d}-r*.segment"):
        with contextlib.suppress(StorageError), Segment.open(path) as segment:
            if segment.state in WHOLE and segment.save is not None:
                steps.append(segment.save.step)
    return steps


def ended_rightly(trainer: Trainer) -> str:
    """How a process ended that is not of the newest start: fenced, or by Ray with its node."""
    status = trainer.until_ended()
    errors = trainer.told("error")
    assert status != 0
    assert trainer.told("ended") == []
    assert errors in ([], ["FencedError"]), trainer.told("text")
    return "fenced" if errors else f"by Ray ({status})"


def test_a_short_cut_costs_nothing(lan: Lan, head: Host, job: Job) -> None:
    near, far = lan.add_ray(head), lan.add_ray(head)
    trainers = [job.start(host, "only", rank, 2) for rank, host in enumerate((near, far))]
    with Witness(job.run) as witness:
        until_more_commits(witness, 1, 1)
        before = trainers[1].told("step")[-1]
        far.cut()
        pause(3.0)
        assert trainers[1].told("step")[-1] > before
        far.mend()
        until_more_commits(witness, 1, 2)
        stop(*trainers)
    witness.check(KEPT)
    assert witness.log("abort") == []
    assert len(witness.log("seal")) == 1
    steps = witness.committed(1)
    assert [s for s in steps if s % 20 == 0] == list(range(20, steps[-1] + 1, 20))


def test_a_host_cut_off_in_the_middle_of_a_save(lan: Lan, head: Host, job: Job) -> None:
    near, far = lan.add_ray(head), lan.add_ray(head)
    settings = {"save_steps": 60, "memory_steps": 20, "replicas": 1, "max_to_keep": KEPT}
    # What lies on the far host is never written there, so that its save is under way when the wire is cut.
    stays = job.start(near, "first", 0, 2, settings=settings)
    goes = job.start(far, "first", 1, 2, settings=settings, writes=False)
    with Witness(job.run) as witness:
        eventually(lambda: 60 in copies(near, rank=1), "a copy of rank 1's part of step 60", LONG_S)
        assert witness.committed(1) == []
        far.cut()
        assert until_more_commits(witness, 1, 1)[0] == 60
        stays.kill()
        again = job.start(near, "second", settings=settings)
        restored = again.until("restored")
        assert restored >= 60
        until_more_commits(witness, 2, 1)
        far.mend()
        how = ended_rightly(goes)
        until_more_commits(witness, 2, 1)
        stop(again)
    print(f"restored step {restored}; the worker that was cut off ended {how}")
    witness.check(KEPT)
    found = ray_ckpt.load(str(job.run))
    assert found["by"] == b"second"
    assert np.array_equal(found["table"], states.whole(int(found["step"]))["table"])


def test_two_coordinators_at_once(lan: Lan, head: Host, job: Job) -> None:
    here, there = lan.add_ray(head), lan.add_ray(head)
    first = [job.start(here, "first", rank, 2, coordinator=True) for rank in range(2)]
    with Witness(job.run) as witness:
        assert first[0].until("coordinator") in here.pids()
        until_more_commits(witness, 1, 2)
        here.cut()
        second = [job.start(there, "second", rank, 2, after=here.address) for rank in range(2)]
        first[0].until_step(5)
        assert second[0].until("coordinator") not in here.pids()
        until_more_commits(witness, 2, 2)
        here.mend()
        how = [ended_rightly(trainer) for trainer in first]
        until_more_commits(witness, 2, 2)
        stop(*second)
    print(f"the workers that were cut off ended {', '.join(how)}")
    witness.check(KEPT)
    takeover = [r.epoch for r in witness.log("seal") if r.generation and r.generation.number == 2]
    before = [r.step for r in witness.log("commit") if r.epoch < takeover[0]]
    assert [t.told("restored") for t in second] == [[before[-1]]] * 2
    assert {r.epoch for r in witness.log() if r.sequence > witness.log("seal")[-1].sequence} == set(takeover)
    for checkpoint in ray_ckpt.checkpoints(str(job.run)):
        by = ray_ckpt.load(str(job.run), checkpoint.step)["by"]
        assert by == {1: b"first", 2: b"second"}[checkpoint.generation]
