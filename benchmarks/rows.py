"""Rows of the table: each measured below a process of its own, so that no failure ends the run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.conductor import end_tree
from benchmarks.task import Task

ROOT = Path(__file__).parents[1]
LIMIT_S = 600.0
GRACE_S = 30.0
PHASES = ("saving", "restoring", "flipped")

ENVIRONMENT = {
    # The compute part of a step is one thread's; the frameworks' own pools are left as they are.
    "OPENBLAS_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}

Row = dict[str, Any]


def measure_row(
    task: Task, phases: tuple[str, ...] = ("saving", "restoring", "flipped"), limit_s: float = LIMIT_S
) -> Row:
    """One subject, case and place. ``root`` is made, and removed afterwards; ``notes`` likewise."""
    row: Row = {**task.key, "nbytes": task.case.nbytes}
    os.makedirs(task.root)
    notes = tempfile.mkdtemp(prefix="bench-", dir="/dev/shm")
    try:
        return {**row, **_conduct(replace(task, notes=notes), phases, limit_s)}
    finally:
        shutil.rmtree(task.root, ignore_errors=True)
        shutil.rmtree(notes, ignore_errors=True)


def _conduct(task: Task, phases: tuple[str, ...], limit_s: float) -> Row:
    told, result, said = (Path(task.notes, name) for name in ("task", "result.json", "said"))
    told.write_bytes(pickle.dumps(task))
    command = [sys.executable, "-m", "benchmarks.conductor", str(told), str(result), ",".join(phases)]
    with said.open("wb") as log:
        conductor = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        reason = ""
        try:
            conductor.wait(limit_s)
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit_s:.0f} s"
        finally:
            _end(conductor)
    found: Row = json.loads(result.read_text()) if result.exists() else {}
    if not found.keys() & {"done", "error", "skipped"}:
        found["error"] = reason or _last_words(said)
    if "error" in found:
        found["said"] = said.read_text(errors="replace")[-3000:]
    found.pop("done", None)
    return found


def _end(conductor: subprocess.Popen[bytes]) -> None:
    """Let it tear down what the subject has started outside the row's folders, then end whatever is left."""
    conductor.terminate()
    try:
        conductor.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        end_tree(conductor.pid)
        conductor.wait()


def _last_words(said: Path) -> str:
    lines = said.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "ended without a word"
