"""How a worker's snapshot memory grows with what has no fixed size."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ckpt.checkpointer.saving import Saver
from ray_ckpt.protocol.messages import JobConfig

FIXED_NBYTES = 1000 << 20
MIB = 1 << 20


class Memory:
    """Segments that are there at once, and how often they were made."""

    def __init__(self) -> None:
        self.nbytes = FIXED_NBYTES
        self.error = None
        self.made: list[int] = []

    def grow(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.made.append(nbytes)

    def free(self, nbytes: int) -> Any:
        assert nbytes <= self.nbytes
        return self


@pytest.fixture
def saver() -> Saver:
    def wait(done: Any, timeout_s: float, what: str) -> None:
        assert done(), what

    link: Any = SimpleNamespace(
        rank=0,
        condition=threading.Condition(),
        wait=wait,
        logic=SimpleNamespace(is_off=lambda step, trigger: False),
        courier=SimpleNamespace(nudge=lambda: None),
    )
    made = Saver(link, "run", JobConfig(world_size=1))
    made.slots = Memory()  # type: ignore[assignment]
    return made


def test_strings_that_grow_do_not_have_all_memory_made_anew_at_each_save(saver: Saver) -> None:
    plan: Any = SimpleNamespace(fixed_nbytes=FIXED_NBYTES)
    memory: Any = saver.slots
    for step in range(1, 101):
        assert saver._memory(step, "cadence", FIXED_NBYTES + 2 * step * MIB, plan) is memory
    assert len(memory.made) <= 12
    assert memory.made[-1] < FIXED_NBYTES + 400 * MIB


def test_much_that_is_fixed_asks_for_no_more_room(saver: Saver) -> None:
    plan: Any = SimpleNamespace(fixed_nbytes=FIXED_NBYTES)
    memory: Any = saver.slots
    saver._memory(1, "cadence", FIXED_NBYTES + 100, plan)
    assert memory.made == [FIXED_NBYTES + 100 + MIB]
