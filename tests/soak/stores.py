"""The storage of a soak's runs, and how it fails: in the way that the real one does, for all processes at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunStore(ABC):
    """The storage of one run. ``faults``: what can happen to it; ``readable``: whether the oracle can look now."""

    url: str
    options: dict[str, Any]
    source: dict[str, str]
    faults: tuple[str, ...]
    readable = True

    @abstractmethod
    def fault(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """It fails so while the block runs."""


_EXCHANGE = 2
_HERE = -100


class FolderStore(RunStore):
    """A folder on a local disk.

    "gone": a file is in its place, so that every operation fails.
    """

    faults = ("gone",)

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._other = folder.with_name(f"{folder.name}.other")
        self._other.write_text("not a folder")
        self.url = str(folder)
        self.options: dict[str, Any] = {}
        self.source = {"folder": str(folder)}

    @contextlib.contextmanager
    def fault(self, kind: str) -> Iterator[None]:
        self.readable = False
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
            self.readable = True

    def _exchange(self) -> None:
        """In one step: a folder that is not there for a moment would be made anew, and be empty."""
        libc = ctypes.CDLL(None, use_errno=True)
        names = [os.fsencode(path) for path in (self._folder, self._other)]
        if libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE):
            raise OSError(ctypes.get_errno(), f"cannot exchange {self._folder} with {self._other}")
