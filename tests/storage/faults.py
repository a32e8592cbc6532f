"""Faults on the way to a real storage server, and stores that meet them."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tenacity import Retrying, stop_after_attempt

from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.servers import Server
from tests.storage.proxy import Decide, proxy

ALWAYS = 1 << 30

Matches = Callable[[str, str], bool]
"""Whether a request, given by method and path with query, is meant."""


def any_request(method: str, path: str) -> bool:
    """Whatever is asked."""
    return True


def is_upload(method: str, path: str) -> bool:
    """A request that writes, on either service."""
    return method in ("PUT", "POST")


def is_object_read(method: str, path: str) -> bool:
    """A request for the content of an object, on either service."""
    return method == "GET" and ("alt=media" in path or "list-type" not in path)


def passed(method: str, path: str, headers: dict[str, str]) -> str:
    """No fault."""
    return "pass"


def writes(pattern: str) -> Matches:
    """Requests that write an object whose name matches; of an upload in parts its start."""
    found = re.compile(pattern)
    return lambda method, path: is_upload(method, path) and found.search(path) is not None


class Strike:
    """Does ``what`` to matching requests number ``first`` to ``first + times - 1``, counted from 1."""

    def __init__(self, what: str, matches: Matches = any_request, *, first: int = 1, times: int = 1) -> None:
        self.what = what
        self.matches = matches
        self.first = first
        self.times = times
        self.seen = self.struck = 0
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> str:
        with self._lock:
            if not self.matches(method, path):
                return "pass"
            self.seen += 1
            if not self.first <= self.seen < self.first + self.times:
                return "pass"
            self.struck += 1
            return self.what


class EachOnce:
    """Does ``what`` to every request that writes, and leaves it alone when it is sent again."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.struck: set[tuple[str, str, str]] = set()

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = (method, path, headers.get("content-range", ""))
        if not is_upload(method, path) or request in self.struck:
            return "pass"
        self.struck.add(request)
        return self.what


class Line:
    """The way to one server: stores through a proxy, whose client is made once, as that takes long."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}") + "/run"
        self.beside = open_store(self.url, storage_options=server.storage_options)
        self.endpoint = ""
        self._decide: Decide = passed
        self._stores: dict[float, Store] = {}

    def decide(self, method: str, path: str, headers: dict[str, str]) -> str:
        """For the proxy."""
        return self._decide(method, path, headers)

    def clear(self) -> None:
        """No faults any more."""
        self._decide = passed

    def meeting(self, decide: Decide, timeout_s: float = 30.0) -> Store:
        """The directory through the proxy, where these faults strike from now on."""
        store = self._stores.get(timeout_s)
        if store is None:
            store = open_store(self.url, storage_options=self.options(timeout_s))
            for attempt in Retrying(stop=stop_after_attempt(10), reraise=True):
                # The client is made at its first request; on a busy machine that may take longer than this store has.
                with attempt:
                    store.list("")
            self._stores[timeout_s] = store
        self._decide = decide
        return store

    def options(self, timeout_s: float) -> dict[str, object]:
        """The storage options that lead through the proxy."""
        return {**self.server.storage_options, "endpoint_url": self.endpoint, "timeout_s": timeout_s}


@contextmanager
def line_to(server: Server) -> Iterator[Line]:
    """A line without faults."""
    line = Line(server)
    with proxy(server.endpoint, line.decide) as line.endpoint:
        yield line
