"""The demo's pure parts: data, layout over hosts, journals, progress, picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from examples.demo.cluster import environment, tpu_environment
from examples.demo.display import progress_line, saves_text
from examples.demo.journal import Finished, Journal, Restored, Step, Story
from examples.demo.model import AXIS, Sizes, spec_of
from examples.demo.picture import bars, draw, runs
from examples.demo.text import Corpus, python_help
from ray_ckpt.protocol.messages import RunStatus, SaveStatus
from tests.demo import stories


def test_a_batch_is_cut_from_the_text_and_depends_on_the_step_alone() -> None:
    corpus = Corpus("hello world" * 9)
    batch = corpus.batch(5, 4, 7)
    assert batch.shape == (4, 8)
    assert batch.dtype == np.int32
    for row in batch:
        assert "".join(corpus.chars[i] for i in row) in "hello world" * 9
    np.testing.assert_array_equal(batch, Corpus("hello world" * 9).batch(5, 4, 7))
    assert not np.array_equal(batch, corpus.batch(6, 4, 7))


def test_the_help_text_fits_the_model() -> None:
    corpus = python_help()
    assert len(corpus.tokens) > 100_000
    assert len(corpus.chars) <= Sizes().vocab


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_large_parameters_are_split_evenly_and_small_ones_are_not(hosts: int) -> None:
    sizes = Sizes()
    assert spec_of((sizes.vocab**2, sizes.width), hosts) == PartitionSpec(AXIS, None)
    assert spec_of((sizes.layers, sizes.width, 3 * sizes.width), hosts) == PartitionSpec(None, None, AXIS)
    assert spec_of((sizes.width,), hosts) == PartitionSpec()
    assert sizes.sequences % hosts == 0
    assert sizes.sequences // 2 % hosts == 0


def test_what_cannot_be_split_evenly_is_replicated() -> None:
    assert spec_of((65, 65), 4) == PartitionSpec()


def test_a_journal_is_read_on_where_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "journals" / "one.jsonl"
    story = Story(path, 1, 0, 0)
    story.update()
    journal = Journal(path)
    journal.write(Restored(None, 1.0, 2.0, 3.0))
    step = Step(1, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0)
    journal.write(step)
    story.update()
    assert story.restored == Restored(None, 1.0, 2.0, 3.0)
    assert story.steps == [step]
    journal.write(replace(step, step=2, stalled_s=0.1))
    journal.write(Finished(2, 0.1, {"a": "b"}))
    story.update()
    assert [(event.step, event.saved) for event in story.steps] == [(1, False), (2, True)]
    assert story.finished == Finished(2, 0.1, {"a": "b"})


def test_a_line_cut_short_by_the_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    Journal(path).write(Finished(2, 0.1, {}))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    story = Story(path, 1, 0, 0)
    story.update()
    assert story.finished == Finished(2, 0.1, {})
    path.write_bytes(whole + whole.replace(b"0.1", b"0.7"))
    story.update()
    assert story.finished == Finished(2, 0.7, {})


def test_progress_says_what_a_save_waits_for() -> None:
    save = SaveStatus(1, 40, "writing", "e1-1", 4, 2, 4, "")
    status = RunStatus("u", "active", 1, 1, 4, (), (save,), (), 0, "", "")
    text = saves_text(status)
    assert text == "save of step 40: 4/4 snapshots, 2/4 shards, writing"
    line = progress_line(1, stories.outcome().before, status)
    assert "step    5" in line
    assert text in line
    assert saves_text(None) == saves_text(replace(status, saves=())) == "no save under way"


def test_short_spans_stay_visible() -> None:
    assert bars([(11.0, 11.5), (12.0, 14.0)], 10.0, least_s=1.0) == [(1.0, 1.0), (2.0, 2.0)]


def test_steps_without_a_gap_become_one_bar() -> None:
    assert runs([(0.0, 1.0), (1.1, 2.0), (9.0, 9.5)], 1.0) == [(0.0, 2.0), (9.0, 9.5)]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = draw(stories.outcome(), stories.saves(), tmp_path / "saves.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_can_do_without_the_killed_save(tmp_path: Path) -> None:
    path = draw(stories.outcome(), stories.saves()[:2], tmp_path / "saves.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("TPU_NAME", "mine")
    monkeypatch.delenv("TPU_WORKER_ID", raising=False)
    with environment(tpu_environment(2, 4)):
        assert os.environ["TPU_WORKER_ID"] == "2"
        assert os.environ["TPU_ACCELERATOR_TYPE"] == "v4-32"
        assert os.environ["TPU_TOPOLOGY"] == "2x2x4"
    assert os.environ["TPU_NAME"] == "mine"
    assert "TPU_WORKER_ID" not in os.environ
