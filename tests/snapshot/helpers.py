"""A state in a sealed segment, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.plan import make_plan
from ray_ckpt.snapshot import SaveId, Segment, needed_nbytes, take_snapshot
from ray_ckpt.types import Plan


def save_id(plan_id: str, step: int = 5, rank: int = 0, world_size: int = 1) -> SaveId:
    return SaveId("run", 2, step, rank, world_size, plan_id, "steps")


def snapshots(folder: Path, states: list[Any], **settings: int) -> tuple[Plan, list[Segment]]:
    """One sealed segment a rank; the caller closes them."""
    found = [layout_of(state, rank, len(states)) for rank, state in enumerate(states)]
    plan = make_plan([layout for layout, _ in found], **settings)
    segments = []
    for rank, (layout, values) in enumerate(found):
        mine = plan.ranks[rank]
        segment = Segment.create(folder / f"{rank}", needed_nbytes(mine, layout, values))
        take_snapshot(segment, mine, layout, values, save_id(plan.plan_id, rank=rank, world_size=len(states)))
        segments.append(segment)
    return plan, segments


def of_version(path: Path, version: bytes) -> Path:
    """An empty segment whose header says that it is of this version of the format."""
    Segment.create(path, 10).close()
    with path.open("r+b") as file:
        file.write(b"RAYCKPT" + version)
    return path
