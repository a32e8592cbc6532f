"""What target and checkpoint differ in, as the user reads it."""

from __future__ import annotations

import logging
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import MismatchError, StateError, UsageError
from ray_ckpt.leaves import PerWorker

from .saving import restore, same, save

STATE = {"params": {"w": np.ones((8, 4), np.float32), "b": np.ones(4, np.float32)}, "step": 3}


def difference(stored: Any, like: Any, **options: Any) -> list[str]:
    """The lines of the error."""
    with pytest.raises(MismatchError) as caught:
        restore(stored, like, **options)
    return str(caught.value).splitlines()


def test_all_kinds_of_difference_in_one_text() -> None:
    like = {
        "params": {"w": np.ones((8, 8), np.float32), "bias": np.ones(4, np.float32)},
        "step": 0.0,
        "zzz": 1,
    }
    remedies = (
        "change the target",
        "name what was renamed with rename={target's name: checkpoint's name}",
        "keep the target's values of missing leaves and ignore unexpected ones with partial=True",
        "convert dtypes with cast=True",
    )
    stored = save([STATE])
    assert difference(stored, like) == [
        f"{stored.where} does not fit the target:",
        "  2 missing (in the target, not in the checkpoint):",
        "    params/bias: did you mean 'params/b'?",
        "    zzz",
        "  1 unexpected (in the checkpoint, not in the target):",
        "    params/b",
        "  2 changed:",
        "    params/w: expected float32[8,8], found float32[8,4]",
        "    step: expected float64[], found int64[] (another dtype)",
        f"To restore: {'; '.join(remedies)}.",
    ]


def test_long_lists_are_cut() -> None:
    lines = difference(save([{"a": 1}]), {f"x{i:03d}": i for i in range(50)} | {"a": 1})
    assert lines[1] == "  50 missing (in the target, not in the checkpoint):"
    assert lines[2:23] == [*(f"    x{i:03d}" for i in range(20)), "    ... and 30 more"]
    assert len(lines) == 24


def test_only_remedies_that_help_are_named() -> None:
    (*_, last) = difference(save([{"a": np.zeros(3)}]), {"a": np.zeros(2)})
    assert last == "To restore: change the target."


def test_nothing_is_read_before_all_is_known() -> None:
    calls: list[tuple[int, int]] = []
    difference(save([STATE]), {**STATE, "more": 1}, progress=lambda *x: calls.append(x))
    assert not calls


def test_partial(caplog: pytest.LogCaptureFixture) -> None:
    stored = save([STATE])
    with caplog.at_level(logging.WARNING):
        got = restore(stored, {"step": 0, "new": "kept"}, partial=True)
    assert got == {"step": 3, "new": "kept"}
    assert "keeps its own value of 1 leaves: new" in caplog.text
    assert "has no place for 2 leaves: params/b, params/w" in caplog.text
    lines = difference(stored, {"step": 0.5, "new": 1}, partial=True)
    assert lines[1:3] == ["  1 changed:", "    step: expected float64[], found int64[] (another dtype)"]


def test_partial_with_nothing_in_common() -> None:
    (line,) = difference(save([{"a": 1}]), {"b": 1}, partial=True)
    assert "none of the target's 1 leaves is in the checkpoint, which holds 1 leaves: a:" in line


