"""The `checkpoint` file: derived from the log whatever happens, adopted where there is no log."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import pytest

from ray_ckpt.bundle.state_file import encode_state_file, parse_state_file
from ray_ckpt.errors import CheckpointError, DamagedError, UnavailableError
from ray_ckpt.log import append, live_checkpoints, read_head, repair_state_file
from ray_ckpt.log.state import STATE_FILE
from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.faulty_store import ALWAYS, Crash, Fault, FaultyStore
from ray_ckpt.testing.racing import race_processes
from ray_ckpt.types import Dying
from tests.log.records import append_some, checkpoint, fill, record


def newest(store: Store) -> str | None:
    return parse_state_file(store.read(STATE_FILE)).newest


def test_the_file_follows_the_log(store: Store) -> None:
    assert not repair_state_file(store)
    append(store, record(1, checkpoint(1), checkpoint(2)))
    assert repair_state_file(store)
    state = parse_state_file(store.read(STATE_FILE))
    assert (state.newest, state.all_paths) == ("model.ckpt-2", ("model.ckpt-1", "model.ckpt-2"))
    assert state.timestamps == (1001.0, 1002.0)
    assert not repair_state_file(store)
    append(store, record(2, checkpoint(2), checkpoint(3)))
    assert repair_state_file(store)
    assert newest(store) == "model.ckpt-3"


def test_the_newest_is_the_last_commit_that_is_not_superseded(store: Store) -> None:
    live = (checkpoint(5), checkpoint(7, superseded=True), checkpoint(6), checkpoint(9, superseded=True))
    append(store, record(1, *live))
    repair_state_file(store)
    assert parse_state_file(store.read(STATE_FILE)).all_paths == ("model.ckpt-5", "model.ckpt-6")
    assert newest(store) == "model.ckpt-6"


def test_preserved_ones_are_not_named_but_for_the_only_one_to_restore(store: Store) -> None:
    kept = dataclasses.replace(checkpoint(1), preserved=True)
    append(store, record(1, kept, checkpoint(2), checkpoint(3)))
    repair_state_file(store)
    assert parse_state_file(store.read(STATE_FILE)).all_paths == ("model.ckpt-2", "model.ckpt-3")
    assert [c.step for c in live_checkpoints(store)] == [1, 2, 3]
    append(store, record(2, kept, checkpoint(2, superseded=True), checkpoint(3, superseded=True)))
    repair_state_file(store)
    assert parse_state_file(store.read(STATE_FILE)).all_paths == ("model.ckpt-1",)
    assert newest(store) == "model.ckpt-1"


def test_nothing_current_is_said_to_be_nothing(store: Store) -> None:
    """As a restore finds nothing: a superseded checkpoint is never the default, though it is still there."""
    fill(store, 1, 1)
    repair_state_file(store)
    append(store, record(2, checkpoint(1, superseded=True)))
    assert repair_state_file(store)
    assert newest(store) is None
    assert [c.prefix for c in live_checkpoints(store)] == ["model.ckpt-1"]
    assert not repair_state_file(store)
    append(store, record(3, checkpoint(1, superseded=True), checkpoint(2)))
    assert repair_state_file(store)
    assert newest(store) == "model.ckpt-2"


def test_a_log_without_commits_leaves_the_file_alone(store: Store) -> None:
    store.put(STATE_FILE, b'model_checkpoint_path: "theirs"')
    append(store, record(1))
    assert not repair_state_file(store)
    assert newest(store) == "theirs"
    append(store, dataclasses.replace(record(2), dying=(Dying(checkpoint(1), 1.0),)))
    assert repair_state_file(store)
    assert newest(store) is None


@pytest.mark.parametrize("junk", [b"", b"junk {", b"\xff", b'model_checkpoint_path: "../../etc/x"'])
def test_junk_is_replaced(store: Store, junk: bytes) -> None:
    fill(store, 1, 1)
    store.put(STATE_FILE, junk)
    assert repair_state_file(store)
    assert newest(store) == "model.ckpt-1"


def test_a_file_that_is_right_again_is_not_taken_for_the_one_seen_before(store: Store) -> None:
    """A coordinator that read file and log long ago must not write what it made of them now."""
    fill(store, 1, 1)
    repair_state_file(store)
    seen = store.read_versioned(STATE_FILE)
    assert seen is not None
    append(store, record(2, checkpoint(1), checkpoint(2)))
    repair_state_file(store)
    append(store, record(3, checkpoint(1)))
    repair_state_file(store)
    assert newest(store) == "model.ckpt-1"
    assert not store.replace_if(STATE_FILE, b'model_checkpoint_path: "model.ckpt-2"', seen[1])


def test_a_commit_during_the_repair_is_not_lost(store: Store) -> None:
    fill(store, 1, 1)

    def commit() -> None:
        fill(store, 2, 2)

    faulty = FaultyStore(store, [Fault("put_if_absent", "call", path=STATE_FILE, hook=commit)])
    assert repair_state_file(faulty)
    assert newest(store) == "model.ckpt-2"


def test_a_slow_repair_never_goes_back(store: Store) -> None:
    """One that derived from an old log loses to the file that a newer log has produced meanwhile."""
    fill(store, 1, 1)
    repair_state_file(store)
    fill(store, 2, 2)

    def others() -> None:
        fill(store, 3, 3)
        repair_state_file(store)

    seen: list[str | None] = []
    plan = [
        Fault("replace_if", "call", hook=others),
        Fault("read_versioned", "call", times=ALWAYS, hook=lambda: seen.append(newest(store))),
    ]
    repair_state_file(FaultyStore(store, plan))
    assert seen == ["model.ckpt-1", "model.ckpt-3"]
    assert newest(store) == "model.ckpt-3"


@pytest.mark.parametrize("operation", ["read_versioned", "list", "read", "replace_if"])
def test_not_even_for_a_moment(store: Store, operation: str) -> None:
    """Wherever the log moves on under a repair, what the repair then writes is not older than the file."""
    fill(store, 1, 1)
    repair_state_file(store)
    fill(store, 2, 2)

    def others() -> None:
        fill(store, 3, 3)
        repair_state_file(store)

    plan = [Fault(operation, "call", hook=others), Fault("replace_if", "crash_after", times=ALWAYS)]
    with suppress(Crash):
        repair_state_file(FaultyStore(store, plan))
    assert newest(store) == "model.ckpt-3"


@pytest.mark.parametrize("kind", ["crash_before", "crash_after"])
def test_a_crash_between_commit_and_file_is_repaired_by_the_next(store: Store, kind: str) -> None:
    fill(store, 1, 1)
    repair_state_file(store)
    fill(store, 2, 2)
    with pytest.raises(Crash):
        repair_state_file(FaultyStore(store, [Fault("replace_if", kind)]))  # type: ignore[arg-type]
    assert repair_state_file(store) == (kind == "crash_before")
    assert newest(store) == "model.ckpt-2"


def test_a_file_that_never_settles_is_an_error(store: Store) -> None:
    fill(store, 1, 1)

    def meddle() -> None:
        store.put(STATE_FILE, b'model_checkpoint_path: "theirs"')

    meddle()
    with pytest.raises(UnavailableError, match="CheckpointManager"):
        repair_state_file(FaultyStore(store, [Fault("replace_if", "call", times=ALWAYS, hook=meddle)]))


def test_many_processes_agree_on_the_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    race_processes(store, append_some, racers=4)
    head = read_head(store)
    assert head is not None
    assert newest(store) == head.live[-1].prefix


def tensorflow_directory(store: Store, *steps: int, shards: int = 2) -> None:
    """What plain TensorFlow leaves behind, made by hand."""
    for step in steps:
        store.put(f"model.ckpt-{step}.index", b"i" * 7)
        for shard in range(shards):
            store.put(f"model.ckpt-{step}.data-{shard:05d}-of-{shards:05d}", b"d" * 10)
    paths = [f"model.ckpt-{step}" for step in steps]
    store.put(STATE_FILE, encode_state_file(paths[-1], paths, [float(step) for step in steps]))


def test_a_tensorflow_directory_is_adopted(store: Store) -> None:
    tensorflow_directory(store, 9, 40, 30)
    store.put("model.ckpt-300.index", b"not named in the file")
    found = live_checkpoints(store)
    assert [(c.step, c.prefix, c.time) for c in found] == [
        (9, "model.ckpt-9", 9.0),
        (40, "model.ckpt-40", 40.0),
        (30, "model.ckpt-30", 30.0),
    ]
    assert all(c.foreign and not c.superseded for c in found)
    assert {(c.nbytes, c.num_shards, c.world_size, c.attempt) for c in found} == {(27, 2, 0, "")}
    assert not repair_state_file(store), "without a log, the file is TensorFlow's"


def test_the_log_wins_over_the_file(store: Store) -> None:
    tensorflow_directory(store, 9)
    fill(store, 1, 1)
    assert live_checkpoints(store) == [checkpoint(1)]


def test_files_that_are_gone_are_left_out(store: Store) -> None:
    tensorflow_directory(store, 1, 2, 3)
    store.delete("model.ckpt-1.index")
    store.delete("model.ckpt-3.index")
    assert [c.step for c in live_checkpoints(store)] == [2]


def test_a_file_that_names_only_the_newest(store: Store) -> None:
    store.put("sub/model.index", b"x")
    store.put(STATE_FILE, b'model_checkpoint_path: "sub/model"')
    [found] = live_checkpoints(store)
    assert (found.step, found.prefix, found.nbytes, found.num_shards) == (0, "sub/model", 1, 0)
    assert found.time == store.list("sub")[0].modified


def test_full_paths_of_the_directory_itself_are_fine(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    tensorflow_directory(store, 5)
    for start in (f"{tmp_path}/", f"file://{tmp_path}/"):
        full = f"{start}model.ckpt-5"
        store.put(STATE_FILE, encode_state_file(full, [full], [77.0]))
        assert [(c.prefix, c.time) for c in live_checkpoints(store)] == [("model.ckpt-5", 77.0)]


@pytest.mark.parametrize("path", ["../x-5", "/elsewhere/x-5", "gs://other/x-5", "a/../../x-5"])
def test_paths_out_of_the_directory_are_refused(store: Store, path: str) -> None:
    tensorflow_directory(store, 5)
    store.put(STATE_FILE, encode_state_file(path, [path], [1.0]))
    with pytest.raises(CheckpointError, match="outside of this directory"):
        live_checkpoints(store)
    store.put(STATE_FILE, encode_state_file("model.ckpt-5", [path, "model.ckpt-5"], [1.0, 2.0]))
    assert [(c.prefix, c.time) for c in live_checkpoints(store)] == [("model.ckpt-5", 2.0)]


def test_a_junk_file_is_damage(store: Store) -> None:
    store.put(STATE_FILE, b"junk {")
    with pytest.raises(DamagedError):
        live_checkpoints(store)


def test_a_file_that_says_there_is_none(store: Store) -> None:
    store.put(STATE_FILE, encode_state_file(None, [], []))
    assert live_checkpoints(store) == []


def test_what_tensorflow_wrote_is_adopted_and_what_is_written_is_read_by_it(tmp_path: Path) -> None:
    import tensorflow as tf

    counter = tf.Variable(3.0)
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(counter=counter), str(tmp_path), max_to_keep=3)
    for step in (1, 5, 12):
        manager.save(checkpoint_number=step)
    store = open_store(tmp_path)
    found = live_checkpoints(store)
    assert [(c.step, c.num_shards) for c in found] == [(1, 1), (5, 1), (12, 1)]
    assert all(c.time > 1e9 and c.nbytes > 0 for c in found)
    # Adopted into a log in another order, the file is rewritten and TensorFlow follows it.
    append(store, record(1, found[0], found[2], found[1]))
    assert repair_state_file(store)
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "ckpt-5")
