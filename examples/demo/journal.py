"""What happened in each training process, as lines of JSON: the newest survive its death by SIGKILL."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    """One training step of one process. Times in seconds since the epoch: training began and ended, `step()` ended.

    ``loss`` is the step's own, before its update; ``eval_loss`` that of the fixed batch after it. ``saved``: the
    call of `Checkpointer.step` took a snapshot, ``stalled_s`` seconds of this thread.
    """

    step: int
    began: float
    trained: float
    ended: float
    loss: float
    eval_loss: float
    stalled_s: float

    @property
    def saved(self) -> bool:
        """Whether a snapshot was taken at this step."""
        return self.stalled_s > 0


@dataclass(frozen=True)
class Restored:
    """How a process came to its state; ``step`` is None where there was no checkpoint.

    ``began``: when the process began to set itself up; ``seconds_s``: in `Checkpointer.restore`, waiting for the
    other ranks included; ``eval_loss``: of the fixed batch, before any training.
    """

    step: int | None
    began: float
    seconds_s: float
    eval_loss: float


@dataclass(frozen=True)
class Finished:
    """The end of a process that was not killed. ``digests``: of all parameters, on rank 0 only."""

    step: int
    stall_s: float
    digests: dict[str, str]


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Step, Restored, Finished)}


class Journal:
    """One process's file, written line by line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1)

    def write(self, event: Step | Restored | Finished) -> None:
        """Append one event; the kernel has it when this returns."""
        self._file.write(json.dumps({"kind": type(event).__name__, **asdict(event)}) + "\n")


@dataclass
class Story:
    """One process as its journal tells it so far; `update` reads on where it stopped."""

    path: Path
    start: int
    rank: int
    host: int
    restored: Restored | None = None
    finished: Finished | None = None

    def __post_init__(self) -> None:
        self.steps: list[Step] = []
        self._offset = 0

    def update(self) -> None:
        """Take in what has been written since the last call; a line that is not complete waits."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._add(json.loads(line))

    def _add(self, fields: dict[str, Any]) -> None:
        kind = _KINDS[fields.pop("kind")]
        event = kind(**fields)
        if isinstance(event, Step):
            self.steps.append(event)
        elif isinstance(event, Restored):
            self.restored = event
        else:
            self.finished = event
