"""Values that each worker has of its own, on as many workers and on others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.leaves import PerWorker

from .saving import restore, save


def state(rank: int, on_resize: Any = "error", size: int = 2) -> Any:
    data = {"position": 10 * rank, "buffer": np.full(size, rank), "name": f"worker {rank}"}
    return {"data": PerWorker(data, on_resize), "step": 1}


def values(got: Any) -> tuple[int, list[int], str]:
    data = got["data"].value
    return data["position"], data["buffer"].tolist(), data["name"]


def test_on_as_many_workers_each_has_its_own() -> None:
    stored = save([state(rank) for rank in range(3)])
    for rank in range(3):
        got = restore(stored, state(9), rank, 3)
        assert values(got) == (10 * rank, [rank, rank], f"worker {rank}")
        assert got["data"].on_resize == "error"
        alone = restore(stored, None, rank, 3)
        assert alone["data"]["position"].value == 10 * rank


def test_on_others_it_is_an_error_by_default() -> None:
    stored = save([state(rank) for rank in range(3)])
    for like in (state(0), None):
        with pytest.raises(MismatchError) as caught:
            restore(stored, like, 1, 2)
        text = str(caught.value)
        assert "3 saved by another number of workers:" in text
        assert "    data/position: each of 3 workers saved its own value, expected 2\n" in text
        assert 'PerWorker(value, on_resize="first", "init" or a function)' in text


def test_the_first_or_the_new_value() -> None:
    stored = save([state(rank) for rank in range(3)])
    assert values(restore(stored, state(9, "first"), 3, 4)) == (0, [0, 0], "worker 0")
    assert values(restore(stored, state(9, "init"), 3, 4)) == (90, [9, 9], "worker 9")


def test_without_a_target_the_saved_rule_counts() -> None:
    got = restore(save([{"n": PerWorker(rank + 7, "first")} for rank in range(2)]), None, 2, 3)["n"]
    assert (got.value, got.on_resize) == (7, "first")
    assert restore(save([{"n": PerWorker(7, "init")}]), None, 0, 1)["n"].on_resize == "init"
    with pytest.raises(MismatchError, match=r'n: on_resize="init" needs the value itself'):
        restore(save([{"n": PerWorker(7, "init")}]), None, 1, 2)
    with pytest.raises(MismatchError, match="n: each of 1 workers saved its own value, expected 2"):
        restore(save([{"n": PerWorker(7, lambda *_: 1)}]), None, 1, 2)


def test_a_rule_gets_all_values_in_order() -> None:
    stored = save([state(rank, size=rank + 1) for rank in range(12)])
    calls = []

    def rule(saved: list[Any], rank: int, world_size: int) -> Any:
        calls.append((rank, world_size))
        return np.concatenate(saved) if isinstance(saved[0], np.ndarray) else saved[-1]

    got = restore(stored, state(0, rule), 1, 2)
    assert values(got) == (110, sorted(i for i in range(12) for _ in range(i + 1)), "worker 11")
    assert calls == [(1, 2)] * 3
    assert got["data"].on_resize is rule


def test_its_shape_is_checked() -> None:
    stored = save([state(rank) for rank in range(2)])
    with pytest.raises(MismatchError, match=r"data/buffer: expected int64\[3\], found int64\[2\]"):
        restore(stored, state(0, size=3), 0, 2)


def test_only_some_ranks_had_one() -> None:
    stored = save([{"rng": PerWorker(5), "step": 1}, {"step": 1}])
    with pytest.raises(MismatchError, match="rng: rank 1 of 2 saved no value of it"):
        restore(stored, {"rng": PerWorker(0), "step": 0}, 1, 2)


def test_a_function_where_the_number_changed() -> None:
    stored = save([{"n": PerWorker(rank)} for rank in range(2)])
    assert restore(stored, lambda: 1 / 0, 1, 2)["n"].value == 1
    with pytest.raises((StateError, MismatchError), match="n"):
        restore(stored, lambda: {"n": PerWorker(0)}, 0, 1)


def test_a_name_that_only_looks_like_one() -> None:
    alike = {"a": {".per_worker": {"00000-of-00001": 5}}}
    stored = save([alike, alike])
    assert restore(stored, alike, 0, 1) == restore(stored, None, 2, 3) == alike
