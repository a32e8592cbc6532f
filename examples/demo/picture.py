"""Draws what happened: the loss over both starts, the saves of every host, and the killed save enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from examples.demo.drill import Outcome
from examples.demo.journal import Story
from ray_ckpt.timeline import Timeline

# Okabe and Ito's palette, which colour-blind people can tell apart; kinds differ in their row as well.
SETUP, TRAINING, STALL, SNAPSHOT, WRITE = "#d9d9d9", "#9fd0f0", "#D55E00", "#E69F00", "#009E73"
COMMIT, KILL, WINDOW = "#333333", "#CC0000", "#F0E442"
STARTS = ("#0072B2", "#AA4499")

_LOST: dict[str, Any] = {"hatch": "////", "edgecolor": TRAINING, "linewidth": 0.5}

LANES = {"training": 0.36, "snapshot": 0.10, "write": -0.16}
"""Where each kind of work lies in a host's row, above or below its middle."""

_HEIGHT = 0.22
_ENLARGED_BEFORE_S = 0.4
_ENLARGED_AFTER_S = 0.1

Bars = list[tuple[float, float]]
"""(begin, width) of each, in seconds since the picture's zero."""


def bars(spans: Sequence[tuple[float, float]], zero: float, least_s: float = 0.0) -> Bars:
    """Spans of time as bars; ``least_s`` keeps short ones visible."""
    return [(begin - zero, max(end - begin, least_s)) for begin, end in spans]


def runs(spans: Sequence[tuple[float, float]], gap_s: float) -> list[tuple[float, float]]:
    """Spans in order, joined where less than ``gap_s`` lies between them: many small bars look ragged."""
    joined: list[tuple[float, float]] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] < gap_s:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def draw(outcome: Outcome, saves: Sequence[Timeline], path: Path) -> Path:
    """The picture as a PNG."""
    stories = [*outcome.before, *outcome.after]
    zero = min(story.restored.began for story in stories if story.restored)
    figure = Figure(figsize=(15, 12), layout="constrained")
    loss, whole, enlarged = figure.subplots(3, 1, height_ratios=(2, 4, 4))
    end = max([*(story.steps[-1].ended for story in stories if story.steps), *(save.committed for save in saves)])
    all_of_it = (0.0, 1.02 * (end - zero))
    _draw_loss(loss, outcome, saves, zero, all_of_it)
    _draw_hosts(whole, outcome, saves, zero, all_of_it, enlarge=False)
    killed = [save for save in saves if save.step == outcome.killed_step]
    first = min((s.due for save in killed for s in save.snapshots), default=outcome.killed_at)
    last = max([outcome.killed_at, *(save.committed for save in killed)])
    window = (first - zero - _ENLARGED_BEFORE_S, last - zero + _ENLARGED_AFTER_S)
    _draw_hosts(enlarged, outcome, killed, zero, window, enlarge=True)
    whole.axvspan(*window, color=WINDOW, alpha=0.45, zorder=0)
    whole.set_title("what every host did; dotted: commits, with their steps", loc="left")
    title = f"enlarged: the save of step {outcome.killed_step}, during which one process is killed"
    enlarged.set_title(title, loc="left")
    enlarged.set_xlabel("seconds since the job was started")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("A job saves while it trains, loses a process in the middle of a save, and goes on", fontsize=15)
    figure.savefig(path, dpi=110)
    return path


def _draw_loss(
    axes: Any, outcome: Outcome, saves: Sequence[Timeline], zero: float, window: tuple[float, float]
) -> None:
    for start, stories in enumerate((outcome.before, outcome.after)):
        steps = stories[0].steps
        label = f"start {start + 1}, {len(stories)} hosts"
        times = [step.trained - zero for step in steps]
        axes.plot(times, [step.eval_loss for step in steps], ".-", color=STARTS[start], label=label, markersize=4)
    axes.set_ylabel("loss on the fixed batch")
    by_step = {step.step: step for story in (outcome.before[0], outcome.after[0]) for step in story.steps}
    for save in saves:
        axes.axvline(save.committed - zero, color=COMMIT, linewidth=0.8, linestyle=":")
        if save.step in by_step:
            step = by_step[save.step]
            axes.plot(step.trained - zero, step.eval_loss, "D", color=COMMIT, markersize=5)
    _mark_kill(axes, outcome, zero)
    _mark_restore(axes, outcome, zero)
    axes.legend(loc="upper right")
    axes.set_title("the loss goes on where it was (diamonds: saved steps)", loc="left")
    axes.set_xlim(*window)
    axes.grid(axis="y", alpha=0.3)


