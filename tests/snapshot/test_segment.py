"""Segments: who may read what when, through crashes, several processes and full folders."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from ray_ckpt.errors import DamagedError, SaveError, StorageError, UsageError
from ray_ckpt.snapshot import Segment, SegmentState, in_use, reclaim, scan
from ray_ckpt.snapshot import process as process_module
from ray_ckpt.snapshot import segment as segment_module
from ray_ckpt.snapshot.folder import default_folder
from ray_ckpt.snapshot.segment import HEADER_NBYTES

from .helpers import save_id, snapshots

SAVE = save_id("plan")


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[Segment]:
    with Segment.create(tmp_path / "s", 10_000) as made:
        yield made


def test_a_new_segment_is_empty_and_private(segment: Segment) -> None:
    assert (segment.state, segment.save, segment.data_nbytes) == (SegmentState.EMPTY, None, 10_000)
    assert len(segment.data) == 10_000
    assert segment.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SaveError, match="is empty"):
        segment.table()


def test_data_and_save_are_seen_by_another_mapping(segment: Segment) -> None:
    with Segment.open(segment.path) as other:
        before = other.fills
        with segment.fill(SAVE):
            assert (other.state, other.save) == (SegmentState.FILLING, SAVE)
            segment.data[:3] = b"abc"
            segment.seal(b'{"entries":[],"writers":[],"writer_base":0,"digests":{},"save":' + b"{}}")
        assert other.state is SegmentState.SEALED
        assert bytes(other.data[:3]) == b"abc"
        assert other.data.readonly
        assert other.fills == before + 1
        segment.release()
        assert other.state is SegmentState.EMPTY


def test_a_fill_that_fails_leaves_it_empty(segment: Segment) -> None:
    with pytest.raises(KeyError), segment.fill(SAVE):
        raise KeyError
    assert segment.state is SegmentState.EMPTY
    with segment.fill(SAVE):
        pass
    assert segment.state is SegmentState.EMPTY


def test_a_sealed_snapshot_is_not_overwritten(tmp_path: Path) -> None:
    _, (segment,) = snapshots(tmp_path, [{"a": 1}])
    with segment:
        with pytest.raises(SaveError, match="release it first"), segment.fill(SAVE):
            pass
        assert segment.state is SegmentState.SEALED
        segment.release()
        with segment.fill(SAVE):
            assert segment.state is SegmentState.FILLING


def test_a_table_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    _, (segment,) = snapshots(tmp_path, [{"a": 1}])
    with segment:
        segment.table()
        with open(segment.path, "r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"?")
        with pytest.raises(DamagedError, match="fails its digest"):
            segment.table()


CRASH = """
import os, signal, sys
from ray_ckpt.snapshot import SaveId, Segment
segment = Segment.open(sys.argv[1], writable=True)
with segment.fill(SaveId("run", 1, 9, 0, 1, "plan", "steps")):
    segment.data[:4] = b"torn"
    os.pwrite = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "table" else None
    if sys.argv[2] == "data":
        os.kill(os.getpid(), signal.SIGKILL)
    segment.seal(b"{}")
