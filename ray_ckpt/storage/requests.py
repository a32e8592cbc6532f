"""Single requests of the fsspec file systems: none takes for ever, and those of an upload are tried again.

An upload in parts cannot be repeated as a whole by `store`: its bytes are gone by then. Other requests are repeated
there, together with what belongs to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import tenacity

from ray_ckpt.storage.retry import deadline_s, policy

T = TypeVar("T")

_MANY = 1000
"""Tries: the deadline comes first."""

SILENCE = 0.25
"""Share of an operation's time after which a silent server has its request asked again."""


async def send(request: Callable[[], Awaitable[T]], what: str, timeout_s: float, data: Any, *, part: bool) -> T:
    """The answer to a request with this body.

    ``part``: it belongs to an upload, so it is tried again; half of the time is for it, as an upload's first request
    and first block come together.
    """
    limit_s = timeout_s / 2 if part else timeout_s

    async def once() -> T:
        seconds_s = deadline_s(limit_s, len(data) if isinstance(data, (bytes, bytearray, memoryview)) else 0)
        try:
            return await asyncio.wait_for(request(), seconds_s)
        except asyncio.TimeoutError as error:
            if str(error):
                raise  # the library's own
            # Not a TimeoutError: fsspec would take the text away.
            raise ConnectionAbortedError(f"no answer to a request within {seconds_s:.1f} s") from None

    if not part:
        return await once()
    return await tenacity.AsyncRetrying(**policy(what, _MANY, limit_s))(once)
