"""The end of processes that are not our children, without asking again and again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


def when_ended(pid: int, act: Callable[[], None]) -> None:
    """Call ``act`` in the running event loop once this process has ended, a zombie being one that has.

    Where the system has no such descriptors (see ``pidfd_open(2)``), or the process is gone already, nothing happens.
    """
    try:
        watched = os.pidfd_open(pid)
    except (OSError, AttributeError):
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(watched)
        os.close(watched)
        act()

    loop.add_reader(watched, ended)
