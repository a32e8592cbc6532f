"""The thread that carries a worker's reports to its host's agent and the coordinator's views back."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.protocol.worker import WorkerLogic

logger = logging.getLogger(__name__)

_FIRST_POLL_S = 1.0
"""Before the coordinator has said how long a question may stay open."""
_AGAIN_S = 0.5
_LAST_WORD_S = 5.0


class Courier:
    """Keeps one question open at the agent, so that news come at once, and asks again when there is news to tell.

    ``condition`` guards the logic; it is notified after each view. ``find`` looks the agent up, again only after
    ``check``, which raises if there can be none any more. ``on_view`` runs in this thread after each view, without the
    lock; ``on_broken`` if it cannot go on.
    """

    def __init__(
        self,
        logic: WorkerLogic,
        condition: threading.Condition,
        find: Callable[[], Any],
        check: Callable[[], None],
        on_view: Callable[[], None],
        on_broken: Callable[[Exception], None],
    ) -> None:
        self._logic = logic
        self._condition = condition
        self._find = find
        self._check = check
        self._on_view = on_view
        self._on_broken = on_broken
        self._agent: Any = None
        self._wake = threading.Event()
        self._news = False
        self._closing = False
        self._open: list[Any] = []
        self._seen = (0, -1)
        self._poll_s = _FIRST_POLL_S
        self._thread = threading.Thread(target=self._run, name="ray-ckpt-courier", daemon=True)

    def start(self) -> None:
        """Find the agent, then run in the background. Raises `RayError` if there can be none."""
        self._agent = self._find()
        self._thread.start()

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call the agent and wait; not for the training thread's usual path."""
        return ray.get(getattr(self._agent, method).remote(*arguments), timeout=timeout_s)

    def nudge(self) -> None:
        """There is something new to report."""
        self._news = True
        self._wake.set()

    def close(self) -> None:
        """Stop, with one last report."""
        if not self._closing and self._thread.is_alive():
            self._closing = True
            self._wake.set()
            self._thread.join(_LAST_WORD_S)
            with contextlib.suppress(RayError, TimeoutError):
                ray.get(self._ask(0.0), timeout=_LAST_WORD_S)

    def _ask(self, wait_s: float) -> Any:
        with self._condition:
            report = self._logic.report()
        return self._agent.sync.remote(report, os.getpid(), self._seen, wait_s)

    def _run(self) -> None:
        try:
            self._wake.set()
            # Once refused there is nothing to tell any more, and no agent or coordinator must be revived for it.
            while not self._closing and self._logic.refused is None:
                self._wake.wait()
                self._wake.clear()
                try:
                    self._serve()
                except RayError as error:
                    self._recover(error)
        except Exception as error:
            logger.exception("the connection to the coordinator has broken down")
            self._on_broken(error)

    def _serve(self) -> None:
        """Take in what has been answered, tell what is new, and leave one question open."""
        self._collect()
        if self._news:
            self._news = False
            self._send(0.0)
        if not self._open:
            self._send(self._poll_s)

    def _send(self, wait_s: float) -> None:
        ref = self._ask(wait_s)
        self._open.append(ref)
        ref.future().add_done_callback(lambda _: self._wake.set())

    def _collect(self) -> None:
        """Take in every answer that is there."""
        if not self._open:
            return
        ready, self._open = ray.wait(self._open, num_returns=len(self._open), timeout=0)
        for ref in ready:
            answer = ray.get(ref)
            if answer is None:
                continue
            epoch, version, view = answer
            self._poll_s = view.poll_s
            with self._condition:
                self._logic.on_view(epoch, version, view)
                self._seen = max(self._seen, (epoch, version))
                self._condition.notify_all()
            self._on_view()

    def _recover(self, error: RayError) -> None:
        """The agent does not answer: Ray restarts it, or a new one is started."""
        cause = getattr(error, "cause", None)
        what = f"{type(cause or error).__name__}{f': {cause}' if cause else ''}"
        logger.warning("the host's agent does not answer (%s): looking for it again", what)
        with self._condition:
            self._logic.late = f"the agent of this host ({what})"
        self._open = []
        time.sleep(_AGAIN_S)
        self._check()
        try:
            self._agent = self._find()
        except (RayError, ValueError, RuntimeError) as again:
            logger.warning("no agent yet: %s", again)
        self._wake.set()
