"""What is measured of saving, in one rank's process: the first saves, quiet ones, and ones beside a training loop."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.bounds import Bounds, sync_file_system
from benchmarks.cases import Case
from benchmarks.loop import Loop
from benchmarks.meters import MEMORY_END, files_of, remove, trainer_cpu_s, tree_cpu_s
from benchmarks.rules import repetitions
from benchmarks.subjects.base import Subject
from benchmarks.task import Ranks, Task, write_json

Record = dict[str, Any]

EXTRA_SAVES = 2
WINDOW = 2.0
"""The window of steps beside a save is longer than it usually takes until commit by this factor: it ends inside."""

BASELINE_ROUNDS = 2
KEPT = 2


class LazyArrays(Mapping[str, np.ndarray]):
    """Makes each array when it is asked for: whoever copies the values never holds the state twice."""

    def __init__(self, case: Case, rank: int) -> None:
        self._case = case
        self._rank = rank
        self._numbers = {name: number for number, (name, _) in enumerate(case.shapes)}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._case.array(self._numbers[name], self._rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class Saving:
    """The saves of one process, numbered from 1; times are monotonic seconds, the same clock on all ranks."""

    def __init__(self, subject: Subject, task: Task, ranks: Ranks) -> None:
        self._subject = subject
        self._task = task
        self._ranks = ranks
        self._loop = Loop(task.case, subject)
        self._step = 0
        self._updates: dict[str, int] = {}

    def measure(self) -> Record:
        """All phases in their order. The last save is the one that is restored later."""
        subject, task = self._subject, self._task
        subject.start(LazyArrays(task.case, self._ranks.rank))
        gc.collect()
        memory_from = subject.started_at or time.monotonic()
        first = self._with_memory()
        quickest = min(record["committed"] - record["began"] for record in first)
        count = self._ranks.agree(repetitions(quickest, task.repeats, task.budget_s))
        quiet = self._quiet(count)
        usual = self._ranks.agree(float(np.median([record["committed"] - record["began"] for record in quiet])))
        busy = [self._busy(usual) for _ in range(count)]
        files = files_of(subject.files(self._step))
        return {
            "memory_from": memory_from,
            "first": first[0],
            "quiet": quiet,
            "busy": busy,
            "step": self._step,
            "updates": self._updates,
            "files": len(files),
            "bytes": sum(os.path.getsize(path) for path in files),
        }

    def _with_memory(self) -> list[Record]:
        """The first save, and some more, while the conductor samples the machine's memory."""
        first = [self._save()]
        slow = first[0]["committed"] - first[0]["began"] > self._task.budget_s / self._task.repeats
        for _ in range(self._ranks.agree(1 if slow else EXTRA_SAVES)):
            first.append(self._save())
        if self._ranks.rank == 0:
            write_json(self._task.note(MEMORY_END), time.monotonic())
        return first

    def _save(self) -> Record:
        """One save, all ranks together, until it is on the device; what is older than the newest two is deleted."""
        subject, task, ranks = self._subject, self._task, self._ranks
        lead = ranks.rank == 0
        self._step += 1
        self._updates = dict(self._loop.updates)
        tree = tree_cpu_s(task.conductor) if lead else 0.0
        ranks.barrier()
        trainer = trainer_cpu_s()
        began = time.monotonic()
        subject.save(self._step)
        returned = time.monotonic()
        subject.wait()
        committed = time.monotonic()
        record = {"began": began, "returned": returned, "committed": committed, "cpu": trainer_cpu_s() - trainer}
        ranks.barrier()
        if lead:
            sync_file_system(task.root)
            record["durable"] = time.monotonic()
            record["cpu_all"] = tree_cpu_s(task.conductor) - tree
            self._retain()
        return record

    def _quiet(self, count: int) -> list[Record]:
        """Saves with nothing beside them, each just after the bounds were taken."""
        task = self._task
        bounds = Bounds(task.case.nbytes // task.case.world_size, os.path.join(task.root, f"bound-{self._ranks.rank}"))
        records = []
        for _ in range(count):
            self._ranks.barrier()
            sync_file_system(task.root)
            self._ranks.barrier()
            bound = {"memcpy": bounds.memcpy(), "crc": bounds.crc()}
            self._ranks.barrier()
            bound["write_began"], bound["write_ended"] = bounds.write()
            self._ranks.barrier()
            records.append({**self._save(), **bound})
        return records

    def _busy(self, usual_s: float) -> Record:
        """A save and steps beside it, against the same steps without one just before.

        The window is as many steps as take twice as long as the usual save, and every tensor once; then `wait`, whose
        time counts as lost too.
        """
        subject, loop, ranks = self._subject, self._loop, self._ranks
        ranks.barrier()
        steps = BASELINE_ROUNDS * loop.round
        baseline_s = loop.time_steps(steps) / steps
        window = ranks.agree(max(loop.round, round(WINDOW * usual_s / baseline_s)))
        self._step += 1
        self._updates = dict(loop.updates)
        ranks.barrier()
        began = time.monotonic()
        subject.save(self._step)
        returned = time.monotonic()
        loop.time_steps(window)
        stepped = time.monotonic()
        subject.wait()
        ended = time.monotonic()
        ranks.barrier()
        if ranks.rank == 0:
            sync_file_system(self._task.root)
            self._retain()
        return {
            "lost": ended - began - window * baseline_s,
            "blocked": returned - began,
            "waited": ended - stepped,
            "steps": window,
            "baseline": baseline_s,
        }

    def _retain(self) -> None:
        if self._step > KEPT:
            remove(self._subject.files(self._step - KEPT))


def measure_saving(subject: Subject, task: Task, ranks: Ranks) -> Record:
    """One rank's part of the phase."""
    result = Saving(subject, task, ranks).measure()
    subject.close()
    return result
