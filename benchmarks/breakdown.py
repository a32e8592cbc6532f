"""``python -m benchmarks.breakdown``: where the time and the CPU of a save go, phase by phase and process by process.

The phases are from the timeline that each save leaves beside its checkpoint; the CPU seconds are what each process of
the job has used from the call of `save` until `wait` returned.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import typer

from benchmarks import machine
from benchmarks.bounds import Bounds, sync_file_system
from benchmarks.cases import CASES, Case
from benchmarks.meters import remove
from benchmarks.report import publish
from benchmarks.rows import ROOT
from benchmarks.saving import LazyArrays
from benchmarks.subjects.ours import Ours
from ray_ckpt.timeline import Timeline, timelines

PHASES = ("copy", "hand over", "write", "commit", "tell", "all")
ROLES = ("trainer", "agent", "writers", "coordinator", "Ray")
BOUNDS = ("memcpy", "crc", "write + fsync")

Save = dict[str, float]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def breakdown(
    cases: Annotated[str, typer.Option(help="of big,small,quick")] = "big,small",
    saves: Annotated[int, typer.Option(min=1, help="measured ones; two more come first")] = 9,
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    out: Annotated[Path, typer.Option(help="where the tables go")] = ROOT / "benchmarks" / "results" / "breakdown.md",
) -> None:
    """Save each case in both places, and write the medians."""
    disk.mkdir(parents=True, exist_ok=True)
    places = {"disk": str(disk), "shm": "/dev/shm"}
    text = "# Where a save's time goes\n\nMedians, milliseconds. `benchmarks/breakdown.py` says what they are of.\n"
    for name in cases.split(","):
        for place, folder in places.items():
            text += f"\n## {CASES[name].title}, {place}\n\n{_table(_measure(CASES[name], folder, saves))}"
    meta = machine.describe(places, "benchmarks.breakdown")
    text += "\n".join(["\n## Made by\n", *(f"- {key}: {value}" for key, value in meta.items()), ""])
    publish(text, out)


def _measure(case: Case, folder: str, saves: int) -> list[Save]:
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        Ours.prepare(case, directory)
        subject = Ours(case, 0, directory)
        try:
            subject.start(LazyArrays(case, 0))
            gc.collect()
            bounds = Bounds(case.nbytes, f"{directory}/bound")
            found = [_save(subject, step, bounds) for step in range(1, saves + 3)][2:]
            spans = {timeline.step: timeline for timeline in timelines(directory)}
            subject.close()
        finally:
            Ours.tear_down()
    return [{**save, **_phases(save, spans[int(save["step"])])} for save in found]


def _save(subject: Ours, step: int, bounds: Bounds) -> Save:
    sync_file_system(subject.directory)
    found = {"step": step, "memcpy": bounds.memcpy(), "crc": bounds.crc()}
    began, ended = bounds.write()
    found["write + fsync"] = ended - began
    before = _cpu_s()
    found["began"] = time.time()
    subject.save(step)
    subject.wait()
    found["told"] = time.time()
    after = _cpu_s()
    if step > 1:
        remove(subject.files(step - 1))
    return {**found, **{f"CPU {role}": after[role] - before[role] for role in ROLES}}


def _phases(save: Mapping[str, float], timeline: Timeline) -> Save:
    (snapshot,) = timeline.snapshots
    first, last = min(s.began for s in timeline.shards), max(s.ended for s in timeline.shards)
    return {
        "copy": snapshot.sealed - save["began"],
        "hand over": first - snapshot.sealed,
        "write": last - first,
        "commit": timeline.committed - last,
        "tell": save["told"] - timeline.committed,
        "all": save["told"] - save["began"],
    }


def _cpu_s() -> Counter[str]:
    """User and system seconds so far by role, of this process and all below it."""
    found: Counter[str] = Counter()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times, title = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        found[_role(process.pid, title)] += times.user + times.system
    return found


def _role(pid: int, title: str) -> str:
    if pid == psutil.Process().pid:
        return "trainer"
    names = {"Agent": "agent", "Coordinator": "coordinator", "IDLE": "writers", "ray_ckpt": "writers"}
    return next((role for start, role in names.items() if title.startswith(f"ray::{start}")), "Ray")


def _table(saves: list[Save]) -> str:
    names = [*PHASES, *BOUNDS, *(f"CPU {role}" for role in ROLES)]
    values = [f"{1000 * median(save[name] for save in saves):.0f}" for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), values)) + "\n"


if __name__ == "__main__":
    app()
