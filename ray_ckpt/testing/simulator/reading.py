"""What a rank reads at its start: the memory of hosts where it is told who holds the bytes, else the store."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_ckpt.protocol.messages import RestoreDecision
from ray_ckpt.testing.simulator.rule import damage_of, parsed

if TYPE_CHECKING:
    from ray_ckpt.testing.simulator.trainer import Trainer

Rows = frozenset[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Read:
    """``rows``: (name, offset, shape, token) of all that was read; None with the ``damage`` that it met."""

    rows: Rows | None
    damage: str | None = None
    remembered: bool = False


def read(trainer: Trainer, decision: RestoreDecision) -> Generator[float, None, Read]:
    """Read what was decided, over time."""
    yield trainer.world.rng.uniform(0.05, 0.8)
    found = Read(frozenset())
    if decision.holders and not trainer.scenario.wish(trainer.start.number).stored:
        found = yield from _recall(trainer, decision)
        if found.rows is not None:
            return found
    chosen = decision.checkpoint
    if chosen is None:
        return found if decision.snapshot is None or found.damage else Read(None, "nobody holds the snapshot")
    objects = trainer.world.disk.objects
    damage = damage_of(objects, chosen.prefix)
    if damage is not None:
        return Read(None, damage)
    entries = parsed(objects[f"{chosen.prefix}.index"])["entries"]
    return Read(as_rows(e for e in entries if e[0] != "_ray_ckpt"))


def as_rows(entries: Any) -> Rows:
    """Entries of shards, comparable."""
    return frozenset((name, tuple(offset), tuple(shape), token) for name, offset, shape, token in entries)


def _recall(trainer: Trainer, decision: RestoreDecision) -> Generator[float, None, Read]:
    chosen = decision.checkpoint
    save = decision.snapshot or ((chosen.generation, chosen.step) if chosen is not None else None)
    assert save is not None
    world, entries = trainer.world, []
    for rank, names in enumerate(decision.holders):
        hosts = [host for name in names if (host := world.cluster.named(name)) is not None]
        slot = next((slot for host in hosts if (slot := host.find(rank, save, trainer.where)) is not None), None)
        if slot is None:
            return Read(None, f"{names} do not answer, or do not hold rank {rank} of {save}")
        fills = slot.fills
        entries += [entry for writer in slot.contents for entry in writer]
        yield world.rng.uniform(0.0, 0.1)
        if not slot.whole or slot.fills != fills:
            return Read(None, f"{slot.name} was overwritten while it was read")
    return Read(as_rows(entries), remembered=True)
