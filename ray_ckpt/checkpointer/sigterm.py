"""SIGTERM, with which a scheduler announces that it will end this process, asks for a save and a stop first."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from types import FrameType
from typing import Any, Protocol


class Listener(Protocol):
    """Who is told of SIGTERM, in a thread of its own."""

    def on_sigterm(self) -> None:
        """This process is about to be ended."""


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
_former: Any = None
_pid = 0


def listen(listener: Listener) -> None:
    """Have the first SIGTERM tell ``listener``, and each later one do what it did before.

    Python lets only the main thread set handlers: elsewhere nothing is done, nor where the program, or JAX for its own
    preemption service, has a handler already. The listener is held weakly.
    """
    global _former, _pid
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not _handle:
        if not _is_default(handler) or _jax_listens():
            return
        _former, _pid = handler, os.getpid()
        signal.signal(signal.SIGTERM, _handle)
    _listeners.add(listener)


def unlisten(listener: Listener) -> None:
    """Tell it no more; with nobody left to tell SIGTERM does what it did before."""
    _listeners.discard(listener)
    if not _listeners:
        _put_back()


def _handle(number: int, _: FrameType | None) -> None:
    told = [] if os.getpid() != _pid else list(_listeners)
    _put_back()
    if not told:
        # A process that was forked from the listeners', or one that has lost them.
        os.kill(os.getpid(), number)
    for listener in told:
        # A handler runs between any two steps of the main thread, which may hold any lock.
        threading.Thread(target=listener.on_sigterm, name="ray-ckpt-sigterm", daemon=True).start()


def _put_back() -> None:
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, _former)


def _is_default(handler: Any) -> bool:
    """Whether nobody has asked for anything: Ray's own handler ends its process."""
    module = getattr(handler, "__module__", None) or ""
    return handler is signal.SIG_DFL or module.split(".")[0] == "ray"


def _jax_listens() -> bool:
    """JAX's handler is none of Python's, and lost where another one is set."""
    jax = sys.modules.get("jax")
    return bool(getattr(getattr(jax, "distributed", None), "is_initialized", lambda: False)())
