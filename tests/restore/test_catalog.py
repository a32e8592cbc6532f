"""load, checkpoints, verify: which checkpoint they take, and what they say about it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt import catalog
from ray_ckpt.bundle import encode_piece, encode_run, merge_index
from ray_ckpt.catalog import CheckpointInfo, checkpoints, load, verify
from ray_ckpt.errors import CheckpointError, DamagedError, NoCheckpointError, StorageError, UsageError
from ray_ckpt.log import list_pins
from ray_ckpt.log.records import record_path
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import METADATA_KEY
from tests.restore.make import commit, flip, grid, make_checkpoint, record, same_bits

ROOT = Path(__file__).parents[2]


def arrays(step: int) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "w": np.full((4, 6), step, np.float32),
        "text": np.array([b"a", str(step).encode()], object),
        "scalar": np.array(step),
    }


@pytest.fixture
def three(store: Store) -> Store:
    """Committed checkpoints of steps 300, 400 and 500."""
    for step in (300, 400, 500):
        commit(store, step, arrays(step), cuts={"w": grid((4, 6), (2, 1))})
    return store


def damage(store: Store, step: int) -> str:
    path = f"model.ckpt-{step}.data-00000-of-00004"
    flip(store, path, 0)
    return path


def test_the_newest_is_loaded_whole(three: Store) -> None:
    found = load(three.url)
    assert sorted(found) == ["scalar", "text", "w"]
    assert all(same_bits(found[name], array) for name, array in arrays(500).items())


def test_a_step_and_names_can_be_chosen(three: Store) -> None:
    found = load(three.url, 300, names=["w"])
    assert list(found) == ["w"]
    assert same_bits(found["w"], arrays(300)["w"])
    with pytest.raises(UsageError, match=r"no tensor 'ww'.*did you mean 'w'"):
        load(three.url, names=["ww"])


def test_a_step_that_is_not_there_is_answered_with_those_that_are(three: Store) -> None:
    with pytest.raises(NoCheckpointError, match=rf"step 700 is not in {three.url}, which has 300, 400, 500"):
        load(three.url, 700)
    with pytest.raises(NoCheckpointError, match="step 700"):
        verify(three.url, 700)


def test_an_empty_directory_is_named(store: Store) -> None:
    for use in (load, verify):
        with pytest.raises(NoCheckpointError, match=f"no checkpoint in {store.url}: the directory is empty"):
            use(store.url)
    assert checkpoints(store.url) == []
    store.put("notes.txt", b"x")
    with pytest.raises(NoCheckpointError, match="neither a commit log nor TensorFlow's `checkpoint` is among"):
        load(store.url)
    record(store, [])
    with pytest.raises(NoCheckpointError, match="lists none that is committed"):
        load(store.url)


def test_checkpoints_are_listed_newest_last(three: Store) -> None:
    found = checkpoints(three.url)
    assert [info.step for info in found] == [300, 400, 500]
    assert found[-1] == CheckpointInfo(
        step=500,
        prefix="model.ckpt-500",
        time=1_700_000_500.0,
        bytes=found[-1].bytes,
        num_shards=4,
        world_size=4,
        generation=1,
        attempt="e1-500",
        superseded=False,
        foreign=False,
    )
    assert found[-1].bytes > 0


def test_the_next_older_one_stands_in_for_a_damaged_one_loudly(three: Store, caplog: pytest.LogCaptureFixture) -> None:
    path = damage(three, 500)
    damage(three, 400)
    assert same_bits(load(three.url)["w"], arrays(300)["w"])
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert all(text in warnings[0] for text in ("step 500", "trying step 400", path, "'w'"))
    damage(three, 300)
    with pytest.raises(DamagedError, match=r"step 300 .* no other checkpoint is left"):
        load(three.url)


def test_a_missing_file_of_a_live_checkpoint_is_damage(three: Store, caplog: pytest.LogCaptureFixture) -> None:
    three.delete("model.ckpt-500.index")
    three.delete("model.ckpt-400.data-00001-of-00004")
    assert same_bits(load(three.url)["w"], arrays(300)["w"])
    assert ["is missing" in r.getMessage() for r in caplog.records] == [True, True]


def test_a_damaged_step_that_was_asked_for_is_not_replaced(three: Store) -> None:
    path = damage(three, 500)
    with pytest.raises(DamagedError, match=f"^'{path}' in .* is damaged"):
        load(three.url, 500)


def test_a_newer_format_is_not_passed_over(three: Store) -> None:
    text = np.array(b'{"format_version": 99}', object)
    make_checkpoint(three, "model.ckpt-500", {METADATA_KEY: text})
    with pytest.raises(CheckpointError, match="upgrade"):
        load(three.url)


def test_superseded_ones_are_taken_only_by_name(store: Store) -> None:
    made = [commit(store, step, arrays(step)) for step in (300, 400)]
    record(store, [made[0], replace(made[1], superseded=True)])
    assert load(store.url)["scalar"] == 300
    assert load(store.url, 400)["scalar"] == 400
    record(store, [replace(checkpoint, superseded=True) for checkpoint in made])
    with pytest.raises(NoCheckpointError, match="superseded"):
        load(store.url)


def test_the_last_commit_is_the_newest_whatever_its_step(store: Store) -> None:
    later, earlier = commit(store, 400, arrays(400)), commit(store, 300, arrays(300))
    record(store, [later, earlier])
    assert load(store.url)["scalar"] == 300


def test_of_two_commits_of_one_step_the_later_counts(store: Store) -> None:
    first = commit(store, 400, arrays(1))
    make_checkpoint(store, "e1-9/model.ckpt-400", arrays(2))
    record(store, [first, replace(first, prefix="e1-9/model.ckpt-400")])
    assert load(store.url, 400)["scalar"] == 2


def test_what_is_deleted_during_verify_is_left_out(three: Store) -> None:
    def delete(info: CheckpointInfo, done: int, total: int) -> None:
        if info.step == 300 and done == total:
            record(three, [c for c in catalog.select(three, None) if c.step != 400])
            three.delete("model.ckpt-400.index")

    assert [report.step for report in verify(three.url, progress=delete)] == [300, 500]


def test_an_index_that_points_beyond_its_files_takes_no_memory(store: Store) -> None:
    made = commit(store, 500, arrays(500))
    entry = encode_piece("uint8", (1 << 55,), 0, 0, 1 << 55, 0)
    store.put("model.ckpt-500.index", merge_index([encode_run([(b"w", entry)])], made.num_shards))
    with pytest.raises(DamagedError, match="is truncated: tensor 'w' ends at byte"):
        load(store.url)


def test_what_is_deleted_meanwhile_is_not_called_damaged(three: Store, caplog: pytest.LogCaptureFixture) -> None:
    def use(stored: StoredCheckpoint) -> int:
        step = int(stored.prefix.removeprefix("model.ckpt-"))
        if step == 500:
            live = [c for c in catalog.select(three, None) if c.step != 500]
            record(three, [*live, commit(three, 600, arrays(600))])
            three.size("model.ckpt-500.gone")
        return step

    assert catalog.with_checkpoint(three, None, use) == 600
    assert caplog.records == []


def test_a_checkpoint_is_pinned_while_it_is_read(three: Store) -> None:
    seen = []
    catalog.with_checkpoint(three, 400, lambda stored: seen.append(list_pins(three, 0.0)))
    assert seen == [{"model.ckpt-400"}]
    assert list_pins(three, 0.0) == set()


def test_reading_needs_no_right_to_write(
    three: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("not permitted")

    monkeypatch.setattr(type(three), "put", refuse)
    assert load(three.url)["scalar"] == 500
    assert ["without a pin" in r.getMessage() for r in caplog.records] == [True]


def test_verify_reports_each_checkpoint(three: Store) -> None:
    path = damage(three, 400)
    told: list[tuple[int, int, int]] = []
    reports = verify(three.url, progress=lambda info, done, total: told.append((info.step, done, total)))
    assert [(report.step, report.ok) for report in reports] == [(300, True), (400, False), (500, True)]
    assert [(found.path, found.tensor) for found in reports[1].damage] == [(path, "w")]
    assert {report.tensors for report in reports} == {3}
    assert reports[0].bytes == sum(a.nbytes for n, a in arrays(300).items() if n != "text") + 2 + 4 + 4
    assert {step for step, done, total in told if done == total} == {300, 400, 500}
    assert [report.step for report in verify(three.url, 300)] == [300]


def test_any_url_opens_for_reading(tmp_path: Path) -> None:
    commit(open_store(tmp_path), 500, arrays(500))
    for url in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        assert load(url)["scalar"] == 500
    with pytest.raises(UsageError, match="unknown scheme"):
        load("nonsense://x")


def test_an_array_too_large_for_memory_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, 500, arrays(500))

    def refuse(*_: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(catalog.np, "empty", refuse)
    with pytest.raises(UsageError, match="no memory for tensor 'w', float32"):
        load(store.url, names=["w"])


def test_neither_ray_nor_a_framework_is_imported(tmp_path: Path) -> None:
    commit(open_store(tmp_path), 500, arrays(500))
    code = (
        "import sys; from ray_ckpt.catalog import load, verify, checkpoints\n"
        f"url = {str(tmp_path)!r}; load(url); verify(url); checkpoints(url)\n"
        "sys.exit(' '.join({'ray', 'tensorflow', 'jax', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_two_stores_of_one_name_are_not_mixed(store: Store) -> None:
    other = open_store(f"memory://{uuid.uuid4().hex}")
    commit(store, 1, arrays(1))
    commit(other, 2, arrays(2))
    assert [info.step for url in (store.url, other.url) for info in checkpoints(url)] == [1, 2]


@pytest.mark.parametrize("changes", [{"step": 600}, {"prefix": "model.ckpt-400"}])
def test_a_log_entry_that_disagrees_with_its_checkpoint_is_damage(
    three: Store, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    *older, newest = catalog.select(three, None)
    lying = replace(newest, **changes)
    record(three, [*older, lying])
    text = rf"lists step {lying.step} at '{lying.prefix}', but .* says that it is step "
    assert [report.ok for report in verify(three.url)] == [True, True, False]
    [found] = verify(three.url, lying.step)[0].damage
    assert re.search(text, found.text)
    with pytest.raises(DamagedError, match=text):
        load(three.url, lying.step)
    assert same_bits(load(three.url)["scalar"], np.array(400))
    assert "trying step 400 instead" in caplog.text


def test_below_a_damaged_newest_record_all_can_be_read(three: Store, caplog: pytest.LogCaptureFixture) -> None:
    three.put(record_path(4), b"{}")
    assert [info.step for info in checkpoints(three.url)] == [300, 400, 500]
    assert same_bits(load(three.url)["scalar"], np.array(500))
    assert all(report.ok for report in verify(three.url))
    assert "reading record 3 instead" in caplog.text
