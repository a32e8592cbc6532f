"""The hosts' open questions: each is answered once its view differs from what the host has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ray_ckpt.protocol.messages import HostView
from ray_ckpt.protocol.views import essence

Seen = tuple[int, int]
"""(epoch, version) of the newest view that a host has; (0, -1) before the first."""


@dataclass(frozen=True, slots=True)
class _Question:
    seen: Seen
    answer: asyncio.Future[HostView | None]


class Questions:
    """At most one of each host. ``view`` makes a host's view, None while there is none. For one event loop."""

    def __init__(self, view: Callable[[str], HostView | None]) -> None:
        self._view = view
        self._open: dict[str, _Question] = {}
        self._missed: set[str] = set()
        self._sent: dict[str, tuple[HostView, HostView]] = {}

    async def ask(self, host: str, seen: Seen, wait_s: float) -> HostView | None:
        """The host's next view; None if there is none within ``wait_s``, or the host has asked again meanwhile."""
        loop = asyncio.get_running_loop()
        question = _Question(seen, loop.create_future())
        older = self._open.get(host)
        if older is not None and not older.answer.done():
            older.answer.set_result(None)
        self._open[host] = question
        sent = self._sent.get(host)
        if host in self._missed or (sent is not None and (sent[0].epoch, sent[0].version) > seen):
            self.answer((host,))
        end = loop.call_later(wait_s, self._expire, host, question)
        try:
            return await question.answer
        finally:
            end.cancel()
            if self._open.get(host) is question:
                del self._open[host]

    def answer(self, hosts: Iterable[str]) -> None:
        """Look again for these hosts; what is found while one does not ask is found when it does."""
        for host in hosts:
            question = self._open.get(host)
            if question is None or question.answer.done():
                self._missed.add(host)
                continue
            self._missed.discard(host)
            view = self._fresh(host, question.seen, at_once=True)
            if view is not None:
                question.answer.set_result(view)

    def _expire(self, host: str, question: _Question) -> None:
        if not question.answer.done():
            question.answer.set_result(self._fresh(host, question.seen, at_once=False))

    def _fresh(self, host: str, seen: Seen, *, at_once: bool) -> HostView | None:
        """The host's view, None if it says what the host has already, or nothing that is worth an answer at once."""
        view = self._view(host)
        if view is None:
            return None
        main = essence(view)
        sent = self._sent.get(host)
        if sent is not None and (sent[0].epoch, sent[0].version) <= seen:
            same = main == sent[1] if at_once else replace(view, version=sent[0].version) == sent[0]
            if same:
                return None
        self._sent[host] = view, main
        return view
