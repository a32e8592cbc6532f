"""A worker's hold on its snapshot memory, when the agent is slow."""

from __future__ import annotations

import threading
from pathlib import Path

from ray_ckpt.checkpointer.slots import Slots
from ray_ckpt.snapshot import Segment, in_use


def test_closing_does_not_wait_for_an_agent_that_hangs(tmp_path: Path) -> None:
    answer, told = threading.Event(), threading.Event()
    Segment.create(tmp_path / "s", 100).close()

    def prepare(nbytes: int) -> list[str]:
        answer.wait(60)
        return [str(tmp_path / "s")]

    slots = Slots(prepare, told.set)
    slots.grow(100)
    slots.close()
    assert not told.is_set()
    answer.set()
    assert told.wait(60)
    assert slots.free(0) is None
    assert not in_use(tmp_path / "s"), "what came too late is closed again"


def test_nothing_grows_once_it_is_closed(tmp_path: Path) -> None:
    asked: list[int] = []
    slots = Slots(lambda nbytes: asked.append(nbytes) or [], lambda: None)  # type: ignore[func-returns-value]
    slots.close()
    slots.grow(100)
    assert slots._thread is None
    assert not asked
