"""One rank's process: ``python -m benchmarks.worker TASK RANK``, or `work` inside a system's own job."""

from __future__ import annotations

import pickle
import sys
import traceback

from benchmarks.restoring import measure_flipped, measure_restoring
from benchmarks.saving import measure_saving
from benchmarks.subjects import subject_class
from benchmarks.task import Ranks, Task, write_json

PHASES = {"saving": measure_saving, "restoring": measure_restoring, "flipped": measure_flipped}


def work(task: Task, rank: int) -> None:
    """Measure one phase on this rank; its result, or why there is none, goes to the rank's log."""
    try:
        subject = subject_class(task.subject)(task.case, rank, task.checkpoints)
        subject.configure(task.shared)
        result = PHASES[task.phase](subject, task, Ranks(task, rank))
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
        task.note("failed").touch()
    write_json(task.log(rank), result)


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        work(pickle.load(file), int(sys.argv[2]))
