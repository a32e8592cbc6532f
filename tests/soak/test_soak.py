"""The soak itself, for half a minute: `make soak` is the long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.plan import KINDS, plans

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("ray")


@pytest.mark.slow
def test_half_a_minute_of_it_finds_nothing() -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.4", "--seed", "4", "--store", "file"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    counts = {name: int(count) for name, count in re.findall(r"│ ([a-z][a-z ]*?) +│ (\d+)", done.stdout)}
    assert counts["kills"] >= 3
    assert counts["saves committed"] >= 5
    assert counts["violations"] == 0


def test_a_seed_decides_what_happens() -> None:
    first, again, other = (next(plans(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_everything_comes_in_its_turn() -> None:
    events = next(plans(3, events=sum(KINDS.values()))).events
    assert {kind: sum(e.kind == kind for e in events) for kind in KINDS} == KINDS
