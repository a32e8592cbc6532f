"""When to save and what to keep."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.policy import align, crosses, first_crossing, retire
from ray_ckpt.types import Checkpoint


@pytest.mark.parametrize(
    ("previous", "step", "every", "due"),
    [
        (0, 1, 1, True),
        (0, 499, 500, False),
        (499, 500, 500, True),
        (500, 501, 500, False),
        (499, 503, 500, True),
        (100, 1700, 500, True),
        (0, 10, None, False),
        (500, 500, 500, False),
    ],
)
def test_a_save_is_due_where_a_multiple_is_crossed(previous: int, step: int, every: int | None, due: bool) -> None:
    assert crosses(previous, step, every) is due


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 7), st.integers(1, 7))
def test_workers_that_report_the_same_steps_find_the_same_saves(start: int, every: int, stride: int, n: int) -> None:
    steps = range(start, start + n * stride + 1, stride)
    due = [s for p, s in pairwise(steps) if crosses(p, s, every)]
    multiples = {m for m in range(start + 1, steps[-1] + 1) if m % every == 0}
    assert len(due) == len({next(s for s in steps if s >= m) for m in multiples})


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 9))
def test_align_is_the_first_reported_step_from_there(step: int, seen: int, stride: int) -> None:
    found = align(max(step, seen), seen, stride)
    assert found == next(s for s in range(seen, 10_000, stride) if s >= max(step, seen))


@given(st.integers(0, 60), st.integers(1, 40), st.integers(1, 20), st.integers(1, 6))
def test_first_crossing_is_the_first_due_step_from_there(seen: int, ahead: int, every: int, stride: int) -> None:
    earliest = seen + ahead
    steps = range(seen, 10_000, stride)
    due = (s for p, s in pairwise(steps) if s >= earliest and crosses(p, s, every))
    assert first_crossing(seen, earliest, every, stride) == next(due)


def _checkpoints(flags: list[tuple[bool, bool]]) -> list[Checkpoint]:
    """One every ten minutes; every third is of the next generation."""
    return [
        Checkpoint(10 * i, f"p{i}", f"a{i}", 1 + i // 3, 600.0 * i, 1, 1, 1, superseded=superseded, foreign=foreign)
        for i, (superseded, foreign) in enumerate(flags)
    ]


lives = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12).map(_checkpoints)
keeps = st.fixed_dictionaries(
    {
        "max_to_keep": st.integers(1, 5),
        "keep_every_steps": st.none() | st.integers(1, 50),
        "keep_every_hours": st.none() | st.floats(0.01, 2.0),
        "hours_from": st.none() | st.floats(0.0, 7200.0),
        "hours_grid": st.none() | st.floats(0.0, 7200.0),
        "first_generation": st.integers(0, 4),
        "protected": st.frozensets(st.integers(0, 11).map("p{}".format), max_size=2),
    }
)


@given(lives, keeps)
def test_what_must_stay_is_never_chosen(live: list[Checkpoint], keep: dict) -> None:
    deleted, preserved = retire(live, **keep)
    chosen = [*deleted, *preserved]
    usable = [c for c in live if not c.superseded and not c.foreign]
    assert not any(c.foreign or c.prefix in keep["protected"] for c in chosen)
    assert not any(c.generation < keep["first_generation"] for c in chosen)
    assert usable[-1:] == [] or usable[-1] not in chosen
    every = keep["keep_every_steps"]
    assert not any(every and c.step % every == 0 and not c.superseded for c in chosen)
    assert not any(c.superseded for c in preserved)


@given(lives, keeps)
def test_superseded_ones_go_first_and_then_the_oldest(live: list[Checkpoint], keep: dict) -> None:
    order = [(not c.superseded, c.step) for c in retire(live, **keep).deleted]
    assert order == sorted(order)


@given(lives, st.integers(1, 5))
def test_no_more_than_asked_for_stay_where_all_may_go(live: list[Checkpoint], max_to_keep: int) -> None:
    own = [c for c in live if not c.foreign]
    left = len(own) - len(retire(live, max_to_keep=max_to_keep).deleted)
    assert left == min(len(own), max_to_keep) or left == max_to_keep


@given(lives, st.integers(1, 4), st.integers(1, 5))
def test_older_generations_are_neither_counted_nor_deleted(live: list[Checkpoint], first: int, most: int) -> None:
    mine = [c for c in live if c.generation >= first]
    deleted = retire(live, max_to_keep=most, first_generation=first).deleted
    assert deleted == retire(mine, max_to_keep=most).deleted
    assert set(deleted) <= set(mine)


def test_without_a_limit_nothing_is_deleted_or_preserved() -> None:
    live = _checkpoints([(True, False)] * 4 + [(False, False)] * 5)
    assert retire(live, max_to_keep=None, keep_every_hours=0.1) == ([], [])


def _simulated(every: float | None, hours_from: float | None, count: int = 10) -> tuple[list[int], list[int]]:
    """Steps that stay and steps that are preserved of a run that saves every ten minutes and keeps one."""
    live: list[Checkpoint] = []
    for new in _checkpoints([(False, False)] * count):
        live.append(new)
        deleted, preserved = retire(live, max_to_keep=1, keep_every_hours=every, hours_from=hours_from)
        live = [replace(c, preserved=c.preserved or c in preserved) for c in live if c not in deleted]
    return [c.step for c in live], [c.step for c in live if c.preserved]


@pytest.mark.parametrize(
    ("every", "hours_from", "preserved"),
    [
        (None, None, []),
        (0.5, None, [0, 30, 60]),
        (0.5, 0.0, [30, 60]),
        (0.5, 600.0, [40, 70]),
        (0.5, 601.0, [50, 80]),
        (9.0, 0.0, []),
    ],
)
def test_one_of_each_span_of_time_is_preserved_and_not_counted(
    every: float | None, hours_from: float | None, preserved: list[int]
) -> None:
    assert _simulated(every, hours_from) == ([*preserved, 90], preserved)


def test_what_was_preserved_before_is_where_the_next_span_begins() -> None:
    live = _checkpoints([(False, False)] * 6)
    live[2] = replace(live[2], preserved=True)
    deleted, preserved = retire(live, max_to_keep=1, keep_every_hours=0.25, hours_from=0.0)
    assert [c.step for c in preserved] == [40]
    assert [c.step for c in deleted] == [0, 10, 30]


def _savers(times: list[float], most: int, hours: float, made: float) -> list[float]:
    """Which ones `tf.train.Saver` keeps for their age: its `_MaybeDeleteOldCheckpoints` without the files."""
    listed: list[float] = []
    kept, following = [], made + hours * 3600
    for time in times:
        listed.append(time)
        if len(listed) > most and (oldest := listed.pop(0)) > following:
            kept.append(oldest)
            following += hours * 3600
    return kept


def _kept_on_grid(times: list[float], most: int, hours: float, origin: float) -> list[float]:
    """The same by this package's rule, from the marks alone."""
    live: list[Checkpoint] = []
    for i, time in enumerate(times):
        live.append(Checkpoint(i, f"p{i}", f"a{i}", 1, time, 1, 1, 1))
        deleted, preserved = retire(live, max_to_keep=most, keep_every_hours=hours, hours_grid=origin)
        live = [replace(c, preserved=c.preserved or c in preserved) for c in live if c not in deleted]
    return [c.time for c in live if c.preserved]


def test_on_a_grid_a_late_one_does_not_put_off_the_next() -> None:
    times = [2400.0 * i for i in range(1, 13)]
    assert [time / 2400 for time in _kept_on_grid(times, 1, 1.0, 0.0)] == [2, 4, 5, 7, 8, 10, 11]


gaps = st.lists(st.integers(1, 20_000), max_size=30)


@given(gaps, st.integers(1, 4), st.sampled_from([0.25, 1.0, 2.0]))
def test_the_grid_is_that_of_tensorflows_saver(gaps: list[int], most: int, hours: float) -> None:
    times = [1e9 + time for time in accumulate(map(float, gaps))]
    assert _kept_on_grid(times, most, hours, 1e9) == _savers(times, most, hours, 1e9)


def test_what_an_earlier_saver_kept_does_not_take_the_grid_on() -> None:
    live = [replace(c, preserved=c.step == 10) for c in _checkpoints([(False, False)] * 4)]
    assert retire(live, max_to_keep=1, keep_every_hours=0.1, hours_grid=700.0).preserved == [live[2]]
