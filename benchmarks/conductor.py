"""One row of the table, above all its processes: ``python -m benchmarks.conductor TASK RESULT``.

Starts what the subject's workers share, the workers of each phase, and samples the machine's memory meanwhile. The
result is written after every phase, so that a crash or the caller's time limit costs only what comes after it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil

from benchmarks import rules
from benchmarks.meters import MEMORY_END, MemorySampler, above, flip, largest
from benchmarks.restoring import write_plain
from benchmarks.subjects import subject_class
from benchmarks.subjects.base import Subject
from benchmarks.task import Task, write_json
from benchmarks.worker import work

FLIPPED_LIMIT_S = 90.0

Logs = list[dict[str, Any]]


class PhaseError(Exception):
    """A phase that gave no result, and why."""


class Conductor:
    """Runs the phases of a row one after another."""

    def __init__(self, task: Task, subject: type[Subject], result: Path) -> None:
        self._task = task
        self._path = result
        self._class = subject
        self._result: dict[str, Any] = {"name": subject.name, "gives_up": subject.gives_up}

    def run(self, phases: list[str]) -> None:
        """Everything; what went wrong ends up in the result."""
        if self._task.case.name not in self._class.cases:
            self._note(skipped="the subject has no such case")
            return
        try:
            logs = self._saving()
            updates = logs[0]["updates"]
            task = replace(self._task, step=logs[0]["step"])
            for rank in range(task.case.world_size):
                write_plain(task.case, rank, updates, task.plain(rank))
            if "restoring" in phases:
                self._restoring(task)
            if "flipped" in phases:
                self._flipped(task)
        except PhaseError as error:
            self._note(error=str(error))
        else:
            self._note(done=True)

    def _note(self, **values: Any) -> None:
        self._result.update(values)
        write_json(self._path, self._result)

    def _saving(self) -> Logs:
        on_disk = self._task.place == "disk"
        sampler = MemorySampler(self._task) if on_disk else None
        try:
            logs = self._phase(replace(self._task, phase="saving"))
        finally:
            samples = sampler.stop() if sampler else []
        saving = {
            "first": rules.join_saves([[log["first"]] for log in logs])[0],
            "quiet": rules.join_saves([log["quiet"] for log in logs]),
            "busy": rules.join_busy([log["busy"] for log in logs]),
            "files": logs[0]["files"],
            "bytes": logs[0]["bytes"],
        }
        if sampler:
            # The state is whole only when the last rank has its part.
            began = max(log["memory_from"] for log in logs)
            ended = json.loads(self._task.note(MEMORY_END).read_text())
            saving["memory"] = above(samples, began, ended)
        self._note(saving=saving)
        return logs

    def _restoring(self, task: Task) -> None:
        logs = self._phase(replace(task, phase="restoring"))
        restoring = {
            "first": rules.join_restores([[log["first"]] for log in logs])[0],
            "warm": rules.join_restores([log["warm"] for log in logs]),
            "cold": rules.join_restores([log["cold"] for log in logs]),
        }
        self._note(restoring=restoring)

    def _flipped(self, task: Task) -> None:
        pattern = self._class(task.case, 0, task.checkpoints).files(task.step)
        path = largest(pattern)
        flip(path)
        try:
            logs = self._phase(replace(task, phase="flipped"), FLIPPED_LIMIT_S)
            self._note(flipped=rules.join_verdicts(logs))
        except PhaseError as error:
            self._note(flipped={"verdict": "crash", "detail": str(error)})
        finally:
            flip(path)

    def _phase(self, task: Task, limit_s: float | None = None) -> Logs:
        """The ranks' logs, from fresh processes."""
        os.makedirs(task.checkpoints, exist_ok=True)
        shared = self._class.prepare(task.case, task.checkpoints)
        try:
            task = replace(task, shared=shared, conductor=os.getpid())
            if not self._class.launch(task.case, task.checkpoints, partial(work, task)):
                _run_processes(task, limit_s)
        finally:
            self._class.tear_down()
        logs = []
        for rank in range(task.case.world_size):
            path = task.log(rank)
            if not path.exists():
                raise PhaseError(f"{task.phase}: rank {rank} ended without a result")
            logs.append(json.loads(path.read_text()))
        # The rank that only heard of another's failure knows nothing of the reason.
        errors = [log["error"] for log in logs if "error" in log]
        if errors:
            told = [error for error in errors if "another rank failed" not in error]
            raise PhaseError(f"{task.phase}: {(told or errors)[0]}")
        return logs


def _run_processes(task: Task, limit_s: float | None) -> None:
    """One plain process for each rank, until all have ended; all are ended if they take too long."""
    path = task.note(f"{task.phase}.task")
    path.write_bytes(pickle.dumps(task))
    processes = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.worker", str(path), str(rank)])
        for rank in range(task.case.world_size)
    ]
    try:
        for process in processes:
            process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise PhaseError(f"{task.phase}: not done after {limit_s:.0f} s") from None
    finally:
        for process in processes:
            end_tree(process.pid)
            process.wait()


def end_tree(root: int) -> None:
    """Kill a process and all below it."""
    try:
        parent = psutil.Process(root)
        tree = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def conduct(task: Task, result: Path, phases: list[str]) -> None:
    """Measure the row; a subject that cannot be imported is a result too."""
    try:
        subject = subject_class(task.subject)
    except ImportError as error:
        write_json(result, {"error": f"not installed: {error}"})
    else:
        Conductor(task, subject, result).run(phases)


def _leave(*_: object) -> NoReturn:
    """On SIGTERM: out through every ``finally``."""
    sys.exit("ended from outside")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    with open(sys.argv[1], "rb") as file:
        conduct(pickle.load(file), Path(sys.argv[2]), sys.argv[3].split(","))
