"""A second try of a straggler, with tries that end when the test says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ray_ckpt.agent import hedge as module
from ray_ckpt.agent.hedge import FACTOR, Hedge, Pace
from ray_ckpt.errors import SaveError, StorageError
from ray_ckpt.types import ShardReport

MIB = 1 << 20
BRIEF_S = 0.01
"""Patience in these tests: nothing here takes time."""


def report(attempt_try: int, seconds_s: float = 0.001) -> ShardReport:
    return ShardReport("e1-1", 0, attempt_try, attempt_try, f"shard-{attempt_try}", MIB, b"", b"", seconds_s, "host")


class Tries:
    """The tries of one shard: each hangs until it is let go, or is cancelled."""

    def __init__(self, most: int = 3) -> None:
        self.most = most
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.killed: list[int] = []
        self._outcomes: dict[int, asyncio.Future[ShardReport]] = {}

    def next_try(self) -> Coroutine[Any, Any, ShardReport] | None:
        number = len(self.begun)
        if number >= self.most:
            return None
        self.begun.append(number)
        self._outcomes[number] = asyncio.get_running_loop().create_future()
        return self._run(number)

    async def _run(self, number: int) -> ShardReport:
        try:
            return await self._outcomes[number]
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # as a process that takes a moment to die
            self.killed.append(number)
            raise
        finally:
            self.ended.append(number)

    def succeed(self, number: int) -> None:
        self._outcomes[number].set_result(report(number))

    def fail(self, number: int, text: str = "of no use") -> None:
        self._outcomes[number].set_exception(StorageError(text))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", BRIEF_S)


def paced() -> Hedge:
    """One that knows what a shard takes."""
    hedge = Hedge()
    hedge.pace.note(MIB, 0.0)
    return hedge


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(BRIEF_S)
    raise AssertionError("not within 30 s")


def test_patience_comes_from_the_last_shards() -> None:
    pace = Pace()
    assert pace.patience_s(MIB) is None
    pace.note(10 * MIB, 100.0)
    pace.note(10 * MIB, 10.0)
    assert pace.patience_s(10 * MIB) == FACTOR * 100.0
    assert pace.patience_s(20 * MIB) == FACTOR * 200.0
    assert pace.patience_s(1) == pace.patience_s(MIB) == FACTOR * 10.0
    for _ in range(100):
        pace.note(10 * MIB, 0.0)
    assert pace.patience_s(10 * MIB) == BRIEF_S, "the floor, as what is long past is forgotten"


def test_without_a_straggler_there_is_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 60.0)

    async def run() -> None:
        hedge, tries = paced(), Tries()
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await until(lambda: tries.begun)
        tries.succeed(0)
        assert (await task).attempt_try == 0
        assert tries.begun == tries.ended == [0]

    asyncio.run(run())


def test_before_any_shard_is_done_none_is_late() -> None:
    async def run() -> None:
        hedge, tries = Hedge(), Tries()
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await asyncio.sleep(20 * BRIEF_S)
        assert tries.begun == [0]
        tries.succeed(0)
        await task
        assert hedge.pace.patience_s(MIB) is not None

    asyncio.run(run())


@pytest.mark.parametrize("winner", [0, 1])
def test_of_two_tries_the_first_that_is_done_counts(winner: int, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        hedge, tries = paced(), Tries()
        task = asyncio.ensure_future(hedge.write("shard of writer 3 of step 7", MIB, tries.next_try))
        await until(lambda: len(tries.begun) == 2)
        assert tries.ended == []
        tries.succeed(winner)
        assert (await task).attempt_try == winner
        assert tries.killed == [1 - winner], "the other has ended before the answer is there"
        assert sorted(tries.ended) == [0, 1]
        assert tries.begun == [0, 1]

    with caplog.at_level(logging.WARNING, logger="ray_ckpt"):
        asyncio.run(run())
    late, first = caplog.messages
    assert "straggler: shard of writer 3 of step 7, about 1048576 bytes, has been written since " in late
    assert "a second try begins" in late
    assert first == f"shard of writer 3 of step 7: try {winner + 1} was done first"


@pytest.mark.parametrize("first", [0, 1])
def test_one_that_fails_leaves_the_other_alone(first: int) -> None:
    async def run() -> None:
        hedge, tries = paced(), Tries()
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await until(lambda: len(tries.begun) == 2)
        tries.fail(first)
        await until(lambda: tries.ended == [first])
        assert not task.done()
        tries.succeed(1 - first)
        assert (await task).attempt_try == 1 - first
        assert tries.killed == []

    asyncio.run(run())


def test_if_both_fail_the_last_error_is_told() -> None:
    async def run() -> None:
        hedge, tries = paced(), Tries()
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await until(lambda: len(tries.begun) == 2)
        tries.fail(1, "the second")
        await until(lambda: tries.ended == [1])
        tries.fail(0, "the first")
        with pytest.raises(StorageError, match="the first"):
            await task
        assert tries.begun == [0, 1], "what comes next is the caller's matter"

    asyncio.run(run())


def test_both_ending_at_once_is_a_success_if_one_is() -> None:
    async def run() -> None:
        for good in (0, 1):
            hedge, tries = paced(), Tries()
            task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
            await until(lambda tries=tries: len(tries.begun) == 2)
            tries.fail(1 - good)
            tries.succeed(good)
            assert (await task).attempt_try == good

    asyncio.run(run())


def test_a_first_try_that_fails_in_time_is_not_hedged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 60.0)

    async def run() -> None:
        hedge, tries = paced(), Tries()
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await until(lambda: tries.begun)
        tries.fail(0)
        with pytest.raises(StorageError, match="of no use"):
            await task
        assert tries.begun == [0]

    asyncio.run(run())


def test_no_number_is_used_beyond_those_there_are(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        hedge, tries = paced(), Tries(most=1)
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await until(lambda: caplog.messages)
        tries.succeed(0)
        assert (await task).attempt_try == 0
        with pytest.raises(SaveError, match="no try was left"):
            await hedge.write("shard", MIB, tries.next_try)

    asyncio.run(run())
    assert len(caplog.messages) == 1, "it is told once"
    assert "no second try now: none is left" in caplog.messages[0]


def test_one_shard_at_a_time_has_a_second_try() -> None:
    """Where all are slow, the storage is: twice the work would not help."""

    async def run() -> None:
        hedge, all_tries = paced(), [Tries() for _ in range(4)]
        tasks = [asyncio.ensure_future(hedge.write(f"{i}", MIB, t.next_try)) for i, t in enumerate(all_tries)]
        await until(lambda: sum(len(t.begun) for t in all_tries) == 5)
        await asyncio.sleep(20 * BRIEF_S)
        begun = [len(t.begun) for t in all_tries]
        assert sorted(begun) == [1, 1, 1, 2]
        lucky = begun.index(2)
        all_tries[lucky].succeed(1)
        await tasks[lucky]
        await until(lambda: sum(len(t.begun) for t in all_tries) == 6)
        for tries in all_tries:
            if len(tries.ended) == 0:
                tries.succeed(0)
        assert {r.attempt_try for r in await asyncio.gather(*tasks)} == {0, 1}

    asyncio.run(run())


def test_a_caller_that_is_cancelled_ends_all_tries() -> None:
    async def run() -> None:
        hedge, tries = paced(), Tries()
        task = asyncio.ensure_future(hedge.write("shard", MIB, tries.next_try))
        await until(lambda: len(tries.begun) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(tries.killed) == [0, 1]

    asyncio.run(run())
