"""The trainers of frameworks: two processes, a save, a second fit of the same name that goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ray_ckpt
from tests.train import framework_loops as loops
from tests.train.fits import Run

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def fits(run: Run, loop: Any, **how: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Train to step 3, then in another fit to step 5; the arrays to which the last result points."""
    for steps in (3, 5):
        result = run.fit(loop, steps=steps, **how)
    assert [note["restored"] for note in run.noted(1) + run.noted(2)] == [None, None, 3, 3]
    pointer = ray_ckpt.from_train(result.checkpoint)
    assert (pointer.step, pointer.generation) == (5, 2)
    return pointer.load()


def test_jax(run: Run) -> None:
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    flags = "--xla_force_host_platform_device_count=2"
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    found = fits(
        run, loops.jax_loop, trainer=JaxTrainer, more={"jax_config": JaxConfig(use_tpu=True)},
        run_config={"worker_runtime_env": {"env_vars": env}},
    )  # fmt: skip
    assert {(note["processes"], note["devices"]) for note in run.noted(1)} == {(2, 4)}
    expected = np.arange(32, dtype=np.float32).reshape(loops.SHAPE) + 5
    assert str(found["w"].dtype) == "bfloat16"
    np.testing.assert_array_equal(found["w"].astype(np.float32), expected)
    np.testing.assert_array_equal(found["b"], np.full(3, 5, np.int32), strict=True)


def test_tensorflow(run: Run) -> None:
    from ray.train.tensorflow import TensorflowTrainer

    found = fits(run, loops.tensorflow_loop, trainer=TensorflowTrainer)
    assert [(note["replicas"], note["found"]) for note in run.noted(2)] == [(2, 3)] * 2
    expected = np.arange(32, dtype=np.float32).reshape(loops.SHAPE) + 5
    np.testing.assert_array_equal(found["variable/.ATTRIBUTES/VARIABLE_VALUE"], expected, strict=True)


def test_torch(run: Run) -> None:
    pytest.importorskip("torch")
    from ray.train.torch import TorchTrainer

    found = fits(run, loops.torch_loop, trainer=TorchTrainer)
    ends = {note["sum"] for note in run.noted(2)}
    assert ends == {float(found["model/weight"].astype(np.float64).sum())}, (
        "the ranks differ, or the last was not saved"
    )
