"""The demo's own checks: each holds on a good outcome and fails on the fault that it is there for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from examples.demo import checks
from tests.demo import stories


def test_a_good_outcome_passes() -> None:
    good = stories.outcome()
    found = [
        checks.save_survived(stories.saves()[2], 5, good.killed_at),
        checks.same_restore(good.after, 5),
        checks.same_eval_loss(good.before, good.after),
        checks.loss_goes_on(good.before, good.after),
        checks.same_digests({"a": "1"}, {"a": "1"}),
    ]
    assert [check for check in found if not check.ok] == []


def test_the_save_was_not_committed() -> None:
    assert not checks.save_survived(None, 5, 106.2).ok


def test_the_save_was_committed_before_the_kill() -> None:
    assert not checks.save_survived(stories.saves()[2], 5, 107.0).ok


@pytest.mark.parametrize("step", [None, 3])
def test_a_host_restored_something_else(step: int | None) -> None:
    after = stories.outcome().after
    assert after[1].restored is not None
    after[1].restored = replace(after[1].restored, step=step)
    found = checks.same_restore(after, 5)
    assert not found.ok
    assert str(step) in found.detail


def test_the_restored_model_is_another() -> None:
    bad = stories.outcome()
    assert bad.after[0].restored is not None
    bad.after[0].restored = replace(bad.after[0].restored, eval_loss=9 / 6 * (1 + 2e-4))
    assert not checks.same_eval_loss(bad.before, bad.after).ok


def test_a_restored_step_that_nobody_recorded() -> None:
    bad = stories.outcome()
    for story in bad.before:
        del story.steps[-1]
    assert not checks.same_eval_loss(bad.before, bad.after).ok


def test_the_optimizer_was_lost() -> None:
    """The step that was trained twice has another loss."""
    bad = stories.outcome()
    again = stories.story(2, 0, range(5, 10), restored=4, at=120.0)
    assert checks.loss_goes_on(bad.before, [again]).ok
    again.steps[0] = replace(again.steps[0], loss=again.steps[0].loss * 1.01)
    assert not checks.loss_goes_on(bad.before, [again]).ok


def test_nothing_was_learned() -> None:
    bad = stories.outcome()
    bad.after[0].steps[-1] = replace(bad.after[0].steps[-1], loss=6.0)
    assert not checks.loss_goes_on(bad.before, bad.after).ok


@pytest.mark.parametrize("read", [{}, {"a": "2"}, {"a": "1", "b": "1"}])
def test_tensorflow_reads_something_else(read: dict[str, str]) -> None:
    assert not checks.same_digests({"a": "1"}, read).ok


def test_no_digests_at_all_are_no_proof() -> None:
    assert not checks.same_digests({}, {}).ok


def test_steps_with_snapshots_and_without_commits_were_abandoned() -> None:
    assert stories.outcome().abandoned == {9}
