"""The coordinator's process, without Ray."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.coordinator.actor import Coordinator


class ExitError(Exception):
    """Instead of the end of the process."""


def test_a_flow_that_fails_ends_the_process_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise ExitError

    def fail(*_: Any) -> None:
        raise KeyError("nobody thought of that")

    async def run() -> None:
        coordinator = Coordinator(str(tmp_path), {}, single_coordinator=False, lease_s=60.0)
        monkeypatch.setattr(coordinator._logic, "answered", fail)
        await coordinator.status()
        while not codes:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(os, "_exit", leave)
    asyncio.run(run())
    assert codes == [1]
    assert "failed at the answer to ReadHead" in caplog.text
    assert "nobody thought of that" in caplog.text
