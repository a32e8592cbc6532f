"""`ModelCheckpoint`: what is saved when, what is the best, what stays."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("keras")

import keras
import ray

import ray_ckpt
from ray_ckpt.errors import MismatchError, NoCheckpointError
from ray_ckpt.frontends.keras import load_variables
from ray_ckpt.protocol.messages import SaveOutcome
from tests.frontends.keras_fits import BATCHES, Scores, fit, make_model, outcome, retention_leaves, run_dir, steps

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]


def checkpoint(path: Path, **settings: Any) -> Any:
    # Both directories.
    run_dir(path / "best")
    return ray_ckpt.ModelCheckpoint(run_dir(path), **settings)


def best(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ray_ckpt.load(path)["keras/monitor"][()])
    return found


def test_is_kerass_own() -> None:
    callback = ray_ckpt.ModelCheckpoint("somewhere")
    assert isinstance(callback, keras.callbacks.ModelCheckpoint)
    assert isinstance(callback, ray_ckpt.ModelCheckpoint)
    assert isinstance(ray_ckpt.BackupAndRestore("somewhere"), keras.callbacks.Callback)


def test_every_epoch_and_the_best_beyond_retention(tmp_path: Path) -> None:
    scores = [0.5, 0.2, 0.4, 0.3, 0.9]
    callback = checkpoint(tmp_path, max_to_keep=2)
    model = fit([Scores(scores), callback], epochs=5)
    retention_leaves(tmp_path, [4 * BATCHES, 5 * BATCHES])
    retention_leaves(tmp_path / "best", [2 * BATCHES])
    assert best(tmp_path)["best"] == 0.2
    assert callback.best_step == best(tmp_path)["best_step"] == 2 * BATCHES
    assert callback.best_url == str(tmp_path / "best")
    last = outcome(model)[0]
    again = make_model()
    load_variables(again, str(tmp_path))
    assert [v.numpy().tobytes() for v in (*again.variables, *again.optimizer.variables)] == last
    load_variables(again, callback.best_url)
    assert int(again.optimizer.iterations) == 2 * BATCHES


def test_save_best_only_and_a_restart_that_knows_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit([Scores([0.3, 0.5, 0.2]), checkpoint(tmp_path, save_best_only=True, verbose=1)])
    said = capsys.readouterr().out
    assert f"improved from None to 0.30000, saving model to {tmp_path}, step 4" in said
    assert "did not improve from 0.30000" in said
    assert steps(tmp_path) == [1 * BATCHES, 3 * BATCHES]
    callback = checkpoint(tmp_path, save_best_only=True)
    fit([Scores([0.25, 0.1]), callback], epochs=2)
    # The new start trained from its beginning: its steps go on from the last.
    assert steps(tmp_path) == [1 * BATCHES, 3 * BATCHES, 3 * BATCHES + 1]
    assert callback.best == 0.1
    assert callback.best_url == str(tmp_path)
    assert not (tmp_path / "best").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "threshold", "saved"), [("max", 0.45, [2]), ("min", None, [1, 3])])
def test_mode_and_threshold(tmp_path: Path, mode: Any, threshold: Any, saved: list[int]) -> None:
    settings = {"monitor": "score", "mode": mode, "initial_value_threshold": threshold}
    callback = checkpoint(tmp_path, save_best_only=True, **settings)
    fit([Scores([0.4, 0.6, 0.2], "score"), callback])
    assert steps(tmp_path) == [epoch * BATCHES for epoch in saved]


def test_an_unknown_direction_is_kerass_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode='max'"):
        fit([Scores([1.0], "score"), checkpoint(tmp_path, monitor="score", save_best_only=True)], epochs=1)


@pytest.mark.slow
def test_a_missing_metric_is_kerass_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Can save best model only with score available"):
        fit([checkpoint(tmp_path, monitor="score", mode="min", save_best_only=True)], epochs=1)
    assert steps(tmp_path) == [BATCHES]
    assert best(tmp_path)["best"] is None


@pytest.mark.slow
def test_batches_count_over_epochs(tmp_path: Path) -> None:
    fit([checkpoint(tmp_path, save_freq=3, monitor="loss")])
    assert steps(tmp_path) == [3, 6, 9, 12]
    retention_leaves(tmp_path / "best", [best(tmp_path)["best_step"]])


@pytest.mark.slow
def test_with_a_backup_batches_count_over_restarts(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        # The order of the two does not matter.
        backup = ray_ckpt.BackupAndRestore(run_dir(tmp_path / "backup"), 1, delete_checkpoint=False)
        return [checkpoint(tmp_path / "models", save_freq=5, keep_best=False), backup]

    for seed, interrupt in enumerate([(0, 2), (1, 1), (1, 3), (2, 2)]):
        fit(callbacks(), seed=seed, interrupt=interrupt)
    fit(callbacks())
    assert steps(tmp_path / "models") == [5, 10]
    assert not (tmp_path / "models" / "best").exists()


@pytest.mark.slow
def test_the_best_that_was_never_committed_is_not_the_best(tmp_path: Path) -> None:
    model = fit([Scores([0.3, 0.2, 0.4]), checkpoint(tmp_path / "run")])
    # What a job leaves that is killed between the two commits.
    shutil.copytree(tmp_path / "run", tmp_path / "lost", ignore=shutil.ignore_patterns("best"))
    callback = checkpoint(tmp_path / "lost")
    fit([Scores([0.35]), callback], epochs=1, model=model)
    assert callback.best == 0.35
    assert steps(tmp_path / "lost" / "best") == [callback.best_step]
    # And where it was committed it stays.
    callback = checkpoint(tmp_path / "run")
    fit([Scores([0.35]), callback], epochs=1, model=model)
    assert (callback.best, callback.best_step) == (0.2, 2 * BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("save_best_only", [False, True])
def test_nan_is_not_the_best_for_ever(tmp_path: Path, save_best_only: bool) -> None:
    model = fit([Scores([math.nan]), checkpoint(tmp_path, save_best_only=save_best_only)], epochs=1)
    callback = checkpoint(tmp_path, save_best_only=save_best_only)
    fit([Scores([0.4]), callback], epochs=1, model=model)
    assert callback.best == 0.4
    assert steps(Path(callback.best_url))[-1] == callback.best_step


@pytest.mark.slow
def test_jax_saves_within_an_epoch(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    run_dir(tmp_path / "best")
    program = (
        "import sys, ray_ckpt; from tests.frontends.keras_fits import fit;"
        "fit([ray_ckpt.ModelCheckpoint(sys.argv[1], monitor='loss', save_freq=3)], epochs=2)"
    )
    environment = {"KERAS_BACKEND": "jax", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, "-c", program, run_dir(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [3, 6]


def test_the_best_whose_save_failed_is_not_the_best() -> None:
    callback: Any = ray_ckpt.ModelCheckpoint("somewhere", save_best_only=True)
    callback.best, callback.best_step = 0.1, 8

    class Run:
        found: SaveOutcome | None = None

        def outcome(self, step: int) -> SaveOutcome | None:
            assert step == 8
            return self.found

    run = Run()
    callback._last_best = (run, 8, 0.3, 4)
    callback._review_best()
    assert callback.best == 0.1
    run.found = SaveOutcome(generation=1, step=8, state="failed", error="the disk is full")
    callback._review_best()
    assert (callback.best, callback.best_step) == (0.3, 4)
    assert callback._last_best is None


@pytest.mark.slow
def test_loading_into_another_model(tmp_path: Path) -> None:
    fit([checkpoint(tmp_path)], epochs=1)
    with pytest.raises(MismatchError, match=r"dense.*expected float32\[3, 5\], found float32\[3, 4\]"):
        load_variables(make_model(units=5), str(tmp_path))
    with pytest.raises(NoCheckpointError):
        load_variables(make_model(), str(tmp_path / "nothing"))
    weights = make_model()
    load_variables(weights, str(tmp_path), optimizer=False)
    assert int(weights.optimizer.iterations) == 0
    kernel = next(name for name in ray_ckpt.load(tmp_path) if name.endswith("dense/kernel") or "/kernel" in name)
    assert any(np.array_equal(v.numpy(), ray_ckpt.load(tmp_path)[kernel]) for v in weights.variables)
