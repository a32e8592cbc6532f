"""When to save and what to keep."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.policy import align, crosses, first_crossing, victims
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
    return [
        Checkpoint(10 * i, f"p{i}", f"a{i}", 1, 600.0 * i, 1, 1, 1, superseded=superseded, foreign=foreign)
        for i, (superseded, foreign) in enumerate(flags)
    ]


lives = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12).map(_checkpoints)
keeps = st.fixed_dictionaries(
    {
        "max_to_keep": st.integers(1, 5),
        "keep_every_steps": st.none() | st.integers(1, 50),
        "keep_every_hours": st.none() | st.floats(0.01, 2.0),
        "protected": st.frozensets(st.integers(0, 11).map("p{}".format), max_size=2),
    }
)


@given(lives, keeps)
def test_what_must_stay_is_never_chosen(live: list[Checkpoint], keep: dict) -> None:
    chosen = victims(live, **keep)
    usable = [c for c in live if not c.superseded and not c.foreign]
    assert not any(c.foreign or c.prefix in keep["protected"] for c in chosen)
    assert usable[-1:] == [] or usable[-1] not in chosen
    every = keep["keep_every_steps"]
    assert not any(every and c.step % every == 0 and not c.superseded for c in chosen)


@given(lives, keeps)
def test_superseded_ones_go_first_and_then_the_oldest(live: list[Checkpoint], keep: dict) -> None:
    chosen = victims(live, **keep)
    order = [(not c.superseded, c.step) for c in chosen]
    assert order == sorted(order)


@given(lives, st.integers(1, 5))
def test_no_more_than_asked_for_stay_where_all_may_go(live: list[Checkpoint], max_to_keep: int) -> None:
    own = [c for c in live if not c.foreign]
    left = len(own) - len(victims(live, max_to_keep=max_to_keep))
    assert left == min(len(own), max_to_keep) or left == max_to_keep


def test_without_a_limit_nothing_is_deleted() -> None:
    assert victims(_checkpoints([(True, False)] * 9), max_to_keep=None) == []


def test_the_first_of_each_span_of_time_stays_beside_the_newest_of_the_others() -> None:
    live = _checkpoints([(False, False)] * 10)  # one every ten minutes
    chosen = victims(live, max_to_keep=1, keep_every_hours=0.5)
    assert [c.step for c in live if c not in chosen] == [0, 30, 60, 80, 90]
