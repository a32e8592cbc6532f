"""``python -m benchmarks.quick``: does ray_ckpt still have the speed it had? Ratios against the stored ones.

Ratios to bounds of this machine at this moment, not seconds, so that the stored ones mean something elsewhere; what is
Python's own work is in units of a fixed piece of Python work.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.rows import ROOT, measure_row
from benchmarks.rules import summary
from benchmarks.task import Task

STORED = ROOT / "benchmarks" / "results" / "quick.json"
FACTOR = 1.5
ALLOWANCE = 0.15
LOST = "lost / memcpy"
LOST_ALLOWANCE = 2.0
MARGIN = (
    f"Allowed: {FACTOR} x the stored ratio + {ALLOWANCE}, + {LOST_ALLOWANCE} for lost time, a small difference of large"
    " times. Medians of five differ by up to a third from run to run on a virtual machine with two cores, those of the"
    " quickest by some ms more; what a change to the code does wrong (another copy, one write after another, work for"
    " each tensor) costs more than that."
)
ROWS = (("quick", "disk"), ("quick", "shm"), ("small", "shm"))
CALLS = 20_000

Values = dict[str, float]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def quick(
    store: Annotated[bool, typer.Option("--store", help="make what is found the new measure")] = False,
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
) -> None:
    """Measure ray_ckpt alone, in under three minutes; exit code 1 if a ratio is above the margin."""
    console = Console()
    disk.mkdir(parents=True, exist_ok=True)
    values: Values = {}
    for case, place in ROWS:
        with console.status(f"{case} on {place}"):
            values |= _row(case, place, str(disk if place == "disk" else "/dev/shm"))
    with console.status("step()"):
        values[f"{CALLS} x step(), nothing due / Python work"] = CALLS * _step_s() / yardstick_s()
    stored: Values = json.loads(STORED.read_text())["values"] if STORED.exists() else {}
    console.print(_table(values, stored))
    console.print(MARGIN, highlight=False)
    if store:
        meta = machine.describe({"disk": str(disk)})
        STORED.parent.mkdir(parents=True, exist_ok=True)
        rounded = {name: round(value, 3) for name, value in values.items()}
        STORED.write_text(json.dumps({"meta": meta, "values": rounded}, indent=1) + "\n")
    elif slower(values, stored):
        raise typer.Exit(1)


def slower(values: Mapping[str, float], stored: Mapping[str, float]) -> list[str]:
    """Names of what is above the margin; what was not stored has none."""
    return [name for name, value in values.items() if name in stored and value > allowed(name, stored[name])]


def allowed(name: str, stored: float) -> float:
    """What a ratio may be. Lost time may be negative by chance: that buys nothing."""
    return FACTOR * max(stored, 0.0) + (LOST_ALLOWANCE if LOST in name else ALLOWANCE)


def yardstick_s() -> float:
    """Seconds of a fixed piece of Python work, best of five: names, a dictionary, bytes, a sort."""
    return min(_timed_work() for _ in range(5))


def _timed_work() -> float:
    began = time.perf_counter()
    names = {f"layer/{number % 97}/{number}": number for number in range(20_000)}
    b"".join(name.encode() for name in sorted(names))
    return time.perf_counter() - began


def _row(case: str, place: str, folder: str) -> Values:
    """The ratios of one case in one place."""
    root = f"{folder}/bench-quick-{case}"
    shutil.rmtree(root, ignore_errors=True)
    work_s = yardstick_s()
    row = measure_row(Task("saving", "ours", case, place, root, "", budget_s=12.0), ("saving", "restoring"))
    if "error" in row:
        raise typer.BadParameter(f"{case} on {place} gave no result: {row['error']}\n{row.get('said', '')}")
    found = summary(row)
    where = f"{case}, {place}: "
    if case == "small":
        parts = ("blocked", "committed", "warm")
        return {f"{where}{name} / Python work": found[name] / work_s for name in parts}
    names = {"blocked": "memcpy", "durable": "write", "warm": "read"}
    values = {f"{where}{name} / {bound}": found[f"{name}_ratio"] for name, bound in names.items()}
    memcpy = statistics.median(save["memcpy"] for save in row["saving"]["quiet"])
    return values | {where + LOST: found["lost"] / memcpy}


def _step_s() -> float:
    """Median seconds of a `Checkpointer.step` when nothing is due."""
    from benchmarks.cases import CASES
    from benchmarks.subjects.ours import Ours
    from ray_ckpt import Checkpointer

    with tempfile.TemporaryDirectory() as folder:
        Ours.prepare(CASES["quick"], folder)
        try:
            return _step_median(Checkpointer(folder, save_steps=10**9))
        finally:
            Ours.tear_down()


def _step_median(checkpointer: Any) -> float:
    state = {"w": np.zeros(1000, np.float32)}
    times = []
    with checkpointer as ckpt:
        for step in range(CALLS):
            began = time.perf_counter()
            ckpt.step(step, state)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _table(values: Values, stored: Values) -> Table:
    table = Table("ratio", "now", "stored", "allowed", "")
    late = slower(values, stored)
    for name, value in values.items():
        known = name in stored
        before = (f"{stored[name]:.2f}", f"{allowed(name, stored[name]):.2f}") if known else ("-", "-")
        table.add_row(name, f"{value:.2f}", *before, "[red]slower[/]" if name in late else "ok" if known else "new")
    return table


if __name__ == "__main__":
    app()
