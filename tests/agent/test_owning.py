"""Whose the folders of a run are: an agent takes over what nobody owns and nobody uses, and nothing else."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.agent.owning import is_replica, lock, rank_of
from ray_ckpt.snapshot import Segment
from tests.agent.remembered import SAVE, folder, remember
from tests.snapshot.helpers import of_version


def left(base: Path, name: str) -> Path:
    """A folder with a snapshot whose agent is gone."""
    memory = HostMemory(folder(base, name))
    remember([memory], 1, keep=True)
    for segment in memory._segments.values():
        segment.close()
    os.close(memory._owner)
    return memory.folder


def test_what_a_lost_node_left_is_taken_over(tmp_path: Path) -> None:
    old = left(tmp_path, "run-old")
    memory = HostMemory(folder(tmp_path, "run-new"), "run")
    assert [(info.rank, info.save) for info in memory.sealed()] == [(0, SAVE)]
    assert len(memory.parts(SAVE, "")) == 1, "its layout has come with it"
    assert not old.exists()


def test_other_runs_are_left_alone(tmp_path: Path) -> None:
    old = left(tmp_path, "other-old")
    assert HostMemory(folder(tmp_path, "run-new"), "run").sealed() == []
    assert len(list(old.glob("*.segment"))) == 1


def test_a_folder_with_an_owner_is_left_alone(tmp_path: Path) -> None:
    owned = HostMemory(folder(tmp_path, "run-old"))
    remember([owned], 1, keep=True)
    assert HostMemory(folder(tmp_path, "run-new"), "run").sealed() == []
    assert len(owned.sealed()) == 1


def test_what_a_process_still_uses_is_left_alone(tmp_path: Path) -> None:
    old = left(tmp_path, "run-old")
    (path,) = old.glob("*.segment")
    with Segment.open(path):
        assert HostMemory(folder(tmp_path, "run-new"), "run").sealed() == []
    assert path.exists()


def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = left(tmp_path, "elsewhere")
    (tmp_path / "run-old").symlink_to(elsewhere)
    assert HostMemory(folder(tmp_path, "run-new"), "run").sealed() == []
    assert len(list(elsewhere.glob("*.segment"))) == 1


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    first = lock(tmp_path / "owner.lock")
    assert first >= 0
    assert lock(tmp_path / "owner.lock") == -1
    os.close(first)
    second = lock(tmp_path / "owner.lock")
    assert second >= 0
    os.close(second)


def test_what_was_a_copy_stays_one(tmp_path: Path) -> None:
    old = left(tmp_path, "run-old")
    (path,) = old.glob("*.segment")
    path.rename(path.with_name("00000-r0.segment"))
    memory = HostMemory(folder(tmp_path, "run-new"), "run")
    (name,) = (p.name for p in memory.folder.glob("*.segment"))
    assert is_replica(name)
    assert rank_of(name) == 0


def test_what_was_in_use_at_first_is_taken_over_later_but_not_from_a_host_that_lives(tmp_path: Path) -> None:
    owned = HostMemory(folder(tmp_path, "run-beef"))
    remember([owned], 1, keep=True)
    memory = HostMemory(folder(tmp_path, "run-new"), "run")
    assert not memory.take_over([])
    for segment in owned._segments.values():
        segment.close()
    os.close(owned._owner)
    assert not memory.take_over(["beef1234", "cafe"])
    assert memory.take_over(["cafe"])
    assert [(info.rank, info.save) for info in memory.sealed()] == [(0, SAVE)]
    assert len(memory.parts(SAVE, "")) == 1
    assert not memory.has_others


@pytest.mark.parametrize("name", ["run-old", "run-new"])
def test_segments_of_another_version_go_where_nobody_uses_them(tmp_path: Path, name: str) -> None:
    path = of_version(folder(tmp_path, name) / "00000-0.segment", b"3")
    with path.open("rb") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        first = HostMemory(folder(tmp_path, "run-new"), "run")
        assert path.exists()
    os.close(first._owner)
    assert HostMemory(folder(tmp_path, "run-new"), "run").sealed() == []
    assert not path.exists()
