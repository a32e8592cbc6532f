"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_NEVER_SET = threading.Event()


def pause(seconds_s: float) -> None:
    """Let time pass: the pace of a training loop, or of a poll."""
    _NEVER_SET.wait(seconds_s)


def eventually(condition: Callable[[], T], what: str, timeout_s: float = 60.0, every_s: float = 0.05) -> T:
    """The first true value of ``condition()``; an `AssertionError` that says what did not come in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        pause(every_s)
