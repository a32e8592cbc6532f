"""A worker's hold on its snapshot memory, when the agent is slow."""

from __future__ import annotations

import threading
from pathlib import Path

from ray_ckpt.checkpointer.slots import Slots
from ray_ckpt.snapshot import Segment, in_use
from tests.snapshot.helpers import save_id


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


def test_memory_that_a_restored_state_lies_in_is_replaced(tmp_path: Path) -> None:
    made: list[str] = []
    grown = threading.Event()

    def prepare(nbytes: int) -> list[str]:
        made.append(str(tmp_path / f"s{len(made)}"))
        Segment.create(made[-1], nbytes).close()
        return made[-1:]

    slots = Slots(prepare, grown.set)
    slots.grow(100)
    assert grown.wait(60)
    first = slots.free(100)
    assert first is not None
    with first.fill(save_id("plan")):
        first.seal(b"{}", keep=True)
    assert slots.free(100) is first
    first.lend(first.fills)
    assert slots.free(100) is None
    assert slots.nbytes < 100, "so that who needs memory asks for it"
    grown.clear()
    slots.grow(100)
    assert grown.wait(60)
    second = slots.free(100)
    assert second is not None
    assert str(second.path) == made[1]
    assert not in_use(made[0])
    slots.close()
