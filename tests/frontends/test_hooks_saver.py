"""The Saver of a hook: by whose settings checkpoints are kept, and whose own list and graph follow each commit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook
from ray_ckpt.frontends.tensorflow import side_files
from ray_ckpt.log import append
from ray_ckpt.storage import open_store
from tests.frontends.sessions import Event, Listener, Silent, driven, logged, model, present
from tests.log.records import checkpoint, record

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")


def test_the_savers_settings_say_what_is_kept(fake_job: Any, folder: str) -> None:
    model()
    saver = tf1.train.Saver(max_to_keep=3, keep_checkpoint_every_n_hours=2)
    made = saver._next_checkpoint_time - 7200
    append(open_store(os.path.join(folder, "deep")), record(1, checkpoint(0)))
    hook = CheckpointSaverHook(
        folder, save_steps=1, saver=saver, checkpoint_basename="deep/mine", delete_grace_s=1.0, writers_per_host=1
    )
    hook.begin()
    for told_of in (False, True):
        if told_of:
            saver.set_last_checkpoints_with_time([(os.path.join(folder, "deep", "model.ckpt-0"), 1.0)])
            hook._kept = None
        with tf1.Session() as raw:
            raw.run(tf1.global_variables_initializer())
            hook.after_create_session(raw, None)
            hook.end(raw)
    first, second = fake_job.jobs
    assert first.url == os.path.join(folder, "deep")
    expected = {
        "basename": "mine",
        "max_to_keep": 3,
        "keep_every_hours": 2.0,
        "keep_hours_grid": made,
        "keep_before": 0,
        "fresh": True,
        "on_error": "warn",
        "delete_grace_s": 1.0,
        "writers_per_host": 1,
    }
    assert first.settings == expected
    assert second.settings == {**expected, "keep_before": 1}


def known_of(folder: str) -> None:
    """A log with two checkpoints of each of three generations, and one that plain TensorFlow wrote."""
    made = [replace(checkpoint(step), generation=(step + 1) // 2, superseded=step < 3) for step in range(1, 7)]
    append(open_store(folder), record(1, replace(checkpoint(0), foreign=True, generation=0), *made))


@pytest.mark.parametrize(
    ("told", "keep_before", "form"),
    [
        ([], 0, "{}"),
        ([3, 4, 5, 6], 2, "{}"),
        ([6, 4], 2, "{}/."),
        ([5], 3, "{}/../run"),
        ([5, 6], 3, "file://{}"),
        ([3], 2, "relative"),
        # Of a name that is taken up again, or of another directory.
        ([99], 0, "{}"),
        ([3], 0, "{}/below"),
        # TensorFlow's own are never deleted.
        ([0, 5], 3, "{}"),
        ([0], 0, "{}"),
    ],
)
def test_what_the_saver_was_not_told_of_is_not_its_to_delete(
    fake_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch, told: list[int], keep_before: int, form: str
) -> None:
    """A start by mistake, without checkpoint_dir, supersedes what is there; the next must not delete that."""
    known_of(folder)
    monkeypatch.chdir(os.path.dirname(folder))
    made = model()
    saver = tf1.train.Saver()
    at = os.path.basename(folder) if form == "relative" else form.format(folder)
    saver.set_last_checkpoints_with_time([(f"{at}/model.ckpt-{step}", 1.0) for step in told])
    with driven(CheckpointSaverHook(folder, save_steps=1, saver=saver), made=made):
        pass
    assert fake_job.jobs[0].settings["keep_before"] == keep_before


def test_another_hook_over_the_same_saver_knows_what_the_first_saved(fake_job: Any, folder: str) -> None:
    known_of(folder)
    made = model()
    saver = tf1.train.Saver()
    for steps in (3, 1):
        with driven(CheckpointSaverHook(folder, save_steps=1, saver=saver, blocking=True), made=made) as driver:
            driver.run(steps)
    # Those that the fake job says that it commits, 0 to 3, are of the log's first two generations.
    assert [job.settings["keep_before"] for job in fake_job.jobs] == [0, 1]


def test_one_who_saves_with_the_same_saver_is_warned_about_once(fake_job: Any, folder: str) -> None:
    """As `MonitoredTrainingSession` does by default every ten minutes."""
    made = model()
    saver = tf1.train.Saver()
    saver.set_last_checkpoints_with_time([(os.path.join(folder, "model.ckpt-77"), 1.0)])
    hook = CheckpointSaverHook(folder, save_steps=1, saver=saver, blocking=True)
    with logged() as lines, driven(hook, made=made) as driver:
        driver.run(2)
        assert not [line for line in lines if "Somebody else saves" in line]
        for _ in range(2):
            # The path is ours: they write over our files.
            saver.save(driver.raw, os.path.join(folder, "model.ckpt"), global_step=2)
            driver.run(1)
    (warning,) = [line for line in lines if "Somebody else saves" in line]
    assert f"{folder}/model.ckpt-2 for one" in warning
    assert "save_checkpoint_secs=None" in warning


def test_collections_that_grow_are_exported_again(fake_job: Any, folder: str) -> None:
    with driven(CheckpointSaverHook(folder, save_steps=1, blocking=True)) as driver:
        driver.run(1)
        tf1.add_to_collection("late", 7)
        driver.run(1)
        tf1.add_to_collection("late", 7)
        driver.run(1)
    found = []
    for step in range(4):
        raw = Path(folder, f"model.ckpt-{step}.meta").read_bytes()
        found.append(len(tf1.MetaGraphDef.FromString(raw).collection_def["late"].int64_list.value))
    assert found == [0, 0, 1, 2]


@pytest.mark.parametrize("deleted", [True, False])
def test_no_graph_is_left_of_a_checkpoint_that_is_deleted_already(fake_job: Any, folder: str, deleted: bool) -> None:
    """With two saves under way, the first may be deleted before anybody tells of it."""
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=1)
    with driven(hook) as driver:
        fake_job.jobs[0].decide(0)
        driver.run(1)
        driver.run(1)
        live = [checkpoint(step) for step in ((0, 2) if deleted else (0, 1, 2))]
        append(open_store(folder), record(1, *live))
        fake_job.jobs[0].decide(1)
        fake_job.jobs[0].decide(2)
    assert present(folder, ".meta") == [0, *([] if deleted else [1]), 2]


def test_by_default_all_but_five_go(fake_job: Any, folder: str) -> None:
    with driven(CheckpointSaverHook(folder, save_steps=1)):
        pass
    settings = fake_job.jobs[0].settings
    assert (settings["max_to_keep"], settings["keep_every_hours"]) == (5, None)


def test_the_savers_list_names_what_is_committed(fake_job: Any, folder: str) -> None:
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=1)
    with driven(hook) as driver:
        saver = tf1.get_collection(tf1.GraphKeys.SAVERS)[0]
        driver.run(1)
        assert saver.last_checkpoints == []
        fake_job.jobs[0].decide(0)
        driver.run(1)
        assert saver.last_checkpoints == [os.path.join(folder, "model.ckpt-0")]


def test_the_graph_is_exported_once(fake_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[int] = []
    export = tf1.train.Saver.export_meta_graph

    def counted(saver: Any) -> Any:
        exported.append(tf1.get_default_graph().version)
        return export(saver)

    monkeypatch.setattr(tf1.train.Saver, "export_meta_graph", counted)
    with driven(CheckpointSaverHook(folder, save_steps=1, blocking=True)) as driver:
        driver.run(2)
        assert len(exported) == 1
        tf.constant(1.0)
        driver.run(2)
        assert len(exported) == 2
    assert present(folder, ".meta") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("most", [None, 0])
def test_a_saver_may_keep_all(fake_job: Any, folder: str, most: int | None) -> None:
    made = model()
    saver = tf1.train.Saver(max_to_keep=most)
    hook = CheckpointSaverHook(folder, save_steps=1, saver=saver, blocking=True)
    with driven(hook, made=made) as driver:
        driver.run(2)
    assert fake_job.jobs[0].settings["max_to_keep"] is None
    assert saver.last_checkpoints == []


def test_what_falls_out_of_the_savers_list_is_not_its_to_delete(fake_job: Any, folder: str) -> None:
    made = model()
    saver = tf1.train.Saver(max_to_keep=1, keep_checkpoint_every_n_hours=1e-9)
    since = saver._next_checkpoint_time
    with driven(CheckpointSaverHook(folder, save_steps=1, saver=saver, blocking=True), made=made) as driver:
        driver.run(3)
    assert [os.path.basename(path) for path in saver.last_checkpoints] == ["model.ckpt-3"]
    assert saver._checkpoints_to_be_deleted == []
    # The grid's origin, for the next hook over this Saver: how far it has come, the marks in the log say.
    assert saver._next_checkpoint_time == since


TOLD = [("A", "before", 0), ("named",), ("A", "after", 0), ("A", "before", 2), ("named",), ("A", "after", 2)]


@pytest.mark.parametrize(
    ("listens", "blocking", "named"), [(True, None, TOLD), (False, True, [("named",)] * 2), (False, None, [])]
)
def test_who_waits_for_the_commit_finds_the_newest_checkpoint(
    fake_job: Any,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    listens: bool,
    blocking: bool | None,
    named: list[Event],
) -> None:
    noted: list[Event] = []
    monkeypatch.setattr(side_files, "repair_state_file", lambda store: noted.append(("named",)))
    listeners = [Listener("A", noted)] if listens else [Silent()]
    with driven(CheckpointSaverHook(folder, save_steps=2, listeners=listeners, blocking=blocking)) as driver:
        driver.run(2)
        assert [event for event in noted if event[-1] != "begin"] == named
    # After the end anybody may look.
    assert noted[-1] == ("named",)
