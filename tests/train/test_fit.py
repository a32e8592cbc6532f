"""A run of Ray Train from `fit` to `Result.checkpoint` and the next `fit`."""

from __future__ import annotations

import numpy as np
import pytest
import ray.train
from ray.train import FailureConfig

import ray_ckpt
from ray_ckpt.errors import NoCheckpointError
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


@pytest.mark.slow
def test_a_crash_resumes_from_our_newest_commit_not_from_rays_older_report(run: Run) -> None:
    result = run.fit(
        loops.train,
        failures=FailureConfig(max_failures=1),
        steps=8,
        settings={"save_steps": 2},
        report_at=[2, 8],
        wait_at=[2, 6],
        die_at={1: 6},
    )

    again = run.noted(2)
    assert [(note["restored"], note["good"]) for note in again] == [(6, True), (6, True)]
    # The report of step 2 had returned; whether Ray has registered it when the worker dies is a race of Ray's own.
    assert again[0]["registered"] in (2, None), "what Ray knew was not older: this test shows nothing"
    assert ray_ckpt.from_train(result.checkpoint).step == 8


@pytest.mark.slow
def test_a_restored_checkpoint_that_ray_never_heard_of_is_attached_by_the_next_report(run: Run) -> None:
    kind = {"failures": FailureConfig(max_failures=1), "settings": {"save_steps": 2}}
    result = run.fit(loops.train, steps=6, report_at=[2, 5, 6], wait_at=[2, 4], die_at={0: 4}, **kind)

    # The directory of step 4 that the second start attached is named after the start that committed it, and after it.
    assert [name.split("_")[1:4] for name in run.pointers()] == [
        ["000000000002", "1", "1"],
        ["000000000004", "1", "2"],
        ["000000000006", "2", "2"],
    ]
    assert ray_ckpt.from_train(result.checkpoint).step == 6


@pytest.mark.slow
def test_fits_of_the_same_name_go_on_with_fewer_and_more_workers(run: Run) -> None:
    for start, (workers, steps) in enumerate([(2, 3), (3, 5), (1, 6), (2, 7)], start=1):
        result = run.fit(loops.train, workers, steps=steps, settings={"save_steps": 10}, report_at=[steps])
        notes = run.noted(start)
        before = [None, 3, 5, 6][start - 1]
        assert [(n["restored"], n["registered"], n["world"], n["good"]) for n in notes] == [
            (before, before, workers, True if before else None)
        ] * workers
        assert ray_ckpt.from_train(result.checkpoint).step == steps
    # Each start's report comes before its only commit: what it restored is attached already, and not attached again.
    assert [name.split("_")[1:4] for name in run.pointers()] == [
        [f"{step:012d}", str(start), str(start)] for start, step in enumerate([3, 5, 6, 7], start=1)
    ]


@pytest.mark.slow
def test_what_ray_prunes_is_not_ours_and_what_we_delete_is_not_rays(run: Run) -> None:
    every = {"steps": 4, "report_at": range(1, 5), "wait_at": range(1, 5)}
    few = run.fit(loops.train, num_to_keep=1, settings={"save_steps": 1, "max_to_keep": 2}, **every)
    assert len(run.pointers()) == 1
    assert [info.step for info in ray_ckpt.checkpoints(run.data)] == [3, 4]
    assert ray_ckpt.from_train(few.checkpoint).load()["step"] == 4

    more = {**every, "steps": 8, "report_at": range(5, 9), "wait_at": range(5, 9)}
    many = run.fit(loops.train, settings={"save_steps": 1, "max_to_keep": 1}, **more)
    assert len(run.pointers()) == 5, "Ray keeps all of its own"
    assert [info.step for info in ray_ckpt.checkpoints(run.data)] == [8]
    pointers = [ray_ckpt.from_train(checkpoint) for checkpoint, _ in many.best_checkpoints]
    assert sorted(pointer.step for pointer in pointers) == [4, 5, 6, 7, 8]
    with pytest.raises(NoCheckpointError, match=r"model\.ckpt-5 in .* was deleted by retention.*there are steps 8"):
        next(pointer for pointer in pointers if pointer.step == 5).load()

    last = run.fit(loops.train, steps=9, settings={"save_steps": 1, "max_to_keep": 1}, report_at=[9])
    assert [ray_ckpt.from_train(last.checkpoint).step, run.noted(3)[0]["restored"]] == [9, 8]


@pytest.mark.slow
def test_no_report_waits_for_a_save_and_all_stay_paired(run: Run) -> None:
    result = run.fit(loops.without_coordinator)

    assert [note["decided"] for note in run.noted(1)] == [False, False], "the save ended early: this test shows nothing"
    assert run.noted(1)[0]["seen"] == [1, 1, 1], "rank 0 has attached step 1 and saw no other commit"
    assert ray_ckpt.from_train(result.checkpoint).step == 2


@pytest.mark.slow
def test_a_start_that_ray_counts_as_preempted_is_not_taken_from_max_failures(run: Run) -> None:
    result = run.fit(
        loops.preempted,
        failures=FailureConfig(max_failures=0, max_preemption_failures=1),
        steps=6,
        settings={"save_steps": 10},
        stop_at=3,
    )

    assert [note["restored"] for note in run.noted(2)] == [3, 3]
    assert ray_ckpt.from_train(result.checkpoint).step == 6


@pytest.mark.slow
def test_after_an_error_of_the_loop_nothing_is_reported_and_the_error_is_the_users(run: Run) -> None:
    with pytest.raises(ray.train.TrainingFailedError, match="the user's own") as failed:
        run.fit(loops.failing, steps=4, settings={"save_steps": 2}, report_at=[1, 2], wait_at=[2])
    assert [name.split("_")[1] for name in run.pointers()] == ["000000000002"]
    assert "PreemptedError" not in str(failed.value)