def test_rename() -> None:
    stored = save([STATE])
    like = {"model": {"kernel": STATE["params"]["w"] * 0, "b": STATE["params"]["b"] * 0}, "step": 0}
    names = {"model/kernel": "params/w", "model/b": "params/b"}
    for rename in (names, lambda name: names.get(name, name)):
        got = restore(stored, like, rename=rename)
        same(got, {"model": {"kernel": STATE["params"]["w"], "b": STATE["params"]["b"]}, "step": 3})
    with pytest.raises(UsageError, match=r"no leaf 'model/kernels' \(did you mean 'model/kernel'\?\); 1 of 1"):
        restore(stored, like, rename={"model/kernels": "params/w"})
    lines = difference(stored, like, rename={**names, "model/b": "params/c"})
    assert lines[2] == "    model/b: renamed to 'params/c'"
    assert lines[4] == "    params/b"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (np.array([1 / 3, 1e300]), np.float32),
        (np.array([1.5, 2], np.float32), np.float64),
        (np.array([1, 2]), np.int8),
        (np.array([1.0, -2.0]), np.int32),
        (np.array([0, 1]), np.bool_),
        (np.array([1 + 0j]), np.float32),
        (np.array([True]), np.float32),
    ],
)
def test_cast(found: np.ndarray, expected: type) -> None:
    got = restore(save([{"x": found}]), {"x": np.zeros(found.shape, expected)}, cast=True)["x"]
    with np.errstate(all="ignore"):
        same(got, found.real.astype(expected))


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        (np.array([300]), np.uint8, "x: 300 has no value in uint8; expected uint8, found int64"),
        (np.array([-1]), np.uint64, "x: -1 has no value in uint64"),
        (np.array([2**64 - 1], np.uint64), np.int64, "has no value in int64"),
        (np.array([2], np.int8), np.bool_, "x: 2 has no value in bool"),
        (np.array([1.5]), np.int64, "x: 1.5 has no value in int64"),
        (np.array([np.nan]), np.int64, "x: nan has no value in int64"),
        (np.array([1 + 2j]), np.float64, r"x: \(1\+2j\) has no value in float64"),
        (np.array(["a"], object), np.float64, r"x: expected float64\[1\], found string\[1\]$"),
    ],
)
def test_a_cast_that_would_change_values(found: np.ndarray, expected: type, text: str) -> None:
    with pytest.raises(MismatchError, match=f"(?m){text}"):
        restore(save([{"x": found}]), {"x": np.zeros(1, expected)}, cast=True)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(MismatchError, match=r"x: expected text, found bytes that are not UTF-8.*make the target's"):
        restore(save([{"x": b"\xff"}]), {"x": ""})


def test_what_cannot_be_a_target() -> None:
    stored = save([{"x": 1}])
    with pytest.raises(StateError, match=r"x: cannot save a builtins.set"):
        restore(stored, {"x": {1}})
    for rank, world_size in ((1, 1), (-1, 1), (0, 0)):
        with pytest.raises(UsageError, match=rf"rank must be.*found rank {rank} of world_size {world_size}"):
            restore(stored, {"x": 1}, rank, world_size)


def test_ranks_of_different_structure() -> None:
    stored = save([{"embed": 1, "step": 5}, {"head": 2, "step": 5}])
    # Each rank is held to its own stored structure.
    assert restore(stored, {"head": 0, "step": 0}, 1, 2) == {"head": 2, "step": 5}
    with pytest.raises(MismatchError, match=r"(?s)1 unexpected.*    head\n"):
        restore(stored, {"step": 0}, 1, 2)
    # Other ranks may divide the leaves as they like.
    assert restore(stored, {"embed": 0, "head": 0, "step": 0}, 0, 1) == {"embed": 1, "head": 2, "step": 5}
    assert restore(stored, {"head": 0}, 2, 3) == {"head": 2}
    assert restore(stored, None, 1, 2) == {"head": 2, "step": 5}
    with pytest.raises(StateError, match=r"2 workers with states of different structures.*rank 0 of 1: pass a state"):
        restore(stored, None, 0, 1)


Pair = namedtuple("Pair", "a b")


def test_containers_that_need_a_target() -> None:
    stored = save([{"pair": Pair(1, 2)}])
    assert restore(stored, {"pair": Pair(0, 0)}) == {"pair": Pair(1, 2)}
    with pytest.raises(StateError, match=r"holds containers that it cannot make \(namedtuple .*Pair\): pass a state"):
        restore(stored, None)


def test_names_that_need_escapes() -> None:
    state = {"a/b": 1, 3: {"": [2, (None, 4.0)]}, None: {}, 0.5: "x", True: b"y"}
    stored = save([state])
    same(restore(stored, state), state)
    assert restore(stored, None) == state
    assert difference(stored, {**state, True: 0})[2].startswith("    True: expected int64[], found string[]")


def test_a_state_that_is_one_leaf() -> None:
    stored = save([7])
    assert restore(stored, 0) == restore(stored, None) == restore(stored, lambda: 0) == 7


def test_markers_must_agree() -> None:
    stored = save([{"own": PerWorker(r), "all": 1} for r in range(2)])
    lines = difference(stored, {"own": 0, "all": PerWorker(0)}, rank=0, world_size=2)
    assert lines[2:4] == [
        "    all: one value was saved for all workers: take PerWorker off the target's leaf",
        "    own: each worker saved its own value: make the target's leaf a PerWorker",
    ]
