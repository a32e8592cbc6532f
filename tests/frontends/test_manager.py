"""`CheckpointManager` beside TensorFlow's own: where both must do the same, each test runs with both."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import ray_ckpt
from ray_ckpt import log
from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import MismatchError, SaveError, StateError
from ray_ckpt.protocol.messages import SaveOutcome
from ray_ckpt.storage import open_store
from ray_ckpt.types import Claim
from tests.cluster import ROOT, RUNS
from tests.restore.make import flip
from tests.system.waiting import eventually

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

Make = Callable[..., Any]


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Make]:
    """Makes a manager on this test's directory; the one before it leaves."""
    made: list[Any] = []

    def make(
        checkpoint: Any, max_to_keep: int | None = 3, *arguments: Any, path: Any = tmp_path, **options: Any
    ) -> Any:
        for older in made:
            older.close()
        RUNS.add(run_id(str(path)))
        made.append(ray_ckpt.CheckpointManager(checkpoint, path, max_to_keep, *arguments, delete_grace_s=0, **options))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


@pytest.fixture(params=["tensorflow", "ray_ckpt"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes managers of either class."""
    if request.param == "ray_ckpt":
        made: Make = request.getfixturevalue("ours")
        return made
    return lambda checkpoint, max_to_keep=3, *more, **options: tf.train.CheckpointManager(
        checkpoint, tmp_path, max_to_keep, *more, **options
    )


def counting(value: float = 0.0) -> Any:
    return tf.train.Checkpoint(v=tf.Variable(value))


def prefixes(tmp_path: Path, *numbers: int, name: str = "ckpt") -> list[str]:
    return [f"{tmp_path}/{name}-{n}" for n in numbers]


def value_of(path: str | None) -> float:
    """What TensorFlow restores from there."""
    checkpoint = counting()
    checkpoint.restore(path).assert_consumed()
    return float(checkpoint.v)


def listed(tmp_path: Path) -> list[str]:
    """What TensorFlow's state file lists."""
    return list(tf.train.get_checkpoint_state(tmp_path).all_model_checkpoint_paths)


def test_numbers_rise_and_the_oldest_go(manager: Make, tmp_path: Path) -> None:
    checkpoint = counting()
    m = manager(checkpoint, 3)
    assert (m.latest_checkpoint, m.checkpoints, m.directory) == (None, [], str(tmp_path))
    assert not list(tmp_path.iterdir())
    paths = []
    for value in range(1, 6):
        checkpoint.v.assign(value)
        paths.append(m.save())
    checkpoint.v.assign(-1.0)
    m.sync()
    assert paths == prefixes(tmp_path, 1, 2, 3, 4, 5)
    eventually(lambda: m.checkpoints == paths[2:], "three are left")
    assert m.latest_checkpoint == tf.train.latest_checkpoint(tmp_path) == paths[-1]
    assert [value_of(path) for path in m.checkpoints] == [3, 4, 5]
    assert int(checkpoint.save_counter) == 5
    eventually(lambda: listed(tmp_path) == paths[2:], "the state file is right")


def test_another_start_goes_on(manager: Make, tmp_path: Path) -> None:
    first = manager(counting(1.0), 2)
    first.save()
    first.save()
    first.sync()
    checkpoint = counting()
    again = manager(checkpoint, 2)
    assert again.latest_checkpoint == prefixes(tmp_path, 2)[0]
    checkpoint.restore(again.latest_checkpoint).assert_consumed()
    assert float(checkpoint.v) == 1
    checkpoint.v.assign(2.0)
    assert again.save() == prefixes(tmp_path, 3)[0]
    again.sync()
    eventually(lambda: again.checkpoints == prefixes(tmp_path, 2, 3), "two are left")
    assert value_of(again.latest_checkpoint) == 2


@pytest.mark.slow
def test_numbers_of_ones_own(manager: Make, tmp_path: Path) -> None:
    checkpoint, step = counting(), tf.Variable(40, dtype=tf.int64)
    m = manager(checkpoint, None, checkpoint_name="model")
    assert m.save(7) == prefixes(tmp_path, 7, name="model")[0]
    assert m.save(checkpoint_number=step) == prefixes(tmp_path, 40, name="model")[0]
    assert m.save(tf.constant(50)) == prefixes(tmp_path, 50, name="model")[0]
    m.sync()
    assert m.checkpoints == prefixes(tmp_path, 7, 40, 50, name="model")
    assert int(checkpoint.save_counter) == 3


def test_an_interval(manager: Make, tmp_path: Path) -> None:
    step = tf.Variable(0)
    checkpoint = tf.train.Checkpoint(step=step)
    m = manager(checkpoint, None, step_counter=step, checkpoint_interval=2)
    assert m.checkpoint_interval == 2
    saved = []
    for _ in range(5):
        saved.append(m.save())
        step.assign_add(1)
    assert saved == [f"{tmp_path}/ckpt-1", None, f"{tmp_path}/ckpt-2", None, f"{tmp_path}/ckpt-3"]
    assert m.save(check_interval=False) == f"{tmp_path}/ckpt-4"
    assert m.save(check_interval=False) is None
    m.sync()
    again = manager(checkpoint, None, step_counter=step, checkpoint_interval=2)
    assert again.restore_or_initialize() == f"{tmp_path}/ckpt-4"
    assert again.save() is None
    step.assign_add(2)
    assert again.save() == f"{tmp_path}/ckpt-5"


def test_restore_or_initialize(manager: Make, tmp_path: Path) -> None:
    checkpoint = counting()
    started: list[int] = []

    def start() -> None:
        started.append(1)
        checkpoint.v.assign(5.0)

    m = manager(checkpoint, 3, init_fn=start)
    assert m.restore_or_initialize() is None
    assert (started, float(checkpoint.v)) == ([1], 5)
    path = m.save()
    m.sync()
    checkpoint.v.assign(0.0)
    again = manager(checkpoint, 3, init_fn=start)
    assert again.restore_or_initialize() == path
    assert (started, float(checkpoint.v)) == ([1], 5)
    checkpoint.v.assign(0.0)
    assert again.restore_or_initialize() == path
    assert float(checkpoint.v) == 5
    assert again.save() == prefixes(tmp_path, 2)[0]


def test_objects_that_come_later_and_objects_that_were_not_saved(manager: Make) -> None:
    first = manager(counting(3.0))
    first.save()
    first.sync()
    checkpoint = tf.train.Checkpoint(more=tf.Variable(4.0))
    assert manager(checkpoint).restore_or_initialize() is not None
    checkpoint.v = tf.Variable(0.0)
    assert (float(checkpoint.v), float(checkpoint.more)) == (3, 4)


def test_wrong_arguments(manager: Make) -> None:
    for number in (0, -2):
        with pytest.raises(ValueError, match=f"Expected a positive integer or `None` for `max_to_keep`, got {number}"):
            manager(counting(), number)
    with pytest.raises(ValueError, match="`step_counter` should be passed if `checkpoint_interval` is not None"):
        manager(counting(), 1, checkpoint_interval=3)


def test_what_is_kept_by_hours_is_listed_no_more_and_stays(manager: Make, tmp_path: Path) -> None:
    every = 1e-9
    checkpoint = counting()
    m = manager(checkpoint, 1, every)
    for _ in range(3):
        m.save()
        m.sync()
    expected = prefixes(tmp_path, 3)
    eventually(lambda: m.checkpoints == expected, "two are kept by hours")
    again = manager(checkpoint, 1)
    assert again.checkpoints == expected
    again.save()
    again.sync()
    eventually(lambda: again.checkpoints == prefixes(tmp_path, 4), "one is deleted")
    eventually(lambda: listed(tmp_path) == again.checkpoints, "the state file is right")
    left = ["ckpt-1", "ckpt-2", "ckpt-4"]
    eventually(lambda: sorted(path.stem for path in tmp_path.glob("*.index")) == left, "the third is gone")


@pytest.mark.slow
def test_hours_count_over_restarts(ours: Make, tmp_path: Path) -> None:
    since = tmp_path / "_ray_ckpt" / "kept_since"
    ours(counting(), 1, 2.0).restore_or_initialize()
    began = json.loads(since.read_text())["since"]
    assert abs(time.time() - began) < 600
    checkpoint = counting()
    # As if that had been three hours ago: the first one to go is kept, the next ones are too young.
    since.write_text(json.dumps({"since": began - 3 * 3600}))
    m = ours(checkpoint, 1, 2.0)
    for _ in range(3):
        m.save()
        m.sync()
    eventually(lambda: [c.step for c in ray_ckpt.checkpoints(tmp_path)] == [1, 3], "the first and the last are left")
    assert m.checkpoints == prefixes(tmp_path, 3)
    assert json.loads(since.read_text())["since"] == began - 3 * 3600


def test_without_a_restore_it_starts_anew(ours: Make, tmp_path: Path) -> None:
    first = ours(counting(1.0), None)
    for number in (10, 20, 30):
        first.save(number)
    m = ours(counting(2.0), None)
    path = m.save(20)
    m.sync()
    # Beyond 10, the first number to be saved says that 20 and 30 are not where this came from.
    assert m.checkpoints == [*prefixes(tmp_path, 10), path]
    assert m.latest_checkpoint == tf.train.latest_checkpoint(tmp_path) == path
    assert [value_of(found) for found in m.checkpoints] == [1, 2]


@pytest.mark.slow
def test_a_number_that_is_not_higher(ours: Make) -> None:
    checkpoint = counting(1.0)
    m = ours(checkpoint, None)
    m.save(5)
    for value, number in ((2.0, 5), (3.0, 4)):
        checkpoint.v.assign(value)
        path = m.save(number)
        checkpoint.v.assign(0.0)
        assert m.latest_checkpoint == path
        assert value_of(path) == value
    assert len(m.checkpoints) == 1


@pytest.mark.slow
def test_a_number_that_a_dead_coordinator_has_claimed(ours: Make, tmp_path: Path) -> None:
    ours(counting()).restore_or_initialize()
    # One that this coordinator does not sweep: that would be in the log's mark, sooner or later.
    log.put_claim(open_store(tmp_path), Claim("e000099-000001", 99, 0, 7, "ckpt-7", 3))
    for number, value in ((6, 1.0), (7, 2.0), (8, 3.0)):
        m = ours(counting(value), None)
        path = m.save(number)
        m.sync()
        assert m.latest_checkpoint == path
        assert value_of(path) == value


def break_shards(tmp_path: Path, number: int) -> None:
    """Where the shards may go folders lie: nothing can."""
    for count in (4, 7):
        for shard in range(count):
            (tmp_path / f"ckpt-{number}.data-{shard:05d}-of-{count:05d}").mkdir()


@pytest.mark.slow
def test_a_number_is_saved_again_after_it_has_failed(ours: Make, tmp_path: Path) -> None:
    checkpoint = counting(1.0)
    m = ours(checkpoint, None)
    m.save(1)
    outside = tf.Variable(0, dtype=tf.int64)
    checkpoint.more = iter(tf.data.Dataset.range(5).map(lambda x: x + outside))
    with pytest.raises(StateError, match="TensorFlow cannot save an object"):
        m.save(2)
    del checkpoint.more
    checkpoint.v.assign(2.0)
    path = m.save(2)
    m.sync()
    assert (m.latest_checkpoint, value_of(path)) == (path, 2)
    break_shards(tmp_path, 3)
    m.save(3)
    with pytest.raises(SaveError, match="step 3 was not saved"):
        m.sync()
    checkpoint.v.assign(3.0)
    path = m.save(3)
    assert value_of(path) == 3
    assert [value_of(found) for found in m.checkpoints] == [1, 2, 3]


def test_blocking_says_what_was_not_saved(ours: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    m = ours(counting(), blocking=True)
    failed = SaveOutcome(1, 1, "failed", error="the reason", quiet=True)
    monkeypatch.setattr(ray_ckpt.Checkpointer, "outcome", lambda *_: failed)
    with pytest.raises(SaveError, match="number 1 was not saved: the reason"):
        m.save()


@pytest.mark.slow
def test_a_start_that_fails_is_left(ours: Make) -> None:
    first = ours(tf.train.Checkpoint(v=tf.Variable([1.0, 2.0])), None)
    first.save()
    checkpoint = counting(3.0)
    m = ours(checkpoint, None)
    with pytest.raises(MismatchError, match="shape"):
        m.restore_or_initialize()
    assert m._job is None
    checkpoint.save_counter.assign(1)
    path = m.save()
    m.sync()
    assert value_of(path) == 3


@pytest.mark.slow
def test_workers_that_look_at_different_moments_look_again(
    ours: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours(counting(1.0), None).save(1)
    ours(counting(1.0), None).save(2)
    ours(counting()).sync()
    all_steps, looks = ray_ckpt.Checkpointer.all_steps, []

    def look(self: ray_ckpt.Checkpointer) -> list[int]:
        looks.append(self.rank)
        found = all_steps(self)
        return found[:-1] if looks.count(1) == 1 and self.rank == 1 else found

    monkeypatch.setattr(ray_ckpt.Checkpointer, "all_steps", look)

    def work(rank: int) -> Any:
        with ray_ckpt.CheckpointManager(counting(3.0), tmp_path, None, rank=rank, world_size=2) as m:
            m.save(3)
            m.sync()
            return [value_of(path) for path in m.checkpoints]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [[1, 1, 3]] * 2
    assert sorted(looks) == [0, 0, 1, 1]


@pytest.mark.slow
def test_a_store_without_exclusive_writes_is_left_to_the_coordinator(
    ours: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repaired: list[Any] = []
    monkeypatch.setattr(log, "repair_state_file", repaired.append)
    m = ours(counting(), single_coordinator=True)
    path = m.save()
    m.sync()
    assert not repaired
    eventually(lambda: tf.train.latest_checkpoint(tmp_path) == path, "the coordinator names it")


def test_a_save_is_of_the_moment_and_waits_for_nobody(ours: Make) -> None:
    checkpoint = counting(1.0)
    m = ours(checkpoint)
    path = m.save()
    checkpoint.v.assign(2.0)
    m.sync()
    assert value_of(path) == 1
    blocking = ours(checkpoint, blocking=True)
    assert blocking.restore_or_initialize() == path
    assert blocking.save() == blocking.latest_checkpoint == str(path).replace("-1", "-2")


def test_callbacks_are_called_after_the_commit(manager: Make) -> None:
    m = manager(counting())
    told: list[tuple[str, bool]] = []
    options = tf.train.CheckpointOptions(
        experimental_write_callbacks=[lambda path: told.append((path, os.path.exists(f"{path}.index")))]
    )
    path = m.save(options=options)
    m.sync()
    assert told == [(path, True)]


@pytest.mark.slow
def test_callbacks_of_a_start_that_is_over_are_not_called_for_another(ours: Make) -> None:
    m = ours(counting())
    told: list[str] = []
    # As after a start whose saves were never heard of.
    m._untold.append((1, [told.append]))
    m.save()
    m.sync()
    assert told == []


@pytest.mark.slow
def test_a_damaged_one_is_left_out(ours: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = counting()
    m = ours(checkpoint)
    for value in (1.0, 2.0):
        checkpoint.v.assign(value)
        m.save()
    m.sync()
    (shard,) = (p.name for p in tmp_path.glob("ckpt-2.data-00000-*"))
    flip(open_store(tmp_path), shard, 0)
    again = ours(checkpoint)
    with caplog.at_level(logging.WARNING):
        assert again.restore_or_initialize() == prefixes(tmp_path, 1)[0]
    assert float(checkpoint.v) == 1
    assert "ckpt-2 is damaged" in caplog.text


def test_what_cannot_be_saved(ours: Make) -> None:
    with pytest.raises(StateError, match=r"Module is saved inside a checkpoint: make tf\.train\.Checkpoint"):
        ours(tf.Module())
    outside = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(dataset=iter(tf.data.Dataset.range(5).map(lambda x: x + outside)))
    m = ours(checkpoint)
    with pytest.raises(StateError, match="TensorFlow cannot save an object"):
        m.save()
    checkpoint.dataset = outside
    assert m.save() == f"{m.directory}/ckpt-2"


def test_two_workers(ours: Make, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Any, Any, int]:
        checkpoint = tf.train.Checkpoint(
            v=tf.Variable([1.0, 2.0]), iterator=iter(tf.data.Dataset.range(10)), mine=tf.Variable(rank)
        )
        next(checkpoint.iterator)
        with ray_ckpt.CheckpointManager(checkpoint, tmp_path, 3, rank=rank, world_size=2) as m:
            first = m.restore_or_initialize()
            path = m.save()
        again = tf.train.Checkpoint(
            v=tf.Variable([0.0, 0.0]), iterator=iter(tf.data.Dataset.range(10)), mine=tf.Variable(-1)
        )
        with ray_ckpt.CheckpointManager(again, tmp_path, 3, rank=rank, world_size=2) as m:
            assert m.restore_or_initialize() == path
        assert again.v.numpy().tolist() == [1, 2]
        return first, path, int(next(again.iterator)) + 10 * int(again.mine)

    RUNS.add(run_id(str(tmp_path)))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    assert found == [(None, f"{tmp_path}/ckpt-1", 1)] * 2


@pytest.mark.slow
def test_a_script_that_never_closes_it_loses_nothing(tmp_path: Path) -> None:
    script = f"""
import tensorflow as tf
import ray_ckpt
checkpoint = tf.train.Checkpoint(v=tf.Variable(3.0))
ray_ckpt.CheckpointManager(checkpoint, {str(tmp_path)!r}, 3).save()
"""
    # A Ray of its own, which ends with the script.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment, timeout=200)
    assert value_of(tf.train.latest_checkpoint(tmp_path)) == 3
