"""Threads for I/O that may hang: a call that is late is given up, and its thread is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray_ckpt.errors import StorageError


class IoThreads:
    """At most ``threads`` calls at once, not counting those that were given up. To be used in one event loop."""

    def __init__(self, threads: int) -> None:
        self._room = asyncio.Semaphore(threads)

    async def run(self, timeout_s: float, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result, which it has ``timeout_s`` for once it runs.

        Raises:
            StorageError: it hangs. Nothing can end it, so it may still do its work later.
        """
        async with self._room:
            # One for each call: what hangs in another's thread must not keep this one waiting.
            pool = ThreadPoolExecutor(1, "ray-ckpt-io")
            answer = asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
            pool.shutdown(wait=False)
            done, _ = await asyncio.wait([answer], timeout=timeout_s)
            if not done:
                raise StorageError(
                    f"{what} has not been answered for {timeout_s:.0f} s: does the storage or its server hang?"
                )
            return answer.result()
