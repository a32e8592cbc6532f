"""Hostile files give a result or an error of ours; and each kind of violation is seen by the oracle."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ray_ckpt.errors import DamagedError, UsageError
from ray_ckpt.testing import fuzz as package
from ray_ckpt.testing.fuzz import fuzz, guard, run
from ray_ckpt.testing.fuzz.guard import Guard
from ray_ckpt.testing.fuzz.run import Result
from ray_ckpt.testing.fuzz.targets import TARGETS


def checked(result: Result, inputs: int) -> Result:
    """Nothing went wrong, all inputs were read, and they were neither all sound nor all refused."""
    assert not result.violations, result.violations[0]
    assert sum(result.inputs.values()) == inputs
    assert 0 < sum(result.accepted.values()) < inputs
    return result


def test_hostile_files_are_errors() -> None:
    result = checked(fuzz(2000, seed=0), 2000)
    for target in TARGETS:
        if target.share > 2:
            assert 0 < result.accepted[target.name] < result.inputs[target.name], target.name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_hostile_files_are_errors() -> None:
    checked(fuzz(100_000, seed=1), 100_000)


def test_an_input_depends_on_seed_and_number_alone() -> None:
    for target in TARGETS:
        assert target.make(Random("3:4")) == target.make(Random("3:4"))


def test_a_target_that_is_none() -> None:
    with pytest.raises(UsageError, match="no target 'nonsense': there are index, "):
        fuzz(1, seed=0, only="nonsense")
    assert package.__all__ == ["Result", "Violation", "fuzz"]


# -- the oracle sees what it should ---------------------------------------------------------------------------


def _refused(_: bytes) -> None:
    raise DamagedError("as it should be")


def _foreign_error(_: bytes) -> None:
    raise KeyError("not ours")


def _hang(_: bytes) -> None:
    while True:
        pass


def _bomb(_: bytes) -> None:
    bytes(os.urandom(1) * (80 << 20))


def _hoard(_: bytes) -> None:
    bytearray(1 << 50)


def _execute(raw: bytes) -> None:
    eval(raw.decode())


class _Planted:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.getcwd, ()


_PICKLE = pickle.dumps(_Planted())


def _unpickle(_: bytes) -> None:
    pickle.loads(_PICKLE)


def _leave(_: bytes) -> None:
    Path("/etc/passwd").read_bytes()


_BAD = {
    _foreign_error: "not ours",
    _hang: "processor time",
    _bomb: "bytes of memory",
    _hoard: "MemoryError",
    _execute: "compile",
    _unpickle: "pickle.find_class",
    _leave: "outside of the directory",
}


def _judge(there: Any, at: Any, *_rest: Any) -> None:
    """In a child process, as limits cannot be taken back: what the oracle says of each reader."""
    guard.CPU_LIMIT_S = 2.0
    judge = Guard("/dev/shm/no-such-folder/run")
    judge.trial = False
    found = {read.__name__: judge.violation(read, b"1 + 1", 5) for read in (_refused, len, *_BAD)}
    at.value = 1
    said = Result()
    for name, (accepted, text) in found.items():
        said.accepted[name] += accepted
        said.violations += [run.Violation(0, name, text)] if text else []
    there.send((said.inputs, said.accepted, said.violations))


def _crash(_there: Any, at: Any, *_rest: Any) -> None:
    at.value = 7
    os.abort()


def _wait_for_ever(_there: Any, at: Any, *_rest: Any) -> None:
    at.value = 3
    os.read(os.pipe()[0], 1)


def test_every_kind_of_violation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_child", _judge)
    result = fuzz(1, seed=0)
    assert result.accepted == {"len": 1, **{read.__name__: 1 for read in (_bomb, _execute, _unpickle, _leave)}}
    seen = {violation.target: violation.text for violation in result.violations}
    assert seen.keys() == {read.__name__ for read in _BAD}
    for read, text in _BAD.items():
        assert text in seen[read.__name__]


@pytest.mark.parametrize("end", [_crash, _wait_for_ever])
def test_an_input_that_ends_or_stops_its_process_is_found(monkeypatch: pytest.MonkeyPatch, end: Any) -> None:
    monkeypatch.setattr(run, "_child", end)
    monkeypatch.setattr(run, "_STUCK_S", 3.0)
    result = fuzz(4, seed=0)
    assert [violation.number for violation in result.violations] == [7 if end is _crash else 3]
    assert "the process ended with -" in result.violations[0].text
