"""The storage of a soak's runs, and how it fails: in the way that the real one does, for all processes at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ray_ckpt.testing.servers import Server, gcs_server
from tests.soak.plan import RunPlan
from tests.storage.proxy import proxy
from tests.system.waiting import pause

_SLOW_S = 4.0


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


class Stores:
    """Makes the runs' stores below ``folder``; ends the servers that it has started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._server: Server | None = None
        self._storm = Storm()
        self._endpoint = ""

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, plan: RunPlan) -> RunStore:
        """An empty store for a run."""
        if plan.store == "file":
            return FolderStore(self._folder / f"run{plan.number}")
        if self._server is None:
            self._server = self._stack.enter_context(gcs_server())
            self._endpoint = self._stack.enter_context(proxy(self._server.endpoint, self._storm))
        return BucketStore(self._server, self._endpoint, self._storm, f"run{plan.number}")


class Storm:
    """Decides for the proxy of `BucketStore` what becomes of a request while a fault lasts."""

    def __init__(self) -> None:
        self.kind = ""
        self._random = Random(0)

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> str:
        strikes = self._random.random()
        if self.kind == "503 and 429 storm" and strikes < 0.6:
            return "503" if strikes < 0.4 else "429"
        if self.kind == "connections reset" and strikes < 0.5:
            return "reset" if strikes < 0.3 else "cut"
        if self.kind == "replies lost" and strikes < 0.3:
            return "drop"
        if self.kind == "slow":
            pause(_SLOW_S * strikes)
        return "reset" if self.kind == "no network" else "pass"


class BucketStore(RunStore):
    """A folder of a bucket on a server of Google Cloud Storage's API, which the job reaches through a proxy.

    The oracle asks the server itself. Large objects go to the server past the proxy, which names itself in uploads.
    """

    faults = ("503 and 429 storm", "connections reset", "replies lost", "slow", "no network")

    def __init__(self, server: Server, endpoint: str, storm: Storm, name: str) -> None:
        bucket = server.make_bucket(f"soak-{name}")
        self._storm = storm
        self.url = f"{bucket}/run"
        self.options = {**server.storage_options, "endpoint_url": endpoint}
        self.source = {"endpoint": server.endpoint, "bucket": f"soak-{name}", "path": "run"}

    @contextlib.contextmanager
    def fault(self, kind: str) -> Iterator[None]:
        self._storm.kind = kind
        try:
            yield
        finally:
            self._storm.kind = ""


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
