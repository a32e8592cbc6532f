"""Runs the inputs in child processes, so that one that ends or stops its process is an input that was found."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from ray_ckpt.errors import UsageError
from ray_ckpt.testing.fuzz.directories import Directory, targets
from ray_ckpt.testing.fuzz.guard import Guard
from ray_ckpt.testing.fuzz.targets import TARGETS, Target

_BATCH = 200
_STUCK_S = 30.0
"""Wall time in which a process finishes one input, whatever it waits for."""

_START_POLLS = 20

_TRIALS = 10
"""Inputs that only make the process import what it needs, before side effects count."""


@dataclass(frozen=True, slots=True)
class Violation:
    """An input that was not dealt with as it should be; ``--start number --inputs 1`` repeats it."""

    number: int
    target: str
    text: str


@dataclass(slots=True)
class Result:
    """How many inputs there were of each target, how many of them were accepted, and what went wrong."""

    inputs: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)


def fuzz(inputs: int, seed: int, start: int = 0, only: str | None = None) -> Result:
    """Give each input from number ``start`` on to its target; an input depends on seed and number alone.

    ``only``: the name of the one target that is given all inputs.

    Raises `UsageError` for a target that is none.
    """
    names = [target.name for target in _all_targets("")]
    if only is not None and only not in names:
        raise UsageError(f"no target {only!r}: there are {', '.join(names)}")
    result = Result()
    stop = start + inputs
    while start < stop:
        start = _one_child(result, seed, start, stop, only)
    return result


def _one_child(result: Result, seed: int, start: int, stop: int, only: str | None) -> int:
    """Run inputs in one process until it is done or ends early; the number of the next input."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    at = context.Value("q", start - 1)
    folder = tempfile.mkdtemp(prefix="ray_ckpt-fuzz-", dir="/dev/shm")
    child = context.Process(target=_child, args=(there, at, seed, start, stop, only, folder))
    child.start()
    there.close()
    try:
        for message in _messages(here, at):
            _take(result, message)
    finally:
        if child.is_alive() and here.closed:
            child.kill()
        child.join()
        shutil.rmtree(folder, ignore_errors=True)
    number: int = at.value
    if child.exitcode == 0:
        return stop
    if number < start:
        raise RuntimeError("the fuzzer itself failed before the first input, see above")
    result.inputs["ended the process"] += 1
    text = f"the process ended with {child.exitcode} or did not go on for {_STUCK_S:.0f} s"
    result.violations.append(Violation(number, only or "?", text))
    return number + 1


def _messages(here: Connection, at: Any) -> Iterator[Any]:
    """What the child says; ends with it, or when it has not gone on for too long."""
    last = first = at.value
    polls = 0
    while True:
        try:
            if here.poll(_STUCK_S):
                yield here.recv()
                continue
        except EOFError:
            return
        polls += 1
        # Before the first input it starts up, which takes long on a busy machine.
        if at.value == last and (last != first or polls > _START_POLLS):
            here.close()
            return
        last = at.value


def _take(result: Result, message: tuple[Counter[str], Counter[str], list[Violation]]) -> None:
    inputs, accepted, violations = message
    result.inputs += inputs
    result.accepted += accepted
    result.violations += violations


def _all_targets(folder: str) -> tuple[Target, ...]:
    return (*TARGETS, *targets(folder))


def _child(there: Connection, at: Any, seed: int, start: int, stop: int, only: str | None, folder: str) -> None:
    """The process that reads the inputs."""
    Path(folder, "canary").write_text("not of this directory")
    logging.getLogger("ray_ckpt").addHandler(_Formatted())
    logging.getLogger("ray_ckpt").propagate = False
    known = [target for target in _all_targets(f"{folder}/run") if only in (None, target.name)]
    guard = Guard(f"{folder}/run")
    for target in known:
        for number in range(_TRIALS):
            made = target.make(Random(f"trial:{number}"))
            guard.violation(target.read, made, _nbytes(made))
    guard.trial = False
    said: tuple[Counter[str], Counter[str], list[Violation]] = Counter(), Counter(), []
    for number in range(start, stop):
        at.value = number
        rng = Random(f"{seed}:{number}")
        target = rng.choices(known, [t.share for t in known])[0]
        made = target.make(rng)
        accepted, wrong = guard.violation(target.read, made, _nbytes(made))
        said[0][target.name] += 1
        said[1][target.name] += accepted
        if wrong is not None:
            said[2].append(Violation(number, target.name, wrong))
        if (number + 1 - start) % _BATCH == 0 or number + 1 == stop:
            there.send(said)
            said = Counter(), Counter(), []
    sys.stdout.flush()


class _Formatted(logging.Handler):
    """Formats what is logged, as that may fail as well, and forgets it."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


def _nbytes(made: Any) -> int:
    """Size of an input."""
    if isinstance(made, Directory):
        return made.nbytes
    return (
        sum(map(len, made.values())) if isinstance(made, dict) else len(made[-1] if isinstance(made, tuple) else made)
    )
