"""CPU seconds, memory of the machine, and what a checkpoint occupies."""

from __future__ import annotations

import glob
import os
import shutil
import threading
import time

import psutil

from benchmarks.task import Task

_SAMPLE_S = 0.01
MEMORY_END = "memory-end"


def trainer_cpu_s() -> float:
    """User and system seconds of this process so far, without its children."""
    return time.process_time()


def tree_cpu_s(root: int) -> float:
    """The same of all processes below ``root``, those that have ended included."""
    total = 0.0
    for process in psutil.Process(root).children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_nbytes() -> int:
    """Anonymous and shared pages of the whole machine."""
    total = 0
    with open("/proc/meminfo") as file:
        for line in file:
            name, value = line.split(":")
            if name in ("AnonPages", "Shmem"):
                total += int(value.split()[0]) * 1024
    return total


class MemorySampler:
    """Samples the machine's memory every 10 ms until the measuring process says that it is enough."""

    def __init__(self, task: Task) -> None:
        self._end = task.note(MEMORY_END)
        self._stop = threading.Event()
        self._samples: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set() and not self._end.exists():
            self._samples.append((time.monotonic(), memory_nbytes()))
            self._stop.wait(_SAMPLE_S)

    def stop(self) -> list[tuple[float, int]]:
        """(monotonic seconds, bytes) of every sample."""
        self._stop.set()
        self._thread.join()
        return self._samples


def above(samples: list[tuple[float, int]], began: float, ended: float) -> int:
    """The peak between two times above the last level before them, bytes."""
    before = [nbytes for when, nbytes in samples if when <= began]
    during = [nbytes for when, nbytes in samples if began <= when <= ended]
    if not before or not during:
        raise ValueError("memory was not sampled before and during the saves")
    return max(during) - before[-1]


def files_of(pattern: str) -> list[str]:
    """All files of a checkpoint that is given as a file, a directory or a glob."""
    found: list[str] = []
    for path in sorted(glob.glob(pattern)):
        if os.path.isdir(path):
            found += [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in sorted(names)]
        else:
            found.append(path)
    return found


def remove(pattern: str) -> None:
    """Delete a checkpoint; what its system deletes at the same time is no error."""
    for path in glob.glob(pattern):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.exists(path):
            os.unlink(path)


def largest(pattern: str) -> str:
    """The largest file of a checkpoint."""
    files = files_of(pattern)
    if not files:
        raise FileNotFoundError(f"no file of a checkpoint at {pattern}")
    return max(files, key=os.path.getsize)


def flip(path: str) -> None:
    """Invert one byte in the middle of the file; again, and it is as it was."""
    with open(path, "r+b") as file:
        middle = os.path.getsize(path) // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 0xFF]))
