"""The oracle around one input: nothing but a result or an error of ours, bounded time and memory, no side effects."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray_ckpt.errors import RayCkptError
from ray_ckpt.testing.fuzz.hostile import OUTSIDE

CPU_LIMIT_S = 5.0
"""Processor time for one input: wall time would count what other processes do."""

_HEADROOM_NBYTES = 3 << 30
"""Address space beyond what the process has at its start: threads reserve a lot of it."""

_SLACK_NBYTES = 64 << 20
_PER_BYTE = 100
"""Memory that an input may cost: the keys of an index can be 64 times as large as the file."""

_TRACE_CHARS = 3000

_EXECUTING = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "marshal.load",
)
_EXECUTING_TEXT = ("exec", "compile")
_TOUCHING = (
    "open",
    "os.remove",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
)


class HangError(BaseException):
    """Not an `Exception`: no code under test may swallow it."""


class Guard:
    """Watches this process from now on. ``folder``: where the inputs lie; what is beside it must not be touched."""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder, "")
        self._beside = os.path.join(os.path.dirname(folder), "")
        self._seen: list[str] = []
        self._on = False
        self.trial = True
        limit = _resident()[0] + _HEADROOM_NBYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGPROF, self._hang)
        sys.addaudithook(self._audit)

    def violation(self, read: Callable[[Any], Any], value: Any, nbytes: int) -> tuple[bool, str | None]:
        """Whether the input was accepted, and what was wrong with the way it was dealt with."""
        before, peak = _resident()[1], _peak()
        error = self._error(read, value)
        if isinstance(error, HangError):
            self._seen.append(f"took more than {CPU_LIMIT_S:.0f} s of processor time")
        if error is not None and not isinstance(error, RayCkptError):
            self._seen.append("".join(traceback.format_exception(error))[-_TRACE_CHARS:])
        cost = _peak() - before
        if _peak() > peak and cost > _SLACK_NBYTES + _PER_BYTE * nbytes:
            self._seen.append(f"took {cost} bytes of memory for an input of {nbytes}")
        return error is None, "; ".join(self._seen) or None

    def _error(self, read: Callable[[Any], Any], value: Any) -> BaseException | None:
        with self._watched():
            try:
                read(value)
            except BaseException as error:
                return error
        return None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._seen = []
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        self._on = not self.trial
        try:
            yield
        finally:
            self._on = False
            signal.setitimer(signal.ITIMER_PROF, 0.0)

    def _hang(self, _signal: int, _frame: FrameType | None) -> None:
        raise HangError

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _EXECUTING or (event in _EXECUTING_TEXT and _is_text(arguments)):
            self._seen.append(f"{event}{arguments!r:.300}")
        elif event in _TOUCHING and isinstance(arguments[0], str | bytes):
            path = os.path.normpath(os.path.abspath(os.fsdecode(arguments[0])))
            if path in OUTSIDE or (path.startswith(self._beside) and not f"{path}/".startswith(self._folder)):
                self._seen.append(f"{event} of {path}, which is outside of the directory")


def _is_text(arguments: tuple[Any, ...]) -> bool:
    """Source text, and not a module's code that is loaded for the first time."""
    code = arguments[0]
    return isinstance(code, str | bytes) or str(getattr(code, "co_filename", "")) == "<string>"


def _resident() -> tuple[int, int]:
    """Bytes of address space and of memory that this process has."""
    with open("/proc/self/statm", "rb") as file:
        size, resident = file.read().split()[:2]
    return int(size) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _peak() -> int:
    # Not getrusage's: that begins with the peak of the process which has started this one.
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"VmHWM:")) * 1024
