"""The hosts' open questions: who is answered, when, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ray_ckpt.coordinator.questions import Questions
from ray_ckpt.protocol.messages import HostView, WorkerView

LONG_S = 60.0
NEVER = (0, -1)


class World:
    """What the coordinator would tell each host; a new version each time it is asked."""

    def __init__(self) -> None:
        self.decided: dict[str, tuple[tuple[int, int], ...]] = {}
        self.late = ""
        self.made: list[str] = []
        self.questions = Questions(self.view)

    def view(self, host: str) -> HostView | None:
        """One host's view now."""
        self.made.append(host)
        worker = WorkerView("w", late=self.late)
        return HostView(1, len(self.made), workers=(worker,), decided=self.decided.get(host, ()))

    async def first(self, host: str) -> HostView:
        """What a host that asks for the first time is told."""
        asked = asyncio.ensure_future(self.questions.ask(host, NEVER, LONG_S))
        await asyncio.sleep(0)
        self.questions.answer([host])
        view = await asked
        assert view is not None
        return view


def run(scene: Callable[[World], Awaitable[None]]) -> None:
    """Play a scene in an event loop of its own."""

    async def play() -> None:
        await asyncio.wait_for(scene(World()), LONG_S)

    asyncio.run(play())


def seen(view: HostView) -> tuple[int, int]:
    """What a host says of a view that it has."""
    return view.epoch, view.version


def test_a_host_whose_view_has_not_changed_is_not_woken() -> None:
    async def scene(world: World) -> None:
        views = {host: await world.first(host) for host in ("a", "b")}
        asked = {
            host: asyncio.ensure_future(world.questions.ask(host, seen(view), LONG_S)) for host, view in views.items()
        }
        await asyncio.sleep(0)
        world.decided["a"] = ((1, 5),)
        world.questions.answer(["a", "b"])
        found = await asked["a"]
        assert found is not None
        assert found.decided == ((1, 5),)
        assert not asked["b"].done()
        asked["b"].cancel()

    run(scene)


def test_only_those_named_are_looked_at() -> None:
    async def scene(world: World) -> None:
        views = {host: await world.first(host) for host in ("a", "b")}
        asked = [asyncio.ensure_future(world.questions.ask(host, seen(view), LONG_S)) for host, view in views.items()]
        await asyncio.sleep(0)
        world.made.clear()
        world.questions.answer(["a"])
        assert world.made == ["a"]
        for question in asked:
            question.cancel()

    run(scene)


def test_a_newer_question_of_the_same_host_ends_the_older_one() -> None:
    async def scene(world: World) -> None:
        view = await world.first("a")
        older = asyncio.ensure_future(world.questions.ask("a", seen(view), LONG_S))
        await asyncio.sleep(0)
        newer = asyncio.ensure_future(world.questions.ask("a", seen(view), LONG_S))
        assert await older is None
        world.decided["a"] = ((1, 5),)
        world.questions.answer(["a"])
        assert await newer is not None

    run(scene)


def test_what_changed_while_a_host_did_not_ask_is_told_when_it_does() -> None:
    async def scene(world: World) -> None:
        view = await world.first("a")
        world.decided["a"] = ((1, 5),)
        world.questions.answer(["a"])
        found = await world.questions.ask("a", seen(view), LONG_S)
        assert found is not None
        assert found.decided == ((1, 5),)

    run(scene)


def test_an_answer_that_was_lost_is_given_again() -> None:
    async def scene(world: World) -> None:
        await world.first("a")
        again = await world.questions.ask("a", NEVER, LONG_S)
        assert again is not None

    run(scene)


def test_whom_all_wait_for_is_told_at_the_end_of_the_wait() -> None:
    async def scene(world: World) -> None:
        view = await world.first("a")
        world.late = "rank 1 is late"
        asked = asyncio.ensure_future(world.questions.ask("a", seen(view), 0.01))
        await asyncio.sleep(0)
        world.questions.answer(["a"])
        assert not asked.done()
        found = await asked
        assert found is not None
        assert found.workers[0].late == "rank 1 is late"
        assert await world.questions.ask("a", seen(found), 0.01) is None

    run(scene)


def test_a_view_that_cannot_be_made_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(world: World) -> None:
        views = {host: await world.first(host) for host in ("a", "b")}
        make = world.questions._view

        def fail(host: str) -> HostView | None:
            if host == "a":
                raise RuntimeError("no view of a")
            return make(host)

        world.questions._view = fail
        asked = {host: asyncio.ensure_future(world.questions.ask(host, seen(views[host]), 0.01)) for host in ("a", "b")}
        await asyncio.sleep(0)
        world.decided["b"] = ((1, 5),)
        world.questions.answer(["a", "b"])
        assert (await asked["b"]) is not None
        with pytest.raises(RuntimeError, match="no view of a"):
            await asked["a"]

    run(scene)
    assert "no view can be made for host a" in caplog.text


def test_nothing_is_kept_for_hosts_that_are_gone() -> None:
    async def scene(world: World) -> None:
        await world.first("a")
        world.questions.answer(["a"])
        world.questions.forget(["a"])
        world.made.clear()
        world.questions.answer([])
        assert world.made == []
        world.late = ""
        # Were the last view to it remembered, one that says the same would not be sent.
        assert await world.first("a")

    run(scene)
