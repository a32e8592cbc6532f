"""The end of a process, noticed at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from ray_ckpt.agent.watch import when_ended


def test_it_is_called_once_the_process_has_ended_and_not_before() -> None:
    async def scene() -> None:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        ended = asyncio.Event()
        when_ended(child.pid, ended.set)
        await asyncio.sleep(0.05)
        assert not ended.is_set()
        child.communicate(b"\n")
        await asyncio.wait_for(ended.wait(), 60)

    asyncio.run(scene())


def test_a_process_that_is_gone_already_is_no_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()

    async def scene() -> None:
        when_ended(child.pid, lambda: None)

    asyncio.run(scene())
