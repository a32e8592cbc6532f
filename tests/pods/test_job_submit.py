"""The examples as users submit them, on a head of the test's own."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.snapshot import default_folder
from tests.pods.head import ROOT, Head, running

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]

CONFIGS = ROOT / "examples" / "configs"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Ray's socket names must fit in 107 bytes: too few for tmp_path.
    folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    try:
        with running(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for log in tmp_path.rglob("_ray_ckpt/log"):
        run = run_id(f"file://{log.parents[1]}")
        for left in default_folder(run).parent.glob(f"{run}*"):
            shutil.rmtree(left)


def config(name: str, folder: Path, **changes: object) -> Path:
    """A copy of the config with other values in some of its lines."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert count == 1, f"{name}.yaml has no line {key}"
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def lines(output: str, pattern: str) -> list[str]:
    """What the pattern's group found, line by line."""
    return re.findall(pattern, output)


def test_jax(head: Head, storage: Path) -> None:
    """Steps, saves and commits can be followed, and the run's data lies where Ray's storage is."""
    path = config("jax_local", storage, storage=storage, steps=30, save_steps=10, report_steps=15)
    output = head.submit("examples/jax_tpu_pod.py", path)
    assert lines(output, r"INFO step (\d+): loss \d") == ["15", "30"]
    assert lines(output, r"INFO step (\d+): a copy is taken") == ["10", "20", "30"]
    assert lines(output, r"INFO step (\d+) is committed as") == ["10", "20", "30"]
    run = storage / "jax-example" / "ray_ckpt"
    assert [c.step for c in ray_ckpt.checkpoints(run)] == [10, 20, 30]
    assert lines(output, r"ended with .* newest checkpoint: (\S+)") == [f"{run}/model.ckpt-30"]


@pytest.mark.slow
def test_jax_goes_on(head: Head, storage: Path) -> None:
    for steps in (20, 30):
        path = config("jax_local", storage, storage=storage, steps=steps, save_steps=10, report_steps=10)
        output = head.submit("examples/jax_tpu_pod.py", path)
    assert "restored step 20 from" in output
    assert lines(output, r"INFO step (\d+): loss \d") == ["30"]


@pytest.mark.slow
def test_session(head: Head, storage: Path) -> None:
    pytest.importorskip("tensorflow")
    for steps, began in ((40, 0), (60, 40)):
        path = config("tf_session", storage, dir=storage / "run", steps=steps, save_steps=20)
        output = head.submit("examples/tf_session.py", path)
        assert f"begins at step {began}" in output
        assert lines(output, r"\nstep (\d+): loss \d") == [str(s) for s in range(began + 20, steps + 1, 20)]
        assert lines(output, r"INFO step (\d+) is committed as")[-1] == str(steps)
        assert "Connecting to existing Ray cluster" in output


@pytest.mark.slow
def test_keras(head: Head, storage: Path) -> None:
    pytest.importorskip("keras")
    for epochs, began in ((1, "epoch 0, 0 batches"), (2, "epoch 1, 9 batches")):
        path = config("keras_fit", storage, dir=storage / "run", epochs=epochs, save_freq=4, samples=640)
        output = head.submit("examples/keras_fit.py", path)
        assert began in output
        assert re.search(r"INFO step \d+ is committed as \S+/run/backup/", output)
        assert "best checkpoint: step" in output


@pytest.mark.slow
def test_a_wrong_config_ends_the_job_at_once(head: Head, storage: Path) -> None:
    path = config("tf_session", storage, dir=storage / "run")
    path.write_text(path.read_text() + "save_step: 3\n")
    with pytest.raises(AssertionError, match="'save_step' is unknown; did you mean 'save_steps'"):
        head.submit("examples/tf_session.py", path)
