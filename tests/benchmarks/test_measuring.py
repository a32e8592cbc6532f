"""Subjects of known behaviour, measured as the real ones are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cases, loop, rows
from benchmarks.cases import Case
from benchmarks.meters import flip
from benchmarks.restoring import measure_flipped, measure_restoring, write_plain
from benchmarks.saving import BASELINE_ROUNDS, EXTRA_SAVES, Record, measure_saving
from benchmarks.subjects.base import Subject
from benchmarks.task import Ranks, Task
from tests.benchmarks import fakes

TINY = Case("tiny", "three big tensors and a small one", (*((f"w{i}", (4, 70_000)) for i in range(3)), ("s", (5,))))
REPEATS = 2


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A row of a small case, whose phases run in this process."""
    monkeypatch.setitem(cases.CASES, "tiny", TINY)
    monkeypatch.setattr(loop, "MATMULS", 1)
    fakes.Silent.calls.clear()
    (tmp_path / "root" / "checkpoints").mkdir(parents=True)
    return Task("saving", "", "tiny", "disk", str(tmp_path / "root"), str(tmp_path), repeats=REPEATS)


def save(kind: type[Subject], task: Task) -> tuple[Task, Record]:
    """The saving phase, and what the conductor does after it."""
    result = measure_saving(kind(TINY, 0, task.checkpoints), replace(task, conductor=1), Ranks(task, 0))
    write_plain(TINY, 0, result["updates"], task.plain(0))
    return replace(task, step=result["step"]), result


def test_the_saves_come_in_order(task: Task) -> None:
    _, result = save(fakes.Silent, task)
    saves = 1 + EXTRA_SAVES + 2 * REPEATS
    calls = fakes.Silent.calls
    assert [c for c in calls if c.startswith("save")] == [f"save {step}" for step in range(1, saves + 1)]
    assert calls.count("wait") == saves
    first_update = calls.index("update")
    assert calls.index(f"save {saves - REPEATS}") < first_update < calls.index(f"save {saves - REPEATS + 1}")
    assert (calls[0], calls[-1]) == ("start", "close")
    assert result["step"] == saves


def test_a_save_in_training_has_a_whole_round_beside_it(task: Task) -> None:
    _, result = save(fakes.Silent, task)
    calls = fakes.Silent.calls
    between = calls[calls.index(f"save {result['step'] - 1}") : calls.index(f"save {result['step']}")]
    steps = result["busy"][0]["steps"]
    assert steps >= 3
    assert between.count("update") == steps + BASELINE_ROUNDS * 3
    assert between.index("wait") == steps + 1


def test_bounds_are_taken_before_each_quiet_save(task: Task) -> None:
    _, result = save(fakes.Silent, task)
    assert len(result["quiet"]) == REPEATS
    for record in result["quiet"]:
        assert record["memcpy"] > 0
        assert record["write_began"] < record["write_ended"] <= record["began"]
        assert record["began"] <= record["returned"] <= record["committed"] <= record["durable"]


def test_two_checkpoints_are_left_and_counted(task: Task) -> None:
    _, result = save(fakes.Silent, task)
    left = sorted(Path(task.checkpoints).iterdir())
    assert [path.name for path in left] == [f"step-{result['step'] - 1}", f"step-{result['step']}"]
    assert (result["files"], result["bytes"]) == (1, TINY.nbytes)


def test_what_was_updated_is_restored(task: Task) -> None:
    task, result = save(fakes.Careful, task)
    assert result["updates"]["w0"] > 0
    assert result["updates"]["s"] == 0
    found = measure_restoring(fakes.Careful(TINY, 0, task.checkpoints), task, Ranks(task, 0))
    assert (len(found["warm"]), len(found["cold"])) == (REPEATS, REPEATS)
    assert all(record["read"] > 0 for record in found["warm"] + found["cold"])


def test_values_that_were_not_saved_are_an_error(task: Task) -> None:
    task, _ = save(fakes.Forgetful, task)
    with pytest.raises(RuntimeError, match="not those that were saved: w0"):
        measure_restoring(fakes.Forgetful(TINY, 0, task.checkpoints), task, Ranks(task, 0))


@pytest.mark.parametrize(
    ("kind", "verdict"), [(fakes.Careful, "noticed"), (fakes.Silent, "silent"), (fakes.Padded, "unharmed")]
)
def test_a_flipped_byte(task: Task, kind: type[Subject], verdict: str) -> None:
    task, _ = save(kind, task)
    subject = kind(TINY, 0, task.checkpoints)
    assert measure_flipped(subject, task, Ranks(task, 0))["verdict"] == "unharmed"
    flip(subject.files(task.step))
    assert measure_flipped(subject, task, Ranks(task, 0))["verdict"] == verdict
    flip(subject.files(task.step))
    assert measure_flipped(subject, task, Ranks(task, 0))["verdict"] == "unharmed"


def measure(task: Task, subject: str) -> rows.Row:
    """A row in processes of its own, saving only."""
    root = Path(task.root) / "row"
    return rows.measure_row(replace(task, case_name="quick", subject=subject, root=str(root), repeats=1), ("saving",))


def test_a_failure_is_a_row_with_its_reason(task: Task) -> None:
    row = measure(task, "tests.benchmarks.fakes:Failing")
    assert row["error"] == "saving: RuntimeError: the disk | is\nfull"
    assert not (Path(task.root) / "row").exists()


def test_a_missing_package_is_a_row_with_its_reason(task: Task) -> None:
    row = measure(task, "tests.no_such_package:Subject")
    assert row["error"].startswith("not installed: ")
