"""``python -m benchmarks.growth``: does a host's memory stay what it is, save after save?

50 saves of 256 MiB: the machine's memory after every fifth, and the peak above the state, which may be the snapshots
and 256 MiB (Ray itself, started before, is not counted; coordinator, agent and writers are).
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import machine
from benchmarks.cases import CASES
from benchmarks.meters import MemorySampler, memory_nbytes, remove
from benchmarks.report import publish
from benchmarks.rows import ROOT
from benchmarks.saving import LazyArrays
from benchmarks.subjects.ours import Ours
from benchmarks.task import Task
from ray_ckpt.coordinator import run_id
from ray_ckpt.snapshot import default_folder

MIB = 1 << 20
EVERY = 5
MARGIN_NBYTES = 256 * MIB

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def growth(
    saves: Annotated[int, typer.Option(min=EVERY)] = 50,
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    out: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "benchmarks" / "results" / "growth.md",
) -> None:
    """Save again and again, and write how much memory that takes."""
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=disk) as folder, tempfile.TemporaryDirectory() as notes:
        Ours.prepare(CASES["quick"], folder)
        try:
            text = _measure(Ours(CASES["quick"], 0, folder), notes, saves)
        finally:
            Ours.tear_down()
    meta = machine.describe({"disk": str(disk)}, "benchmarks.growth")
    text += "\n".join(["", *(f"- {name}: {value}" for name, value in meta.items()), ""])
    publish(text, out)


def _measure(subject: Ours, notes: str, saves: int) -> str:
    sampler = MemorySampler(Task("saving", "ours", "quick", "disk", subject.directory, notes))
    arrays = dict(LazyArrays(subject.case, 0))
    gc.collect()
    # The arrays are the state itself: what is there now is not counted.
    level = memory_nbytes()
    subject.start(arrays)
    after, snapshots = [], 0
    for step in range(1, saves + 1):
        subject.save(step)
        subject.wait()
        remove(subject.files(step - 2))
        if step % EVERY == 0:
            after.append((step, memory_nbytes() - level))
            snapshots = max(snapshots, snapshot_nbytes(subject.directory))
    ended = time.monotonic()
    peak = max(nbytes for when, nbytes in sampler.stop() if when <= ended) - level
    subject.close()
    limit = snapshots + MARGIN_NBYTES
    lines = [f"# Memory over {saves} saves of {subject.case.nbytes / MIB:.0f} MiB", ""]
    lines += ["| after save | MiB above the state |", "|---:|---:|"]
    lines += [f"| {step} | {nbytes / MIB:.0f} |" for step, nbytes in after]
    verdict = "within" if peak <= limit else f"{(peak - limit) / MIB:.0f} MiB above"
    bound = f"snapshot memory {snapshots / MIB:.0f} MiB, so the limit is {limit / MIB:.0f} MiB"
    lines += [
        "",
        f"Peak {peak / MIB:.0f} MiB above the state; {bound}: {verdict}.",
        f"From save {after[0][0]} to save {after[-1][0]} it grew by {(after[-1][1] - after[0][1]) / MIB:.0f} MiB.",
        "",
    ]
    return "\n".join(lines)


def snapshot_nbytes(directory: str) -> int:
    """What the segments of a run occupy on tmpfs."""
    run = run_id(directory)
    segments = default_folder(run).parent.glob(f"{run}*/*")
    return sum(path.stat().st_blocks * 512 for path in segments)


if __name__ == "__main__":
    app()
