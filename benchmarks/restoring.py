"""What is measured of restoring, in one rank's fresh process: warm, cold, and with a byte of the checkpoint flipped."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.bounds import evict, read, sync_file_system
from benchmarks.cases import Case
from benchmarks.meters import files_of
from benchmarks.rules import repetitions
from benchmarks.subjects.base import Subject
from benchmarks.task import Ranks, Task

Record = dict[str, Any]

_CHUNK = 1 << 16


def write_plain(case: Case, rank: int, updates: Mapping[str, int], path: str) -> None:
    """The bytes that a rank's state had at the save, one tensor after another, as a plain file."""
    with open(path, "wb") as file:
        for number, (name, _) in enumerate(case.shapes):
            array = case.array(number, rank)
            flat = array.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                piece = flat[start : start + _CHUNK]
                for _ in range(updates.get(name, 0)):
                    np.add(piece, 1, out=piece)
            file.write(array.data)


def difference(case: Case, rank: int, restored: Mapping[str, Any], path: str) -> str:
    """The first tensor that is not what the plain file says, "" if all are."""
    expected = np.memmap(path, np.uint32, "r")
    start = 0
    for name, shape in case.shapes:
        part = case.part(name, shape, rank)[1]
        count = int(np.prod(part))
        value = np.asarray(restored[name])
        if value.shape != part or value.dtype != np.float32:
            return f"{name} is {value.dtype}{value.shape}"
        bits = np.ascontiguousarray(value).reshape(-1).view(np.uint32)
        if not np.array_equal(bits, expected[start : start + count]):
            return name
        start += count
    return ""


def measure_restoring(subject: Subject, task: Task, ranks: Ranks) -> Record:
    """One rank's part of the phase: the first restore, warm ones, and on a disk cold ones."""
    plain = task.plain(ranks.rank)
    subject.open_restore(task.step)

    def once() -> Record:
        ranks.barrier()
        bound_s = read(plain)
        return {**_restore(subject, ranks)[0], "read": bound_s}

    first, wrong = _restore(subject, ranks, lambda restored: difference(task.case, ranks.rank, restored, plain))
    if wrong:
        raise RuntimeError(f"the restored values are not those that were saved: {wrong}")
    warm = [once()]
    # The first one may have had processes to start, so the second says how many fit.
    count = ranks.agree(repetitions(warm[0]["ended"] - warm[0]["began"], task.repeats, task.budget_s / 2))
    warm += [once() for _ in range(count - 1)]
    cold = []
    for _ in range(count if task.place == "disk" else 0):
        _evict(task, ranks)
        cold.append(once())
    subject.close()
    return {"first": first, "warm": warm, "cold": cold}


def measure_flipped(subject: Subject, task: Task, ranks: Ranks) -> Record:
    """What one rank finds in a checkpoint of which the conductor has flipped a byte."""
    try:
        subject.open_restore(task.step)
        restored = subject.restore()
        wrong = difference(task.case, ranks.rank, restored, task.plain(ranks.rank))
    except Exception as error:
        return {"verdict": "noticed", "detail": f"{type(error).__name__}: {error}"[:200]}
    return {"verdict": "silent" if wrong else "unharmed", "detail": wrong}


def _restore(
    subject: Subject, ranks: Ranks, check: Callable[[Mapping[str, Any]], str] | None = None
) -> tuple[Record, str]:
    """One restore, all ranks together; what ``check`` says of it."""
    subject.before_restore()
    ranks.barrier()
    began = time.monotonic()
    restored = subject.restore()
    record = {"began": began, "ended": time.monotonic()}
    found = check(restored) if check else ""
    del restored
    gc.collect()
    ranks.barrier()
    return record, found


def _evict(task: Task, ranks: Ranks) -> None:
    """See to it that nothing of the checkpoint or the plain files is in the page cache."""
    ranks.barrier()
    if ranks.rank == 0:
        sync_file_system(task.root)
        evict([task.plain(rank) for rank in range(ranks.world_size)])
        evict(files_of(task.checkpoints))
    ranks.barrier()
