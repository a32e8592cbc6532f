"""Layouts beside the segments, as JSON: a snapshot stays explainable when its trainer and its agent are gone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ray_ckpt.snapshot.table import counts
from ray_ckpt.strict_json import MALFORMED
from ray_ckpt.types import Box, Layout, LeafSpec

_SUFFIX = ".layout"


def keep_layout(folder: str | Path, layout: Layout) -> None:
    """Write the layout into the folder, unless it is there."""
    path = Path(folder) / (layout.fingerprint + _SUFFIX)
    if path.exists():
        return
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([layout.tree, [_row(leaf) for leaf in layout.leaves]], separators=(",", ":")))
    partial.rename(path)


def read_layouts(folder: str | Path) -> dict[str, Layout]:
    """All layouts of the folder by fingerprint; what is not readable is left out."""
    found = {}
    for path in sorted(Path(folder).glob("*" + _SUFFIX)):
        try:
            tree, rows = json.loads(path.read_text())
            leaves = tuple(_leaf(row) for row in rows)
        except (OSError, *MALFORMED):
            continue
        found[path.stem] = Layout(leaves, tree, path.stem)
    return found


def _row(leaf: LeafSpec) -> list[Any]:
    return [leaf.name, leaf.dtype, leaf.shape, leaf.kind, [[box.offset, box.shape] for box in leaf.boxes]]


def _leaf(row: list[Any]) -> LeafSpec:
    name, dtype, shape, kind, boxes = row
    pairs = tuple(Box(counts(offset), counts(extent)) for offset, extent in boxes)
    return LeafSpec(str(name), str(dtype), counts(shape), pairs, str(kind))
