"""What happens in a soak: a sequence that its seed decides; only the exact moments are the machine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Kind = Literal["trainer", "all trainers", "agent", "writer", "coordinator", "host", "storage", "resize"]
Wait = Literal["commit", "restore", "nothing"]
StoreKind = Literal["file", "gs"]

KINDS: dict[Kind, int] = {
    "trainer": 4,
    "all trainers": 2,
    "agent": 3,
    "writer": 3,
    "coordinator": 3,
    "host": 1,
    "storage": 2,
    "resize": 1,
}
"""How often each happens in a round."""

WORLDS = (1, 2, 3, 4, 4, 5, 6)
SIZES = (16, 64, 64, 2400)
RUN_EVENTS = 20


@dataclass(frozen=True)
class Event:
    """``wait``: for what of the job, and then ``after_s``, before it strikes. ``choice``: which process, host or fault.

    ``world``: the ranks of the job, should it start anew; ``lasts_s``: a storage fault; ``with_kill``: what is killed
    in the middle of it.
    """

    kind: Kind
    wait: Wait
    after_s: float
    choice: int
    world: int
    lasts_s: float
    with_kill: Kind | None


@dataclass(frozen=True)
class RunPlan:
    """One directory: the settings of its job, the size of its state, what happens to it."""

    number: int
    seed: int
    store: StoreKind
    columns: int
    pace_s: float
    world: int
    settings: dict[str, Any]
    events: tuple[Event, ...]


def plans(
    seed: int, stores: Sequence[StoreKind] = ("file", "gs"), sizes: Sequence[int] = SIZES, events: int = RUN_EVENTS
) -> Iterator[RunPlan]:
    """Runs without end. ``sizes``: in columns, see `Model`; every kind of event comes in its turn."""
    rng = Random(seed)
    kinds = _shuffled(rng)
    number = 0
    while True:
        number += 1
        yield RunPlan(
            number=number,
            seed=rng.randrange(2**31),
            store=stores[number % len(stores)],
            columns=rng.choice(sizes),
            pace_s=rng.uniform(0.01, 0.04),
            world=rng.choice(WORLDS),
            settings=_settings(rng),
            events=tuple(_event(rng, next(kinds)) for _ in range(events)),
        )


def _settings(rng: Random) -> dict[str, Any]:
    save_steps = rng.choice((4, 8, 12))
    return {
        "save_steps": save_steps,
        "max_to_keep": rng.choice((2, 4, 8)),
        "keep_every_steps": rng.choice((None, 20 * save_steps)),
        "delete_grace_s": rng.choice((0.0, 1.0)),
        "overlap": rng.choice(("wait", "wait", "skip", "coalesce")),
        "max_failures": rng.choice((3, 1000)),
        "snapshots": rng.choice((2, 2, 3)),
        "writers_per_host": rng.choice((1, 2)),
        "memory_steps": rng.choice((None, 1, 3)),
        "replicas": rng.choice((0, 1, 1)),
    }


def _shuffled(rng: Random) -> Iterator[Kind]:
    while True:
        bag = [kind for kind, count in KINDS.items() for _ in range(count)]
        rng.shuffle(bag)
        yield from bag


def _event(rng: Random, kind: Kind) -> Event:
    return Event(
        kind=kind,
        wait=rng.choices(("commit", "restore", "nothing"), (6, 1, 1))[0],
        after_s=rng.uniform(0.0, 3.0),
        choice=rng.randrange(2**16),
        world=rng.choice(WORLDS),
        lasts_s=rng.uniform(2.0, 8.0),
        with_kill=rng.choice((None, "trainer", "agent", "coordinator")),
    )
