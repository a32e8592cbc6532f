"""The head node goes with its GCS, its raylet and the coordinator on it, and comes back."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot import WHOLE, Segment
from tests.system.lan import Host, Lan, lan_of, why_not
from tests.system.trainers import KEPT, LONG_S, Job, stop, until_more_commits
from tests.system.waiting import eventually
from tests.system.witness import Witness

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

_REDIS_PORT = 6380
_WITHOUT_HEAD_S = "600"
"""So long a raylet waits for its GCS: KubeRay's setting for clusters with fault tolerance."""
_SOON_S = "10"


def start_redis(host: Host, folder: Path) -> dict[str, str]:
    """Ray's settings for a GCS that keeps its tables there."""
    where = ("--bind", "0.0.0.0", "--port", str(_REDIS_PORT), "--protected-mode", "no")
    host.run("redis-server", *where, "--save", "", "--dir", str(folder), log="redis.log")
    eventually(lambda: "Ready to accept" in (folder / "redis.log").read_text(), "redis")
    return {
        "RAY_REDIS_ADDRESS": f"{host.address}:{_REDIS_PORT}",
        "RAY_external_storage_namespace": "of-this-test",
    }


@pytest.fixture
def lan(request: pytest.FixtureRequest) -> Iterator[Lan]:
    with lan_of(RAY_gcs_rpc_server_reconnect_timeout_s=request.param) as found:
        yield found


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server, which keeps the GCS's tables")
@pytest.mark.parametrize("lan", [_WITHOUT_HEAD_S], indirect=True)
def test_a_job_goes_on_through_the_head_s_restart(lan: Lan) -> None:
    redis = start_redis(lan.add(), lan.folder)
    head, host = lan.add(), lan.add()
    head.start_ray(None, **redis)
    host.start_ray(head)
    with Job(lan, head, "job") as job, Witness(job.run) as witness:
        # No step waits for a save that cannot be committed meanwhile.
        settings = {"save_steps": 20, "max_to_keep": KEPT, "overlap": "skip"}
        trainers = [job.start(host, "only", rank, 2, settings=settings) for rank in range(2)]
        coordinator = trainers[0].until("coordinator")
        assert coordinator in head.pids()
        until_more_commits(witness, 1, 2)
        head.kill("gcs_server", "raylet")
        eventually(lambda: coordinator not in head.pids(), "the end of the coordinator with its raylet")
        head.kill()
        lost_at = time.monotonic()
        trainers[0].until_step(50)
        head.start_ray(None, **redis)
        back_at = time.monotonic()
        until_more_commits(witness, 1, 2)
        saved_at = time.monotonic()
        stop(*trainers)
    print(f"without a head for {back_at - lost_at:.0f} s, two saves {saved_at - back_at:.0f} s after it was back")
    witness.check(KEPT)
    assert len(witness.log("seal")) == 1
    assert [r.epoch for r in witness.log("claim")] == [1, 2]
    assert [t.told("error") for t in trainers] == [[], []]


def whole(host: Host, ranks: int) -> set[int]:
    """The steps of which every rank has a whole snapshot on this host."""
    steps: dict[int, set[int]] = {}
    for path in host.memory.glob("*/*.segment"):
        with contextlib.suppress(StorageError), Segment.open(path) as segment:
            if segment.state in WHOLE and segment.save is not None:
                steps.setdefault(segment.save.step, set()).add(segment.save.rank)
    return {step for step, found in steps.items() if len(found) == ranks}


@pytest.mark.parametrize("lan", [_SOON_S], indirect=True)
def test_a_new_cluster_on_the_same_machines_restores_from_their_memory(lan: Lan) -> None:
    head, host = lan.add_rays(2)
    settings = {"settings": {"save_steps": 10_000, "memory_steps": 10, "max_to_keep": KEPT}}
    with Job(lan, head, "job") as job, Witness(job.run) as witness:
        trainers = [job.start(host, "first", rank, 2, **settings) for rank in range(2)]
        eventually(lambda: max(whole(host, 2), default=0) >= 20, "step 20 in memory", LONG_S)
        head.kill()
        # Without fault tolerance of the GCS the rest of the cluster ends after a while.
        eventually(lambda: not host.pids("raylet"), "the end of the raylet", LONG_S)
        for trainer in trainers:
            assert trainer.until_ended() != 0
            assert trainer.told("error") == []
        host.kill()
        newest = max(whole(host, 2))
        assert ray_ckpt.checkpoints(str(job.run)) == []
        head.start_ray()
        host.start_ray(head)
        again = [job.start(host, "second", rank, 2, **settings) for rank in range(2)]
        assert [trainer.until("restored") for trainer in again] == [newest, newest]
        stop(*again)
    witness.check(KEPT)
    found = ray_ckpt.load(str(job.run))
    assert found["by"] == b"second"
    assert found["step"] >= newest
