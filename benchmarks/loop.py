"""The training loop beside which a checkpoint is saved: short steps of real work on the state."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.cases import Case
from benchmarks.subjects.base import Subject

BIG_NBYTES = 1 << 20
SMALL_A_STEP = 200
MATMULS = 70
"""Of 160 x 160, one thread: about 5 ms on the machine of the first table, the same work on any other."""


class Loop:
    """Steps over the tensors in turn; each updates some and then computes for a while."""

    def __init__(self, case: Case, subject: Subject) -> None:
        self._subject = subject
        self.names = [name for name, _ in case.shapes]
        big = [name for name, shape in case.shapes if 4 * np.prod(shape) >= BIG_NBYTES]
        turn = big or self.names
        per_step = case.world_size if big else SMALL_A_STEP
        self.groups = [turn[i : i + per_step] for i in range(0, len(turn), per_step)]
        self.updates = dict.fromkeys(self.names, 0)
        """How often each tensor was updated so far."""
        self._position = 0
        self._a = np.full((160, 160), 1 / 160, np.float32)
        self._b = np.empty_like(self._a)

    @property
    def round(self) -> int:
        """Steps after which every tensor has been updated once more."""
        return len(self.groups)

    def step(self) -> None:
        """One training step."""
        group = self.groups[self._position % len(self.groups)]
        self._subject.update(group)
        for _ in range(MATMULS):
            np.matmul(self._a, self._a, out=self._b)
        for name in group:
            self.updates[name] += 1
        self._position += 1

    def time_steps(self, count: int) -> float:
        """Seconds that these steps take."""
        began = time.monotonic()
        for _ in range(count):
            self.step()
        return time.monotonic() - began
