"""The protocol under simulation: enumerated crashes, random faults, and planted bugs that must be found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ray_ckpt.testing.simulator import FAULTS, Scenario, SimulationError, draw, run
from tests.protocol.mutants import MUTANTS, Mutant

SEEDS = 640
"""Random runs in `make test`; `python -m ray_ckpt.testing.simulator` makes more."""

CHUNKS = 8
SMALL = Scenario(seed=1, hosts=2, steps=4, save_steps=2, max_to_keep=1, requests=(1.0,), horizon=2.0)
TINY = replace(SMALL, hosts=1, steps=3, requests=())


def test_a_job_without_faults_commits_every_due_save() -> None:
    result = run(SMALL)
    assert result.starts == 1
    assert result.commits == 2


def test_a_run_depends_on_its_seed_alone() -> None:
    """Also not on the order in which this process happens to iterate over sets."""
    results = "(run(draw(seed)) for seed in range(12))"
    code = f"from ray_ckpt.testing.simulator import draw, run; print([(r.points, r.seconds_s) for r in {results}])"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(texts) == 1


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_runs(chunk: int, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = range(chunk * SEEDS // CHUNKS, (chunk + 1) * SEEDS // CHUNKS)
    done: Counter[str] = Counter()
    for seed in seeds:
        result = run(draw(seed))
        done.update(runs=1, commits=result.commits, starts=result.starts, events=result.events)
    with capsys.disabled():
        sys.stdout.write(f"\nseeds {seeds.start}..{seeds.stop - 1}: {dict(done)}\n")
    assert done["commits"] > done["runs"]


def test_every_fault_is_drawn() -> None:
    assert set().union(*(draw(seed).faults for seed in range(100))) == set(FAULTS)


KINDS = ("coordinator", "coordinator.store", "agent", "worker", "writer", "writer.store")


@pytest.mark.parametrize("kind", KINDS)
def test_one_crash_at_every_point(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    points = run(SMALL).points[kind]
    assert points > 3
    for point in range(1, points + 1):
        run(replace(SMALL, crashes={kind: frozenset({point})}))
    with capsys.disabled():
        sys.stdout.write(f"\n{points} runs with a crash of a {kind}\n")


def _pairs(points: int) -> Iterator[frozenset[int]]:
    """Two crashes of the coordinator: the second within what the restarted one does next."""
    for first in range(1, points + 1):
        for second in range(first + 1, first + 9):
            yield frozenset({first, second})


def test_two_coordinator_crashes(capsys: pytest.CaptureFixture[str]) -> None:
    kind = "coordinator.store"
    runs = 0
    for pair in _pairs(run(TINY).points[kind]):
        run(replace(TINY, crashes={kind: pair}))
        runs += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{runs} runs with two coordinator crashes\n")


@pytest.mark.parametrize("other", ["agent", "worker", "writer"])
def test_a_coordinator_and_another_process_crash(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    points = run(TINY).points
    runs = 0
    for first in range(1, points["coordinator.store"] + 1, 2):
        for second in range(1, points[other] + 1, max(points[other] // 4, 1)):
            run(replace(TINY, crashes={"coordinator.store": frozenset({first}), other: frozenset({second})}))
            runs += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{runs} runs with a coordinator and a {other} crash\n")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_bug_is_found(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mutant.patch(monkeypatch)
    for seed in (*range(mutant.seed, max(SEEDS, mutant.seed + 1)), *range(mutant.seed)):
        oracle = _objection(seed)
        if oracle is not None:
            with capsys.disabled():
                sys.stdout.write(f"\n{mutant.name}: found by the {oracle} oracle in seed {seed}\n")
            assert oracle in mutant.oracles
            return
    pytest.fail(f"{mutant.name} survives {SEEDS} seeds")


def _objection(seed: int) -> str | None:
    """Which oracle objects to this run, if any."""
    try:
        run(draw(seed))
    except SimulationError as error:
        return error.oracle
    return None