"""


@pytest.mark.parametrize("where", ["data", "table"])
def test_a_process_killed_while_filling_leaves_no_snapshot(segment: Segment, where: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CRASH, str(segment.path), where], env=env, timeout=60)
    assert done.returncode == -9
    assert bytes(segment.data[:4]) == b"torn"
    assert segment.state is SegmentState.FILLING
    with pytest.raises(SaveError):
        segment.table()
    with segment.fill(SAVE):
        assert segment.save == SAVE


def test_a_snapshot_from_before_a_reboot_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (segment,) = snapshots(tmp_path, [{"a": 1}])
    with segment:
        monkeypatch.setattr(process_module, "_boot", b"another boot!!!!")
        assert (segment.state, segment.save) == (SegmentState.EMPTY, None)


def take_tries(path: str, count: int, queue: Any, together: Any) -> None:
    with Segment.open(path, writable=True) as segment:
        together.wait(60)
        queue.put([segment.next_try(3) for _ in range(count)])


def test_tries_are_numbered_once_over_processes(segment: Segment) -> None:
    context = multiprocessing.get_context("spawn")
    queue, together = context.Queue(), context.Barrier(3)
    processes = [context.Process(target=take_tries, args=(str(segment.path), 3000, queue, together)) for _ in range(3)]
    for process in processes:
        process.start()
    numbers = sorted(number for _ in processes for number in queue.get(timeout=60))
    for process in processes:
        process.join(60)
    assert numbers == list(range(9000))
    assert segment.next_try(3) == 9000
    assert segment.next_try(4) == 0


def test_tries_outlive_the_process_and_start_again_with_each_fill(tmp_path: Path) -> None:
    _, (segment,) = snapshots(tmp_path, [{"a": 1}])
    assert [segment.next_try(0), segment.next_try(0)] == [0, 1]
    segment.close()
    with Segment.open(segment.path, writable=True) as again:
        assert again.next_try(0) == 2
        again.release()
        with again.fill(SAVE):
            assert again.next_try(0) == 0


def test_each_attempt_counts_its_own_tries(segment: Segment) -> None:
    assert [segment.next_try(0, 1), segment.next_try(0, 1), segment.next_try(0, 2)] == [0, 1, 0]
    with pytest.raises(SaveError, match="a later attempt than 1"):
        segment.next_try(0, 1)
    assert segment.next_try(0, 2) == 1
    with pytest.raises(UsageError, match="writer 1024"):
        segment.next_try(1024)


def test_populating_keeps_the_data(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    segment.data[:3] = b"abc"
    segment.populate()
    monkeypatch.setattr(segment_module, "_MADV_POPULATE_WRITE", 9999)
    segment.populate()
    assert bytes(segment.data[:4]) == b"abc\0"


def test_only_unused_segments_are_reclaimed(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path / "s", 1)
    other = Segment.open(tmp_path / "s")
    assert in_use(tmp_path / "s")
    segment.close()
    assert in_use(tmp_path / "s")
    assert not reclaim(tmp_path / "s")
    other.close()
    assert not in_use(tmp_path / "s")
    assert reclaim(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_scan_lists_segments_only(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("not a segment")
    (tmp_path / "folder").mkdir()
    plan, (sealed,) = snapshots(tmp_path, [{"a": 1}])
    Segment.create(tmp_path / "empty", 5).close()
    with sealed:
        first, second = scan(tmp_path)
    assert (first.path.name, first.state, first.save, first.in_use) == (
        "0",
        SegmentState.SEALED,
        sealed_save(plan),
        True,
    )
    assert (second.path.name, second.state, second.data_nbytes, second.in_use) == (
        "empty",
        SegmentState.EMPTY,
        5,
        False,
    )
    assert scan(tmp_path / "absent") == []


def sealed_save(plan: Any) -> Any:
    return save_id(plan.plan_id)


def test_paths_that_are_no_segment_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open"):
        Segment.open(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StorageError, match="not a segment"):
        Segment.open(tmp_path / "text")
    Segment.create(tmp_path / "s", 1).close()
    with pytest.raises(StorageError, match="cannot create"):
        Segment.create(tmp_path / "s", 1)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with pytest.raises(StorageError, match="cannot open"):
        Segment.open(tmp_path / "link")
    with pytest.raises(StorageError, match="cannot hold segments"):
        Segment.create(tmp_path / "absent" / "s", 1)
    with pytest.raises(UsageError, match="-1 bytes"):
        Segment.create(tmp_path / "t", -1)


def test_a_folder_without_space_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(StorageError, match=rf"needs {HEADER_NBYTES + 50_000} bytes.*40960 free.*--shm-size"):
        Segment.create(tmp_path / "s", 50_000)


def test_space_that_vanishes_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    segment = Segment.create(tmp_path / "s", 10)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"no space for .*ray-ckpt clean"):
        Segment.create(tmp_path / "t", 10)
    assert not (tmp_path / "t").exists()
    with segment:
        with pytest.raises(StorageError, match="no space"), segment.fill(SAVE):
            segment.seal(b"{}")
        assert segment.state is SegmentState.EMPTY


def test_the_default_folder_is_this_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray_ckpt.snapshot.folder._BASE", tmp_path)
    folder = default_folder("run")
    assert folder == tmp_path / f"ray_ckpt-{os.getuid()}" / "run"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(StorageError, match="mode 0700"):
        default_folder("run")


def sealed(segment: Segment) -> int:
    """Fill it with a pattern and seal it; its fill count."""
    with segment.fill(SAVE):
        segment.data[:] = bytes(range(250)) * 40
        segment.seal(b'{"entries":[],"writers":[],"writer_base":0,"digests":{},"save":' + b"{}}", keep=True)
    return segment.fills


def test_what_is_lent_is_the_borrowers_own_and_stays(segment: Segment) -> None:
    fills = sealed(segment)
    whole = bytes(segment.data)
    first, second = segment.lend(fills), segment.lend(fills)
    assert first is not None
    assert second is not None
    assert first == second == whole
    first[0] = 99
    assert (first[0], second[0], segment.data[0]) == (99, 0, 0)
    segment.close()
    assert reclaim(segment.path), "who borrows locks nothing"
    assert not segment.path.exists()
    assert second == whole
    assert first[1:] == whole[1:]


@pytest.mark.parametrize("released", [True, False])
def test_what_is_lent_is_never_filled_again(segment: Segment, released: bool) -> None:
    fills = sealed(segment)
    assert not segment.lent
    view = segment.lend(fills)
    with Segment.open(segment.path, writable=True) as other:
        assert other.lent
        if released:
            other.release()
        with pytest.raises(SaveError, match="a restored state lies in it"), other.fill(SAVE):
            pass
    assert view == segment.data


def test_another_fill_is_not_lent(segment: Segment) -> None:
    fills = sealed(segment)
    assert segment.lend(fills + 1) is None
    with segment.fill(SAVE):
        assert segment.lend(segment.fills) is None
    assert segment.lend(segment.fills) is None
    assert not segment.lent
    sealed(segment)
    assert segment.lend(fills) is None


def test_what_cannot_be_mapped_once_more_is_not_lent(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    fills = sealed(segment)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(segment_module.mmap, "mmap", refuse)
    assert segment.lend(fills) is None


KILLED_IN_MAKING = """
import os, signal, sys
from ray_ckpt.snapshot import Segment
os.posix_fallocate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Segment.create(sys.argv[1], 10_000)
"""


def test_a_process_killed_while_it_makes_a_segment_leaves_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED_IN_MAKING, str(tmp_path / "s")], env=env, timeout=60)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []
    Segment.create(tmp_path / "s", 10_000).close()
    with pytest.raises(StorageError, match="File exists"):
        Segment.create(tmp_path / "s", 20_000)
    with Segment.open(tmp_path / "s") as found:
        assert found.data_nbytes == 10_000


def test_where_files_need_a_name_one_that_is_not_made_whole_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return open_file(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    Segment.create(tmp_path / "s", 10_000).close()
    with pytest.raises(StorageError, match="File exists"):
        Segment.create(tmp_path / "s", 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
