"""``python -m benchmarks.reshard``: planning the restore of 100,000 slices onto another cut, without reading a byte.

An index is opened as a restore opens it, and the reads of one of W workers are planned, as each does in its own
process. CPU seconds, the best of three, since nothing here waits.
"""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import machine
from benchmarks.report import publish
from benchmarks.rows import ROOT
from ray_ckpt.bundle import encode_partitioned, encode_piece, encode_run, index_name, merge_index, piece_key
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.restore.jobs import wanted_jobs
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import Box

LIMIT_S = 2.0
REPEATS = 3
PREFIX = "model.ckpt-1"
CASES = {
    "1,000 tensors, 100 slices each": (1000, (100, 1)),
    "100 tensors, 1,000 slices each": (100, (1000, 1)),
    "100 tensors, a grid of 32 x 31": (100, (32, 31)),
    "25 tensors, 4,000 slices each": (25, (4000, 1)),
}
WORKERS = (1, 3, 8)
ROWS, COLUMNS = 12_000, 31
"""Of each tensor, as int8: small, since the arrays are allocated."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def cut(parts: tuple[int, int]) -> list[Box]:
    """A tensor in this many parts, as even as can be."""
    edges = [[n * i // count for i in range(count + 1)] for n, count in zip((ROWS, COLUMNS), parts, strict=True)]
    return [
        Box((edges[0][i], edges[1][j]), (edges[0][i + 1] - edges[0][i], edges[1][j + 1] - edges[1][j]))
        for i in range(parts[0])
        for j in range(parts[1])
    ]


def put_index(store: Store, tensors: int, parts: tuple[int, int]) -> None:
    """An index without its data: planning does not look at any."""
    boxes, shape = cut(parts), (ROWS, COLUMNS)
    items = []
    for number in range(tensors):
        name = f"layer{number:05d}/w"
        items.append((name.encode(), encode_partitioned("int8", shape, boxes)))
        for i, box in enumerate(boxes):
            value = encode_piece("int8", box.shape, i % 64, number * box.size, box.size, 1)
            items.append((piece_key(name, box, shape), value))
    store.put(index_name(PREFIX), merge_index([encode_run(sorted(items))], 64))


def best(call: Callable[[], object]) -> float:
    """CPU seconds."""
    found = []
    for _ in range(REPEATS):
        gc.collect()
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def plan_s(stored: StoredCheckpoint, box: Box) -> float:
    """CPU seconds to plan the reads of this box of every tensor."""
    array = np.empty(box.shape, np.int8)
    wanted = [(name, box, array) for name in stored.names]
    return best(lambda: wanted_jobs(stored, wanted))


def measure(tensors: int, parts: tuple[int, int]) -> list[float]:
    """CPU seconds to open the index, then to plan as one of each number of workers."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    put_index(store, tensors, parts)
    opened = best(lambda: open_checkpoint(store, PREFIX))
    stored = open_checkpoint(store, PREFIX)
    return [opened, *(plan_s(stored, cut((workers, 1))[0]) for workers in WORKERS)]


@app.command()
def reshard(
    out: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "benchmarks" / "results" / "reshard.md",
) -> None:
    """Plan restores of 100,000 slices, and write what that takes."""
    lines = ["# Planning a reshard of 100,000 slices, CPU seconds", ""]
    heads = [f"planned by one of {workers}" for workers in WORKERS]
    lines += [f"| checkpoint | slices | index opened | {' | '.join(heads)} |", f"|---|---:|---:|{'---:|' * len(heads)}"]
    worst = [0.0, 0.0]
    for title, (tensors, parts) in CASES.items():
        opened, *planned = measure(tensors, parts)
        worst = [max(worst[0], *planned), max(worst[1], opened + max(planned))]
        cells = " | ".join(f"{seconds:.2f}" for seconds in (opened, *planned))
        lines.append(f"| {title} | {tensors * parts[0] * parts[1]:,} | {cells} |")
    verdict = "within" if worst[0] <= LIMIT_S else "above"
    lines += [
        "",
        f"At most {worst[0]:.2f} s to plan, {verdict} the limit of {LIMIT_S:.0f} s; {worst[1]:.2f} s with the index.",
        "",
    ]
    meta = machine.describe({}, "benchmarks.reshard")
    publish("\n".join([*lines, *(f"- {name}: {value}" for name, value in meta.items()), ""]), out)


if __name__ == "__main__":
    app()
