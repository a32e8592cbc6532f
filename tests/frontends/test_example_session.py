"""The example of a session, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from examples import tf_session
from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("ray")


def told(output: str, what: str) -> list[str]:
    """The lines that begin so."""
    return [line for line in output.splitlines() if line.startswith(what)]


@pytest.mark.usefixtures("ray_cluster")
def test_the_second_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first as a user runs it, with a Ray of its own; the second in this process and its cluster."""
    RUNS.add(run_id(str(tmp_path)))
    options = ["--dir", str(tmp_path), "--save-steps", "20", "--steps"]
    first = subprocess.run(
        [sys.executable, "examples/tf_session.py", *options, "50"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    assert told(first.stdout, "begins") == ["begins at step 0"]
    assert told(first.stdout, "saved") == [f"saved step {step}" for step in (0, 20, 40, 50)]
    tf_session.main([*options, "60"])
    second = capsys.readouterr().out
    assert told(second, "begins") == ["begins at step 50"]
    assert told(second, "saved") == ["saved step 50", "saved step 60"]
    early, late = (float(told(output, "step")[0].rpartition(" ")[2]) for output in (first.stdout, second))
    assert late < early
    reader = tf.train.load_checkpoint(str(tmp_path))
    assert reader.get_tensor("global_step") == 60
    assert reader.get_variable_to_shape_map()["embedding"][1] == 16
