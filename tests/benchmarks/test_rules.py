"""What is made of measured numbers: repetitions, ranks together, medians, tables, margins."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, rules
from benchmarks.quick import LOST, allowed, slower
from benchmarks.run import Results, rounded
from benchmarks.subjects import SUBJECTS


@pytest.mark.parametrize(
    ("seconds", "times"), [(0.001, 5), (8.0, 5), (8.1, 4), (13.0, 3), (40.0, 1), (41.0, 1), (500.0, 1)]
)
def test_repetitions(seconds: float, times: int) -> None:
    assert rules.repetitions(seconds, 5, 40.0) == times


def saved(began: float, returned: float, committed: float, **more: float) -> dict[str, float]:
    return {"began": began, "returned": returned, "committed": committed, "cpu": 0.5, **more}


def test_ranks_count_from_the_earliest_start_to_the_latest_end() -> None:
    bound = {"memcpy": 0.1, "crc": 0.2, "write_began": 1.0, "write_ended": 2.0}
    lead = saved(10.0, 10.1, 12.0, durable=13.0, cpu_all=3.0, **bound)
    other = saved(9.0, 9.4, 11.0, **{**bound, "memcpy": 0.3, "write_began": 0.5})
    (save,) = rules.join_saves([[lead], [other]])
    assert save == pytest.approx(
        {
            "blocked": 0.4,
            "committed": 3.0,
            "durable": 4.0,
            "cpu": 1.0,
            "cpu_all": 3.0,
            "memcpy": 0.3,
            "crc": 0.2,
            "write": 1.5,
        }
    )


def test_of_saves_in_training_the_rank_that_lost_most_counts() -> None:
    assert rules.join_busy([[{"lost": 0.1}, {"lost": 0.5}], [{"lost": 0.2}, {"lost": -0.1}]]) == [
        {"lost": 0.2},
        {"lost": 0.5},
    ]


def test_restores_of_ranks() -> None:
    ranks = [[{"began": 1.0, "ended": 2.0, "read": 0.2}], [{"began": 0.5, "ended": 1.5, "read": 0.3}]]
    assert rules.join_restores(ranks) == [{"seconds": 1.5, "read": 0.3}]


@pytest.mark.parametrize(
    ("found", "joined"),
    [
        (["unharmed", "noticed", "silent"], "noticed"),
        (["unharmed", "silent"], "silent"),
        (["unharmed", "unharmed"], "unharmed"),
        ([], "unknown"),
    ],
)
def test_verdicts_of_ranks(found: list[str], joined: str) -> None:
    assert rules.join_verdicts([{"verdict": v, "detail": ""} for v in found])["verdict"] == joined


def row(subject: str, place: str = "disk", blocked: float = 0.2, **more: Any) -> dict[str, Any]:
    save = {"blocked": blocked, "committed": 1.0, "durable": 1.5, "cpu": 0.5, "cpu_all": 0.9}
    save |= {"memcpy": 0.1, "crc": 0.05, "write": 1.0}
    return {
        "place": place,
        "case": "big",
        "subject": subject,
        "name": subject,
        "gives_up": "no fsync",
        "nbytes": 1000,
        "saving": {
            "first": save,
            "quiet": [save, {**save, "blocked": blocked / 2}, {**save, "blocked": 9.0, "memcpy": 4.5}],
            "busy": [{"lost": -0.01}],
            "files": 3,
            "bytes": 1100,
            "memory": 12_000_000,
        },
        "restoring": {"first": {"seconds": 1.0}, "warm": [{"seconds": 0.3, "read": 0.2}], "cold": []},
        "flipped": {"verdict": "silent", "detail": "w0"},
        **more,
    }


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    found = rules.summary(row("a", blocked=0.4))
    assert (found["n"], found["blocked"], found["blocked_ratio"]) == (3, 0.4, pytest.approx(2.0))
    assert found["cold"] is None
    assert found["bytes_ratio"] == 1.1


def test_the_table() -> None:
    failed = {"place": "disk", "case": "big", "subject": "b", "nbytes": 1000, "error": "no | disk\nleft"}
    skipped = {"place": "disk", "case": "big", "subject": "c", "nbytes": 1000, "skipped": "no such case"}
    page = report.render({"commit": "abc"}, [row("a"), failed, skipped, row("d", "shm")])
    lines = page.splitlines()
    a, b = (next(line for line in lines if line.startswith(f"| {name} |")) for name in "ab")
    cells = "a | 3 | 0.20 (2) | -0.010 | 1.00 | 1.50 (1.5) | 0.50 / 0.90 | 0.30 (1.5) | - | 12 | 3 | 1.100 | silent"
    assert a == f"| {cells} | no fsync |"
    assert b.endswith("| **no figures**: no / disk left |")
    assert not any(line.startswith("| c |") for line in lines)
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {len(report.COLUMNS) + 1}
    assert "- commit: abc" in lines
    assert [line for line in lines if line.startswith("## ")][1].endswith("on /dev/shm")


def test_results_replace_keep_order_and_resume(tmp_path: Path) -> None:
    order = [("disk", "big", "a"), ("disk", "big", "b")]
    results = Results(tmp_path, {"commit": "abc"})
    results.put(row("b"), order)
    results.put(row("a", said="much"), order)
    results.put(row("b", error="broke"), order)
    again = Results(tmp_path)
    assert [r["subject"] for r in again.rows] == ["a", "b"]
    assert again.meta == {"commit": "abc"}
    assert again.has("disk", "big", "a")
    assert not again.has("disk", "big", "b")
    assert not again.has("shm", "big", "a")
    assert "said" not in json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert "**no figures**: broke" in (tmp_path / "table.md").read_text()


def test_what_is_slow_in_one_place_is_not_run_in_another(tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    results.put(row("a", seconds=200.0), [])
    results.put(row("b", seconds=100.0), [])
    assert results.slower_than(150.0, "big", "a") == {"name": "a", "error": "not run here: took 200 s on disk"}
    assert results.slower_than(150.0, "big", "b") == {}
    assert results.slower_than(150.0, "small", "a") == {}


def test_floats_are_rounded_at_any_depth() -> None:
    assert rounded({"a": [1 / 3, 12345678.9], "n": 7}) == {"a": [0.33333, 12346000.0], "n": 7}


def test_the_margin() -> None:
    stored = {"a": 1.0, "b": 0.01, f"c: {LOST}": -3.0}
    at = {name: allowed(name, value) for name, value in stored.items()}
    assert slower({**at, "new": 99.0}, stored) == []
    assert slower({name: value + 0.01 for name, value in at.items()}, stored) == list(stored)
    assert at["a"] > 1.0
    assert at[f"c: {LOST}"] > 0.0


def test_every_subject_has_a_module() -> None:
    for home in SUBJECTS.values():
        assert importlib.util.find_spec(f"benchmarks.subjects.{home.partition(':')[0]}"), home
