"""Snapshot memory is one user's alone, whatever others have put in its place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot import Segment, default_folder, drop_unused, private_folder, scan
from tests.snapshot.helpers import of_version

NAME = "run-host"


@pytest.fixture(params=["default", "named"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Open the memory of a run under tmp_path, in the default place or in one that the user names."""
    monkeypatch.setattr("ray_ckpt.snapshot.folder._BASE", tmp_path)
    folder = None if request.param == "default" else str(tmp_path / f"ray_ckpt-{os.getuid()}")
    return lambda: HostMemory.open("run", "host", folder).folder


def own(tmp_path: Path) -> Path:
    """Where it will be."""
    base = tmp_path / f"ray_ckpt-{os.getuid()}"
    base.mkdir(mode=0o700)
    return base / NAME


def test_all_that_lies_there_is_closed_to_others(opened: Callable[[], Path]) -> None:
    folder = opened()
    Segment.create(folder / "00000-0.segment", 10).close()
    for path in (folder, folder.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (folder / "00000-0.segment").stat().st_mode & 0o777 == 0o600
    assert opened() == folder


def test_a_link_in_its_place_is_refused(opened: Callable[[], Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    own(tmp_path).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="not a folder of this user's alone"):
        opened()
    assert list(elsewhere.iterdir()) == []


def test_a_link_to_nowhere_and_a_file_are_refused(opened: Callable[[], Path], tmp_path: Path) -> None:
    place = own(tmp_path)
    place.symlink_to(tmp_path / "missing")
    with pytest.raises(StorageError, match="not a folder"):
        opened()
    place.unlink()
    place.write_bytes(b"")
    with pytest.raises(StorageError, match="not a folder"):
        opened()


def test_a_folder_that_others_may_write_is_refused(opened: Callable[[], Path], tmp_path: Path) -> None:
    place = own(tmp_path)
    place.mkdir()
    place.chmod(0o770)
    with pytest.raises(StorageError, match="mode 0700"):
        opened()


def test_a_base_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ckpt.snapshot.folder._BASE", tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    # Made before, by the user who runs this test, under the name of the other one.
    (tmp_path / "ray_ckpt-4000000").mkdir(mode=0o700)
    with pytest.raises(StorageError, match="not a folder of this user's alone"):
        default_folder(NAME)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot make a folder for segments: No such file"):
        private_folder(tmp_path / "missing" / "folder")


def test_segments_of_another_user_are_neither_used_nor_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "00000-0.segment"
    Segment.create(path, 10).close()
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(StorageError, match="belongs to another user"):
        Segment.open(path)
    assert scan(folder) == []
    assert drop_unused(tmp_path, 4e9, 4e9) == []
    assert path.exists()


def test_segments_of_another_version_are_seen_and_go_by_age(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = of_version(folder / "00000-0.segment", b"3")
    (folder / "00001-0.segment").write_bytes(b"RAYCKPTs are of no version")
    (found,) = scan(folder)
    assert (found.path, found.state, found.save, found.in_use) == (path, None, None, False)
    assert found.data_nbytes == path.stat().st_size
    assert drop_unused(tmp_path, 4e9, found.modified) == []
    with path.open("rb") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        assert drop_unused(tmp_path, 4e9, 4e9) == []
    assert drop_unused(tmp_path, 4e9, 4e9) == [path]
