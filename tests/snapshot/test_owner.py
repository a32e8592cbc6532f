"""Who fills a segment: one process at a time, and none that has died."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ckpt.errors import SaveError
from ray_ckpt.snapshot import Segment, SegmentState
from ray_ckpt.snapshot.segment import _Word

from .helpers import save_id

SAVE = save_id("plan")
FILL = """
import sys
from ray_ckpt.snapshot import SaveId, Segment
with Segment.open(sys.argv[1], writable=True) as segment, segment.fill(SaveId("run", 1, 9, 0, 1, "plan", "steps")):
    print("filling", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[Segment]:
    with Segment.create(tmp_path / "s", 10_000) as made:
        yield made


@pytest.fixture
def filler(segment: Segment) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of a snapshot."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FILL, str(segment.path)]
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filling\n"
        yield process
        process.kill()


def test_while_a_process_fills_it_no_other_can(segment: Segment, filler: subprocess.Popen[str]) -> None:
    with pytest.raises(SaveError, match=f"process {filler.pid} is filling it"), segment.fill(SAVE):
        pass
    assert not segment.empty_if_abandoned()
    assert segment.state is SegmentState.FILLING
    filler.communicate("", timeout=60)
    with segment.fill(SAVE):
        assert segment.save == SAVE


def test_what_a_killed_process_was_filling_is_emptied(segment: Segment, filler: subprocess.Popen[str]) -> None:
    filler.kill()
    filler.wait(60)
    assert segment.state == SegmentState.FILLING
    assert segment.empty_if_abandoned()
    assert segment.state == SegmentState.EMPTY
    assert not segment.empty_if_abandoned()


def test_two_mappings_in_one_process_do_not_fill_together(segment: Segment) -> None:
    with Segment.open(segment.path, writable=True) as other, segment.fill(SAVE):
        with pytest.raises(SaveError, match="is filling it"), other.fill(SAVE):
            pass
        assert segment.state is SegmentState.FILLING


def test_a_fill_that_was_taken_over_is_not_sealed(segment: Segment) -> None:
    with segment.fill(SAVE):
        segment._words[_Word.FILLS] += 1
        with pytest.raises(SaveError, match="expected it being filled by this process"):
            segment.seal(b"{}")
    assert segment.state is SegmentState.FILLING, "it is the other's now"


def test_only_what_is_being_filled_is_sealed(segment: Segment) -> None:
    with pytest.raises(SaveError, match="the segment is empty"):
        segment.seal(b"{}")
    assert segment.state is SegmentState.EMPTY
