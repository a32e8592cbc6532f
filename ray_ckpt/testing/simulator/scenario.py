"""What one run simulates: the job, its settings, and which faults may strike. Everything else follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from ray_ckpt.protocol.messages import JobConfig, Overlap, RestoreWish

NETWORK_FAULTS = ("loss", "duplicate", "delay", "partition")
STORE_FAULTS = ("store_error", "late_effect", "slow_store", "stale_list")
CRASH_FAULTS = (
    "crash_coordinator",
    "crash_agent",
    "crash_worker",
    "crash_writer",
    "crash_host",
    "false_death",
    "kill_job",
)
ZOMBIE_FAULTS = ("zombie_coordinator", "zombie_worker", "zombie_writer")
FAULTS = (*NETWORK_FAULTS, *STORE_FAULTS, *CRASH_FAULTS, *ZOMBIE_FAULTS)

GRACE_S = 2.0
NEWEST = RestoreWish("newest")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. Entry k of ``world_sizes`` and ``wishes`` is for start k of the job, the last for all after it.

    ``slack``: how many steps a rank may be ahead of the slowest one of its start (collectives), None for any.
    ``explicit``: steps at which all ranks call `save()`; ``requests``: times (s) of requests, alternately by a
    worker and by the driver; ``stop_at``: time of a stop request; ``change_at``: step from which the state has
    another structure; ``kill_at``: times at which the whole job is killed, ``lose_at``: a host is lost, with
    ``lose_head`` the coordinator too. ``horizon``: faults end here. ``moving``: a start may be placed on some of the
    hosts only; ``slice_size``: so many hosts are one failure domain (0: each is); ``write_s``: how long a writer takes
    at least.
    ``crashes``: process kind -> numbers of the crash points at which one is killed.
    """

    seed: int
    hosts: int = 2
    world_sizes: tuple[int, ...] = (2,)
    wishes: tuple[RestoreWish, ...] = (NEWEST,)
    steps: int = 8
    stride: int = 1
    slack: int | None = 2
    save_steps: int | None = 3
    save_secs: float | None = None
    overlap: Overlap = "wait"
    slots: int = 2
    max_to_keep: int | None = 2
    two_writers: bool = False
    explicit: frozenset[int] = frozenset()
    requests: tuple[float, ...] = ()
    stop_at: float | None = None
    change_at: int | None = None
    readers: tuple[float, ...] = ()
    kill_at: tuple[float, ...] = ()
    memory_steps: int | None = None
    replicas: int = 0
    lose_at: tuple[float, ...] = ()
    lose_head: bool = False
    moving: bool = False
    slice_size: int = 0
    write_s: float = 0.0
    horizon: float = 10.0
    interleaved: bool = False
    faults: frozenset[str] = frozenset()
    crashes: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def config(self, start: int) -> JobConfig:
        """The job's settings at its start number ``start`` (from 0)."""
        # A host that has taken a lost one's part over has that of two saves to write.
        patience_s = self.write_s * (6 if self.two_writers else 2)
        return JobConfig(
            world_size=self.world_sizes[min(start, len(self.world_sizes) - 1)],
            save_steps=self.save_steps,
            save_secs=self.save_secs,
            memory_steps=self.memory_steps,
            replicas=self.replicas,
            stride=self.stride,
            overlap=self.overlap,
            slots=self.slots,
            max_to_keep=self.max_to_keep,
            save_timeout_s=15.0 + patience_s,
            settle_timeout_s=6.0 + patience_s,
            host_timeout_s=4.0,
            delete_grace_s=GRACE_S + 2 * self.write_s,
            start=f"{start:03d}",
        )

    def wish(self, start: int) -> RestoreWish:
        """What all ranks ask for at this start."""
        return self.wishes[min(start, len(self.wishes) - 1)]


def draw(seed: int) -> Scenario:
    """A random scenario; some are of a kind that chance alone makes too rarely."""
    rng = random.Random(seed)
    special = rng.random()
    if special < 0.1:
        return _draw_twins(seed, rng)
    if special < 0.15:
        return _draw_return(seed, rng)
    if special < 0.25:
        return _draw_recall(seed, rng)
    if special < 0.35:
        return _draw_loss(seed, rng)
    return _draw_swarm(seed, rng)


def _draw_twins(seed: int, rng: random.Random) -> Scenario:
    """Workers of a start that is over reach the same steps as those of the next one, which is as large."""
    faults = {"kill_job", "zombie_worker", "partition", *rng.sample(FAULTS, 2)} - {"crash_host", "false_death"}
    return Scenario(
        seed=seed,
        hosts=4,
        steps=12,
        slack=rng.choice((0, None)),
        save_steps=rng.choice((1, 2)),
        kill_at=(rng.uniform(1.5, 4.0), rng.uniform(4.0, 8.0)),
        horizon=12.0,
        faults=frozenset(faults),
    )


