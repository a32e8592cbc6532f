"""The picture of the field: what a save and a restore of 1 GiB cost in each system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import rules
from benchmarks.cases import CASES

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PANELS = (
    ("blocked", "memcpy", "the save call blocks", "memcpy"),
    ("lost", "memcpy", "training time lost in all", "memcpy"),
    ("durable", "write", "until it is on the device", "write + fsync"),
    ("warm", "read", "restore, warm", "read"),
)
OURS, OTHERS, BOUND = "#1b6ca8", "#b8bfc6", "#c0392b"
FLOOR_S = 0.01


def draw(rows: Sequence[Mapping[str, Any]], path: Path, case: str = "big", place: str = "disk") -> None:
    """Four panels of bars beside the bounds, on a log axis; nothing where nothing was measured."""
    chosen = [row for row in rows if (row["case"], row["place"]) == (case, place) and row.get("saving")]
    if not chosen:
        return
    bounds = rules.bounds(chosen)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 1.6 + 0.34 * len(chosen)), sharey=True)
    for axis, (value, bound, title, bound_name) in zip(axes, PANELS, strict=True):
        _panel(axis, chosen, value, title)
        if bounds[bound]:
            axis.axvline(bounds[bound], color=BOUND, linewidth=1.4)
            axis.set_xlabel(f"seconds; line: {bound_name}, {bounds[bound]:.2g} s", fontsize=9)
    axes[0].set_yticks(range(len(chosen)), [row["name"] for row in chosen], fontsize=10)
    axes[0].invert_yaxis()
    figure.suptitle(f"{CASES[case].title}, {place}; medians, log scale, shorter is better", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, rows: Sequence[Mapping[str, Any]], value: str, title: str) -> None:
    found = [rules.summary(row)[value] for row in rows]
    known = [seconds for seconds in found if seconds is not None]
    axis.set_xscale("log")
    axis.set_xlim(FLOOR_S / 2, max([*known, 1.0]) * 4)
    for y, (row, seconds) in enumerate(zip(rows, found, strict=True)):
        if seconds is None:
            axis.text(FLOOR_S, y, "not measured", va="center", fontsize=8, color="gray")
            continue
        width = max(seconds, FLOOR_S)
        axis.barh(y, width, color=OURS if row["subject"].startswith("ours") else OTHERS, height=0.68)
        axis.text(width * 1.12, y, f"{seconds:.2g}", va="center", fontsize=9)
    axis.set_title(title, fontsize=11)
    axis.grid(axis="x", which="major", alpha=0.3)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
