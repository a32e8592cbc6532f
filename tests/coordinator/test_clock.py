"""The coordinator's clock: forward only, and past its own pauses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ray_ckpt.coordinator.clock import MAX_ADVANCE_S, Clock


def times(*values: float) -> Callable[[], float]:
    """A clock that shows these one after the other."""
    left = iter(values)
    return lambda: next(left)


def test_it_starts_at_the_wall_clock_and_goes_on_without_it() -> None:
    clock = Clock(times(5.0, 5.2, 5.3, 5.3), times(1e9))
    assert [clock.now() - 1e9 for _ in range(3)] == pytest.approx([0.2, 0.3, 0.3])


def test_a_pause_of_its_own_process_does_not_count() -> None:
    clock = Clock(times(0.0, 600.0, 600.1, 600.2), times(0.0))
    after = clock.now()
    assert after == MAX_ADVANCE_S
    assert [clock.now() - after for _ in range(2)] == pytest.approx([0.1, 0.2])
