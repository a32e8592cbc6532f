"""The Keras example as a user runs it, and kills it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("keras")

import ray_ckpt
from tests.frontends.keras_fits import run_dir

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("ray")


def start(path: Path, epochs: int, save_freq: int, samples: int, backend: str = "tensorflow") -> subprocess.Popen[str]:
    """The example, with its output in a pipe."""
    for name in ("models", "models/best", "backup"):
        run_dir(path / name)
    options = {"--dir": str(path), "--epochs": epochs, "--save-freq": save_freq, "--samples": samples}
    command = [sys.executable, str(ROOT / "examples" / "keras_fit.py"), *(str(x) for o in options.items() for x in o)]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def said(process: subprocess.Popen[str]) -> list[str]:
    """The lines of a run that succeeds."""
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out.splitlines()


def history(lines: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(line for line in lines if line.startswith("history"))[8:])
    return found


@pytest.mark.slow
def test_the_second_run_goes_on(tmp_path: Path) -> None:
    first = said(start(tmp_path, epochs=1, save_freq=4, samples=640))
    assert first[0] == "epoch 0, 0 batches"
    second = said(start(tmp_path, epochs=2, save_freq=4, samples=640))
    assert second[0] == "epoch 1, 9 batches"
    assert [a[0] for a in history(second).values()] == [a[0] for a in history(first).values()]
    assert ray_ckpt.checkpoints(tmp_path / "models")[-1].step == 18
    assert re.fullmatch(r"best checkpoint: step \d+, accuracy \S+, loss \S+", second[-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_killed_and_run_again(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    expected = said(start(tmp_path / "whole", 3, 5, 20_000, backend))
    victim = start(tmp_path / "killed", 3, 5, 20_000, backend)
    assert victim.stdout is not None
    with victim:
        for line in victim.stdout:
            if line.startswith("epoch 1"):
                victim.kill()
                break
    resumed = said(start(tmp_path / "killed", 3, 5, 20_000, backend))
    batches = int(resumed[0].split()[2])
    assert 0 < batches < 3 * 282, "it began anew, or had ended"
    # Weights and history; the first lines tell where each began.
    assert resumed[-3:-1] == expected[-3:-1]


@pytest.mark.slow
def test_mirrored_variables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.frontends.keras_mirrored", run_dir(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    whole, resumed = (json.loads(line) for line in done.stdout.splitlines())
    assert resumed["weights"] == whole["weights"]
    for name, values in whole["history"].items():
        # Sums are divided among the replicas anew: the resumed epoch's may differ in the last bit.
        assert resumed["history"][name] == pytest.approx(values, rel=1e-6)
