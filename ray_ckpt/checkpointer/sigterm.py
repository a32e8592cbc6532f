"""SIGTERM, with which a scheduler announces that it will end this process, asks for a save and a stop first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

Undo = Callable[[], None]


def on_sigterm(act: Callable[[], None]) -> Undo:
    """Have the first SIGTERM call ``act`` in a thread of its own, and each later one do what it did before.

    Python lets only the main thread set handlers: elsewhere nothing is done, nor where the program has a handler of its
    own. Returns what puts the former handler back.
    """
    former = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not _is_default(former):
        return lambda: None

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, former)
        # A handler runs between any two steps of the main thread, which may hold any lock.
        threading.Thread(target=act, name="ray-ckpt-sigterm", daemon=True).start()

    def undo() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, former)

    signal.signal(signal.SIGTERM, handle)
    return undo


def _is_default(handler: Any) -> bool:
    """Whether nobody has asked for anything: Ray's own handler ends its process."""
    module = getattr(handler, "__module__", None) or ""
    return handler is signal.SIG_DFL or module.split(".")[0] == "ray"
