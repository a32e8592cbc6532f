"""I/O that hangs: given up after its time, and in nobody's way."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ray_ckpt.coordinator.threads import IoThreads
from ray_ckpt.errors import StorageError


def test_calls_that_hang_are_given_up_and_keep_no_thread_busy() -> None:
    hang = threading.Event()

    async def run() -> list[int]:
        threads = IoThreads(2)
        for _ in range(3):
            with pytest.raises(StorageError, match="Append has not been answered"):
                await threads.run(0.01, "Append", hang.wait)
        return list(await asyncio.gather(*(threads.run(60.0, "ReadHead", pow, n, 2) for n in range(5))))

    try:
        assert asyncio.run(run()) == [0, 1, 4, 9, 16]
    finally:
        hang.set()


def test_an_error_of_the_call_is_the_callers() -> None:
    def fail() -> None:
        raise TimeoutError("by the call itself")

    with pytest.raises(TimeoutError, match="by the call itself"):
        asyncio.run(IoThreads(1).run(60.0, "Append", fail))


def test_no_more_run_at_once_than_there_is_room_for() -> None:
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2)

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(60)
        with lock:
            running -= 1

    async def run() -> None:
        threads = IoThreads(2)
        await asyncio.gather(*(threads.run(60.0, "Append", work) for _ in range(6)))

    asyncio.run(run())
    assert most == 2
