"""A host's snapshot memory: what is made, emptied and given up when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.snapshot import Segment, SegmentState

KILLED_IN_ITS_SNAPSHOT = """
import os, signal, sys
from ray_ckpt.snapshot import SaveId, Segment
with Segment.open(sys.argv[1], writable=True).fill(SaveId("run", 1, 9, 0, 1, "plan", "steps")):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_in_snapshot(path: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED_IN_ITS_SNAPSHOT, path], env=env, timeout=60)
    assert done.returncode == -9


def test_two_processes_killed_in_their_snapshots_cost_no_memory(tmp_path: Path) -> None:
    memory = HostMemory(tmp_path)
    paths = memory.prepare(0, 1000, 2)
    for path in paths:
        kill_in_snapshot(path)
    segments = [Segment.open(path) for path in paths]
    assert [s.state for s in segments] == [SegmentState.FILLING] * 2
    assert memory.sealed() == []
    assert [s.state for s in segments] == [SegmentState.EMPTY] * 2
