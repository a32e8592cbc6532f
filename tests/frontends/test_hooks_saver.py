"""The Saver of a hook: by whose settings checkpoints are kept, and whose own list and graph follow each commit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tensorflow as tf

from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook
from ray_ckpt.frontends.tensorflow import side_files
from tests.frontends.sessions import Event, Listener, Silent, driven, model, present

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")


def test_the_savers_settings_say_what_is_kept(fake_job: Any, folder: str) -> None:
    model()
    saver = tf1.train.Saver(max_to_keep=3, keep_checkpoint_every_n_hours=2)
    made = saver._next_checkpoint_time - 7200
    hook = CheckpointSaverHook(
        folder, save_steps=1, saver=saver, checkpoint_basename="deep/mine", delete_grace_s=1.0, writers_per_host=1
    )
    hook.begin()
    for told_of in (False, True):
        if told_of:
            saver.set_last_checkpoints_with_time([(os.path.join(folder, "deep", "mine-0"), 1.0)])
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
        "keep_hours_from": made,
        "keep_before": 0,
        "fresh": True,
        "on_error": "warn",
        "delete_grace_s": 1.0,
        "writers_per_host": 1,
    }
    assert first.settings == expected
    assert second.settings == {**expected, "keep_before": None}


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
    # As `Saver.save` does: it is counted on from each one that is kept for its age.
    assert saver._next_checkpoint_time == pytest.approx(since + 3 * 3.6e-6, abs=1e-6)


@pytest.mark.parametrize("listens", [True, False])
def test_a_listener_finds_the_newest_checkpoint(
    fake_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    noted: list[Event] = []
    monkeypatch.setattr(side_files, "repair_state_file", lambda store: noted.append(("named",)))
    listeners = [Listener("A", noted)] if listens else [Silent()]
    with driven(CheckpointSaverHook(folder, save_steps=2, listeners=listeners, blocking=True)) as driver:
        driver.run(2)
        named = [("A", "before", 0), ("named",), ("A", "after", 0), ("A", "before", 2), ("named",), ("A", "after", 2)]
        assert [event for event in noted if event[-1] != "begin"] == named * listens
    # After the end anybody may look.
    assert noted[-1] == ("named",)
