"""A run of Ray Train from `fit` to `Result.checkpoint` and the next `fit`."""

from __future__ import annotations

import numpy as np
import pytest

import ray_ckpt
from tests.system.states import whole
from tests.train import loops
from tests.train.fits import Run

pytestmark = pytest.mark.xdist_group("ray")


def test_a_fit_without_a_url_saves_beside_rays_files_and_its_result_leads_there(run: Run) -> None:
    result = run.fit(loops.train, steps=5, settings={"save_steps": 2}, report_at=[3], wait_at=[2])

    pointer = ray_ckpt.from_train(result.checkpoint)
    assert (pointer.url, pointer.step, pointer.generation) == (f"file://{run.data}", 5, 1)
    assert pointer.path == str(run.data / "model.ckpt-5")
    loaded = pointer.load()
    for name, array in whole(5).items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    assert result.metrics["step"] == 3, "the last metrics are reported again by close()"
    assert [info.step for info in ray_ckpt.checkpoints(run.data)] == [2, 4, 5]
    assert [(note["restored"], note["registered"], note["world"]) for note in run.noted(1)] == [(None, None, 2)] * 2