def _draw_hosts(
    axes: Any, outcome: Outcome, saves: Sequence[Timeline], zero: float, window: tuple[float, float], *, enlarge: bool
) -> None:
    least_s = 0.0 if enlarge else (window[1] - window[0]) / 600
    hosts = sorted({story.host for story in outcome.before})
    for start, stories in enumerate((outcome.before, outcome.after), 1):
        for story in stories:
            row = len(hosts) - 1 - hosts.index(story.host)
            _draw_process(axes, story, row, zero, least_s, enlarge=enlarge)
            if start == 1 and story.steps:
                lost = [(story.steps[-1].ended, outcome.killed_at)]
                _bars(axes, bars(lost, zero), row + LANES["training"], "white", **_LOST)
            own = [save for save in saves if save.generation == _generation(saves, start)]
            _draw_saves(axes, story.rank, own, row, zero, least_s)
    for save in saves:
        # The last two may lie close together: the final save does not wait for its turn.
        _mark_commit(
            axes, save, len(hosts), zero, enlarge=enlarge, side="right" if enlarge or save != saves[-1] else "left"
        )
    _mark_kill(axes, outcome, zero)
    row = len(hosts) - 1 - hosts.index(outcome.killed_host)
    axes.plot(outcome.killed_at - zero, row + LANES["training"], "X", color=KILL, markersize=13, zorder=9)
    axes.set_yticks(range(len(hosts)), [f"host {host}" for host in reversed(hosts)])
    axes.set_ylim(-0.5, len(hosts) - 0.1)
    axes.set_xlim(*window)
    for row in range(1, len(hosts)):
        axes.axhline(row - 0.42, color="#cccccc", linewidth=0.6)


def _generation(saves: Sequence[Timeline], start: int) -> int:
    """The generation number of a start: they count up in a directory."""
    numbers = sorted({save.generation for save in saves})
    return numbers[start - 1] if start <= len(numbers) else -1


def _draw_process(axes: Any, story: Story, row: int, zero: float, least_s: float, *, enlarge: bool) -> None:
    if story.restored is None or not story.steps:
        return
    # The first step compiles, which takes much longer than the step.
    setup = [(story.restored.began, story.steps[0].trained)]
    _bars(axes, bars(setup, zero), row + LANES["training"], SETUP)
    training = [(step.began, step.trained) for step in story.steps[1:]]
    training = training if enlarge else runs(training, 1.0)
    stalls = [(step.trained, step.ended) for step in story.steps if step.saved]
    edge = {"edgecolor": "white", "linewidth": 0.8} if enlarge else {}
    _bars(axes, bars(training, zero), row + LANES["training"], TRAINING, **edge)
    _bars(axes, bars(stalls, zero, least_s), row + LANES["training"], STALL)


def _draw_saves(axes: Any, rank: int, saves: Sequence[Timeline], row: int, zero: float, least_s: float) -> None:
    snapshots = [(s.due, s.sealed) for save in saves for s in save.snapshots if s.rank == rank]
    writes = [(s.began, s.ended) for save in saves for s in save.shards if s.rank == rank]
    _bars(axes, bars(snapshots, zero, least_s), row + LANES["snapshot"], SNAPSHOT)
    _bars(axes, bars(writes, zero, least_s), row + LANES["write"], WRITE)


def _bars(axes: Any, spans: Bars, middle: float, color: str, **style: Any) -> None:
    axes.broken_barh(spans, (middle - _HEIGHT / 2, _HEIGHT), facecolors=color, **style)


def _mark_commit(axes: Any, save: Timeline, rows: int, zero: float, *, enlarge: bool, side: str) -> None:
    at = save.committed - zero
    axes.axvline(at, color=COMMIT, linewidth=1.6 if enlarge else 1.0, linestyle="-" if enlarge else ":")
    text = f"step {save.step} committed " if enlarge else str(save.step)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(at, rows - 0.3, text, ha=side, fontsize=10, color=COMMIT, bbox=white)


def _mark_restore(axes: Any, outcome: Outcome, zero: float) -> None:
    """From the saved state's loss to that of the restored one."""
    story = outcome.after[0]
    if story.restored is None or not story.steps:
        return
    loss, at = story.restored.eval_loss, story.steps[0].began - zero
    axes.plot([outcome.killed_at - zero, at], [loss, loss], color=COMMIT, linewidth=1, linestyle="--")
    axes.plot(at, loss, "D", markerfacecolor="white", markeredgecolor=STARTS[1], markersize=7)
    text = f"step {story.restored.step} restored on {len(outcome.after)} hosts: {loss:.4f}"
    axes.annotate(text, (at, loss), xytext=(9, 6), textcoords="offset points")


def _mark_kill(axes: Any, outcome: Outcome, zero: float) -> None:
    axes.axvline(outcome.killed_at - zero, color=KILL, linewidth=1.4, linestyle="--")


def _legend() -> list[Any]:
    return [
        Patch(color=SETUP, label="set-up, restore, compilation"),
        Patch(color=TRAINING, label="training steps"),
        Patch(facecolor="white", label="step lost by the kill", **_LOST),
        Patch(color=STALL, label="stall: step() holds training"),
        Patch(color=SNAPSHOT, label="snapshot: due until sealed"),
        Patch(color=WRITE, label="write of a shard"),
        Line2D([], [], color=COMMIT, linestyle=":", label="commit, with its step"),
        Line2D([], [], color=KILL, linestyle="--", marker="X", markersize=10, label="SIGKILL"),
        Patch(color=WINDOW, alpha=0.45, label="enlarged below"),
    ]