def _draw_return(seed: int, rng: random.Random) -> Scenario:
    """A start goes back to an older step on purpose, and dies before it has saved anything."""
    return Scenario(
        seed=seed,
        steps=16,
        wishes=(NEWEST, RestoreWish("step", 3), NEWEST),
        max_to_keep=rng.choice((2, 3, None)),
        kill_at=(rng.uniform(4.0, 6.0), rng.uniform(6.5, 9.0)),
        faults=frozenset({"kill_job", *rng.sample(FAULTS, 2)}),
    )


def _draw_recall(seed: int, rng: random.Random) -> Scenario:
    """Restarts find more in memory than in the store."""
    faults = {"kill_job", *rng.sample(FAULTS, rng.choice((0, 0, 1, 2)))}
    hosts = rng.randint(1, 3)
    return Scenario(
        seed=seed,
        hosts=hosts,
        world_sizes=tuple(rng.randint(1, hosts + 1) for _ in range(3)),
        steps=14,
        slack=rng.choice((0, 1, 3)),
        save_steps=rng.choice((3, 5, 20)),
        memory_steps=rng.choice((1, 2)),
        slots=rng.choice((2, 2, 3)),
        replicas=rng.choice((0, 0, 1)),
        kill_at=tuple(sorted(rng.uniform(1.5, 9.0) for _ in range(rng.randint(1, 3)))),
        moving=rng.random() < 0.5,
        horizon=12.0,
        faults=frozenset(faults),
    )


def _draw_loss(seed: int, rng: random.Random) -> Scenario:
    """Hosts are lost while their snapshots are written."""
    hosts = rng.randint(2, 4)
    return Scenario(
        seed=seed,
        hosts=hosts,
        world_sizes=(rng.randint(2, hosts + 1),),
        steps=14,
        save_steps=rng.choice((2, 3)),
        memory_steps=rng.choice((None, None, 1)),
        slots=rng.choice((2, 3)),
        replicas=1,
        two_writers=rng.random() < 0.3,
        lose_at=tuple(sorted(rng.uniform(2.0, 8.0) for _ in range(rng.choice((1, 1, 2))))),
        lose_head=rng.random() < 0.4,
        moving=rng.random() < 0.3,
        slice_size=rng.choice((0, 0, 2)),
        write_s=rng.choice((0.0, 2.0, 4.0)),
        horizon=12.0,
        faults=frozenset(rng.sample(FAULTS, rng.choice((0, 0, 0, 1, 2)))),
    )


def _draw_swarm(seed: int, rng: random.Random) -> Scenario:
    """First which kinds of fault there are at all, then the job."""
    rate = rng.choice((0.0, 0.15, 0.3, 0.5, 0.8))
    faults = frozenset(f for f in FAULTS if rng.random() < rate)
    hosts = rng.randint(1, 3)
    sizes = tuple(rng.randint(1, hosts + 1) for _ in range(rng.randint(1, 3)))
    cadence = rng.choice(("steps", "steps", "seconds", "none"))
    return Scenario(
        seed=seed,
        hosts=hosts,
        world_sizes=sizes,
        wishes=(NEWEST, _draw_wish(rng), NEWEST),
        steps=rng.randint(4, 12),
        stride=rng.choice((1, 1, 1, 2, 3)),
        slack=rng.choice((0, 1, 3, None)),
        save_steps=rng.randint(1, 5) if cadence == "steps" else None,
        save_secs=rng.uniform(0.5, 3.0) if cadence == "seconds" else None,
        overlap=rng.choice(get_args(Overlap)),
        slots=rng.choice((1, 2, 2, 3)),
        max_to_keep=rng.choice((1, 2, 3, None)),
        two_writers=rng.random() < 0.3,
        explicit=frozenset(rng.sample(range(1, 12), rng.choice((0, 0, 1, 3)))),
        requests=tuple(rng.uniform(0.0, 8.0) for _ in range(rng.choice((0, 0, 1, 3)))),
        stop_at=rng.uniform(1.0, 8.0) if rng.random() < 0.15 else None,
        change_at=rng.randint(2, 8) if rng.random() < 0.2 else None,
        readers=tuple(rng.uniform(0.0, 10.0) for _ in range(rng.choice((0, 0, 1, 2)))),
        kill_at=tuple(rng.uniform(0.5, 10.0) for _ in range(rng.choice((1, 2, 2)))) if "kill_job" in faults else (),
        interleaved=rng.random() < 0.3,
        faults=faults,
        memory_steps=rng.choice((None, None, 1, 2, 3)),
        replicas=rng.choice((0, 0, 1)),
        moving=rng.random() < 0.2,
        slice_size=rng.choice((0, 0, 0, 2)),
        write_s=rng.choice((0.0, 0.0, 0.0, 2.0)),
    )


def _draw_wish(rng: random.Random) -> RestoreWish:
    return RestoreWish("step", rng.randint(1, 8)) if rng.random() < 0.3 else NEWEST
