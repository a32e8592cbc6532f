"""The demo as a user runs it, small: it succeeds, and it leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
MARK = "RAY_CKPT_DEMO_TEST"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


@pytest.fixture
def mark() -> Iterator[str]:
    """In the environment of all that this test starts; what is left of it is ended."""
    value = uuid.uuid4().hex
    yield value
    for process in marked(value):
        process.kill()


def marked(value: str) -> list[psutil.Process]:
    """All running processes with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def start(mark: str, *options: str) -> subprocess.Popen[str]:
    """The demo, with its output in a pipe."""
    command = [sys.executable, "-u", str(ROOT / "examples" / "demo" / "run.py"), *options]
    environment = {**os.environ, MARK: mark}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_small_demo_succeeds_and_leaves_nothing_behind(mark: str, tmp_path: Path) -> None:
    demo = start(mark, "--hosts", "3", "--steps", "12", "--save-secs", "1", "--output", str(tmp_path))
    said, _ = demo.communicate(timeout=280)
    assert demo.returncode == 0, said
    assert said.count("ok     ") == 5, said
    assert "FAILED" not in said
    assert (tmp_path / "saves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "journals" / "start2-rank1.jsonl").read_text().splitlines()]
    assert lines[0]["step"] > 0, "start 2 restored nothing"
    assert marked(mark) == []


def test_an_interrupted_demo_leaves_nothing_behind(mark: str, tmp_path: Path) -> None:
    demo = start(mark, "--hosts", "2", "--no-tf", "--output", str(tmp_path))
    assert demo.stdout is not None
    for line in demo.stdout:
        if "processes compile" in line:
            demo.send_signal(signal.SIGINT)
            break
    said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 130, said
    assert marked(mark) == []
