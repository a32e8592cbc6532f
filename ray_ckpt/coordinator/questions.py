"""The hosts' open questions: each is answered once its view differs from what the host has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ray_ckpt.protocol.messages import HostView
from ray_ckpt.protocol.views import adds_to

logger = logging.getLogger(__name__)

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
        self._sent: dict[str, HostView] = {}

    async def ask(self, host: str, seen: Seen, wait_s: float) -> HostView | None:
        """The host's next view; None if there is none within ``wait_s``, or the host has asked again meanwhile."""
        loop = asyncio.get_running_loop()
        question = _Question(seen, loop.create_future())
        older = self._open.get(host)
        if older is not None and not older.answer.done():
            older.answer.set_result(None)
        self._open[host] = question
        sent = self._sent.get(host)
        if host in self._missed or (sent is not None and (sent.epoch, sent.version) > seen):
            self._look(host)
        end = loop.call_later(wait_s, self._expire, host, question)
        try:
            return await question.answer
        finally:
            end.cancel()
            if self._open.get(host) is question:
                del self._open[host]

    def answer(self, hosts: Iterable[str]) -> None:
        """Look again for these hosts and for those that did not ask, or could not be answered, the last time."""
        for host in self._missed.union(hosts):
            try:
                self._look(host)
            except Exception:
                # The others wait too; this one is told when its question ends.
                self._missed.add(host)
                logger.exception("no view can be made for host %s", host)

    def forget(self, hosts: Iterable[str]) -> None:
        """These are gone: nothing is kept for them."""
        for host in hosts:
            self._missed.discard(host)
            self._sent.pop(host, None)

    def _look(self, host: str) -> None:
        question = self._open.get(host)
        view = None if question is None or question.answer.done() else self._view(host)
        if question is None or view is None:
            self._missed.add(host)
            return
        self._missed.discard(host)
        if self._is_new(host, view, question.seen, at_once=True):
            question.answer.set_result(view)

    def _expire(self, host: str, question: _Question) -> None:
        if question.answer.done():
            return
        try:
            view = self._view(host)
            new = view is not None and self._is_new(host, view, question.seen, at_once=False)
        except Exception as error:
            # Whoever waits must hear of it: nothing else would ever end this question.
            question.answer.set_exception(error)
        else:
            question.answer.set_result(view if new else None)

    def _is_new(self, host: str, view: HostView, seen: Seen, *, at_once: bool) -> bool:
        """Whether it says what the host does not have yet, and is worth an answer at once; then it is on its way."""
        sent = self._sent.get(host)
        if sent is not None and (sent.epoch, sent.version) <= seen:
            new = adds_to(view, sent) if at_once else replace(view, version=sent.version) != sent
            if not new:
                return False
        self._sent[host] = view
        return True
