"""What one measuring process is told, and how the ranks of a case keep step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.cases import CASES, Case

T = TypeVar("T")

_POLL_S = 0.0005
_WAIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Task:
    """One phase of one row of the table.

    ``place`` is "disk" or "shm", ``root`` a folder there that is the row's own, ``notes`` a folder on tmpfs for
    what the processes tell each other. ``conductor`` is the pid above all processes of the phase. ``step`` is the
    checkpoint to restore.
    """

    phase: str
    subject: str
    case_name: str
    place: str
    root: str
    notes: str
    repeats: int = 5
    budget_s: float = 40.0
    conductor: int = 0
    step: int = 0
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """The state that is saved."""
        return CASES[self.case_name]

    @property
    def key(self) -> dict[str, str]:
        """What names the row."""
        return {"place": self.place, "case": self.case_name, "subject": self.subject}

    @property
    def checkpoints(self) -> str:
        """The subject's directory."""
        return os.path.join(self.root, "checkpoints")

    def plain(self, rank: int) -> str:
        """A plain file of the bytes that the checkpoint holds for this rank: the bound of reading."""
        return os.path.join(self.root, f"plain-{rank}")

    def note(self, name: str) -> Path:
        """A file in which processes tell each other something."""
        return Path(self.notes, name)

    def log(self, rank: int) -> Path:
        """Where a rank's result goes, as JSON."""
        return self.note(f"{self.phase}-{rank}.json")


def write_json(path: Path, value: Any) -> None:
    """Write it so that whoever sees the file sees all of it."""
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(value))
    part.replace(path)


class Ranks:
    """Barriers between the ranks of a case by files on tmpfs: no library that is measured takes part."""

    def __init__(self, task: Task, rank: int) -> None:
        self.task = task
        self.rank = rank
        self.world_size = task.case.world_size
        self._count = 0

    def barrier(self) -> None:
        """Until all ranks have come here."""
        self.agree(None)

    def agree(self, value: T) -> T:
        """What rank 0 passes, on all ranks, once all have come here."""
        if self.world_size == 1:
            return value
        self._count += 1
        names = [f"{self.task.phase}-barrier-{self._count}-{rank}" for rank in range(self.world_size)]
        write_json(self.task.note(names[self.rank]), value)
        paths = [self.task.note(name) for name in names]
        wait_for(lambda: all(path.exists() for path in paths), f"barrier {self._count}", self.task)
        found: T = json.loads(paths[0].read_text())
        return found


def wait_for(done: Callable[[], bool], what: str, task: Task) -> None:
    """Poll until it is so. Raises RuntimeError if a rank has failed, TimeoutError after minutes."""
    deadline = time.monotonic() + _WAIT_S
    while not done():
        if task.note("failed").exists():
            raise RuntimeError(f"{what}: another rank failed")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: other ranks did not come within {_WAIT_S:.0f} s")
        time.sleep(_POLL_S)
