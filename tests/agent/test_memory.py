"""A host's snapshot memory: what is made, emptied and given up when."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.snapshot import SaveId, Segment, SegmentState

SAVE = SaveId("run", 1, 9, 3, 4, "plan", "cadence")
EMPTY_TABLE = {"entries": [], "writers": [], "writer_base": 0, "digests": {}}

KILLED_IN_ITS_SNAPSHOT = """
import os, signal, sys
from ray_ckpt.snapshot import SaveId, Segment
with Segment.open(sys.argv[1], writable=True).fill(SaveId("run", 1, 9, 0, 1, "plan", "steps")):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_in_snapshot(path: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED_IN_ITS_SNAPSHOT, path], env=env, timeout=60)
    assert done.returncode == -9


def test_two_processes_killed_in_their_snapshots_cost_no_memory(tmp_path: Path) -> None:
    memory = HostMemory(tmp_path)
    paths = memory.prepare(0, 1000, 2)
    for path in paths:
        kill_in_snapshot(path)
    segments = [Segment.open(path) for path in paths]
    assert [s.state for s in segments] == [SegmentState.FILLING] * 2
    assert memory.sealed() == []
    assert [s.state for s in segments] == [SegmentState.EMPTY] * 2


def test_memory_of_ranks_that_moved_away_is_given_up(tmp_path: Path) -> None:
    memory = HostMemory(tmp_path)
    paths = {rank: memory.prepare(rank, 1000, 1, {0, 1, 2, 3})[0] for rank in range(4)}
    with Segment.open(paths[3], writable=True) as mapped:
        (path,) = memory.prepare(0, 1000, 1, {2})
        assert sorted(p.name for p in tmp_path.glob("*.segment")) == [f"0000{rank}-0.segment" for rank in (0, 2, 3)]
        with mapped.fill(SAVE):
            mapped.seal(json.dumps({**EMPTY_TABLE, "save": asdict(SAVE)}).encode())
    assert path == paths[0]
    assert [info.name for info in memory.sealed()] == ["00003-0.segment"]
    memory.prepare(0, 1000, 1)
    assert Path(paths[3]).exists(), "what is sealed stays"
    assert not Path(paths[2]).exists()


def test_a_rank_that_left_gives_back_what_is_empty_and_unused(tmp_path: Path) -> None:
    memory = HostMemory(tmp_path)
    first, second, mapped = (Path(p) for p in memory.prepare(0, 1000, 3))
    other = Path(memory.prepare(1, 1000, 1, {0})[0])
    with Segment.open(second, writable=True) as segment, segment.fill(SAVE):
        segment.seal(json.dumps({**EMPTY_TABLE, "save": asdict(SAVE)}).encode())
    with Segment.open(mapped):
        memory.give_back(0, closed=False)
        assert [first.exists(), second.exists(), mapped.exists(), other.exists()] == [False, True, True, True]
    assert [info.name for info in memory.sealed()] == [second.name]
    assert str(mapped) in memory.prepare(0, 1000, 3, {1})


def test_memory_of_runs_that_were_killed_is_removed(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    runs = ("empty", "filling", "sealed", "young", "open")
    folders = {name: HostMemory.open(name, "host", str(tmp_path)) for name in runs}
    paths = {name: Path(memory.prepare(0, 1000, 1)[0]) for name, memory in folders.items()}
    with Segment.open(paths["sealed"], writable=True) as segment, segment.fill(SAVE):
        segment.seal(json.dumps({**EMPTY_TABLE, "save": asdict(SAVE)}).encode())
    kill_in_snapshot(str(paths["filling"]))
    for name in set(runs) - {"young"}:
        os.utime(paths[name], (long_ago, long_ago))
    for memory in folders.values():
        for mapped in memory._segments.values():
            mapped.close()
    with Segment.open(paths["open"]):
        HostMemory.open("new", "host", str(tmp_path)).sweep()
    assert {name for name, path in paths.items() if path.exists()} == {"sealed", "young", "open"}


def test_a_snapshot_that_nobody_has_come_for_goes_after_a_day(tmp_path: Path) -> None:
    paths = {}
    for name, age_s in (("young", 20 * 3600), ("old", 30 * 3600), ("open", 30 * 3600)):
        memory = HostMemory.open(name, "host", str(tmp_path))
        paths[name] = Path(memory.prepare(0, 1000, 1)[0])
        with Segment.open(paths[name], writable=True) as segment, segment.fill(SAVE):
            segment.seal(json.dumps({**EMPTY_TABLE, "save": asdict(SAVE)}).encode(), keep=True)
        os.utime(paths[name], (time.time() - age_s,) * 2)
        for mapped in memory._segments.values():
            mapped.close()
    with Segment.open(paths["open"]):
        HostMemory.open("new", "host", str(tmp_path)).sweep()
    assert {name for name, path in paths.items() if path.exists()} == {"young", "open"}


def test_what_others_keep_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    pipe, locked, text = (folder / f"0000{i}-0.segment" for i in range(3))
    os.mkfifo(pipe)
    for path in (locked, text):
        path.write_text("not a segment")
    for path in (pipe, locked, text):
        os.utime(path, (0, 0))
    with locked.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        HostMemory.open("new", "host", str(tmp_path)).sweep()
    assert all(path.exists() for path in (pipe, locked, text))


def test_while_memory_is_made_the_agent_can_look_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(tmp_path)
    create = Segment.create
    looks, made = [], []

    def look_meanwhile(path: Path, nbytes: int) -> Segment:
        made.append(path.name)
        with ThreadPoolExecutor(1) as thread:
            looks.append(thread.submit(memory.sealed).result(timeout=60))
        return create(path, nbytes)

    monkeypatch.setattr(Segment, "create", look_meanwhile)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: memory.prepare(0, 1000, 2), range(2))
    assert looks == [[], []]
    assert first == second
    assert made == ["00000-0.segment", "00000-1.segment"], "each is made once"


def test_incarnations_rise_even_if_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [HostMemory(tmp_path).next_incarnation()]
    monkeypatch.setattr(time, "time_ns", lambda: 1000)
    names += [HostMemory(tmp_path).next_incarnation() for _ in range(2)]
    assert names == sorted(set(names))
    (tmp_path / "incarnation").write_text("damaged")
    assert int(HostMemory(tmp_path).next_incarnation()) == 1000


@pytest.mark.parametrize("made_anew", [True, False])
def test_each_snapshot_tells_its_own_digests(tmp_path: Path, made_anew: bool) -> None:
    """Also of a segment that is made anew under the same name: by the next start of a job, say."""
    memory = HostMemory(tmp_path)
    for digest in (1, 2):
        (path,) = memory.prepare(0, 1000, 1)
        with Segment.open(path, writable=True) as segment, segment.fill(SAVE):
            table = {**EMPTY_TABLE, "digests": {"w": digest}, "save": asdict(SAVE)}
            segment.seal(json.dumps(table).encode() + b"\n")
        (info,) = memory.sealed()
        assert info.digests == (("w", digest),)
        memory.free(info, {info.rank})
        if made_anew:
            memory.give_back(0, closed=False)
            assert not Path(path).exists()
