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
MARK = " \N{DAGGER}"


def draw(rows: Sequence[Mapping[str, Any]], path: Path, case: str = "big", place: str = "disk") -> None:
    """Four panels of bars from zero, with the bound as a line; no picture where nothing was measured."""
    chosen = [row for row in rows if (row["case"], row["place"]) == (case, place) and row.get("saving")]
    if not chosen:
        return
    bounds = rules.bounds(chosen)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 1.8 + 0.34 * len(chosen)), sharey=True)
    for axis, (value, bound, title, bound_name) in zip(axes, PANELS, strict=True):
        _panel(axis, chosen, value, title)
        if bounds[bound]:
            axis.axvline(bounds[bound], color=BOUND, linewidth=1.4, zorder=2)
            axis.set_xlabel(f"seconds; red: {bound_name}, {bounds[bound]:.2g} s", fontsize=9)
    names = [row["name"] + (MARK if row.get("gives_up") else "") for row in chosen]
    axes[0].set_yticks(range(len(chosen)), names, fontsize=10)
    axes[0].set_ylim(len(chosen) - 0.4, -0.6)
    figure.suptitle(f"{CASES[case].title}, on {place}: medians, shorter is better", fontsize=12)
    figure.text(0.005, 0.01, f"{MARK.strip()} gives up what others do, see the table", fontsize=8, color="dimgray")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, rows: Sequence[Mapping[str, Any]], value: str, title: str) -> None:
    found = [rules.summary(row)[value] for row in rows]
    longest = max((seconds for seconds in found if seconds is not None), default=1.0)
    label: dict[str, Any] = {"va": "center", "fontsize": 9, "zorder": 3}
    for y, (row, seconds) in enumerate(zip(rows, found, strict=True)):
        if seconds is None:
            axis.text(longest * 0.02, y, "not measured", color="gray", **label)
            continue
        axis.barh(y, seconds, color=OURS if row["subject"].startswith("ours") else OTHERS, height=0.68, zorder=1)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axis.text(max(seconds, 0) + longest * 0.02, y, f"{seconds:.2g}", bbox=box, **label)
    axis.set_xlim(min(0.0, *(seconds for seconds in found if seconds is not None), 0.0), longest * 1.22)
    axis.set_title(title, fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
