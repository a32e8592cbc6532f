"""What only local files show: durability, leftovers, locks and the errors of the operating system."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ray_ckpt.errors import StorageError, UnsafeStoreError
from ray_ckpt.storage import Store, direct, open_store
from ray_ckpt.storage.local import TEMPORARY


class Syncs:
    """Counts fsync calls and remembers what was synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = 0
        self.folders: list[str] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self.folders.append(os.readlink(f"/proc/self/fd/{fd}"))
        else:
            self.files += 1
        self._fsync(fd)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "a" / "run")


def stream(store: Store, path: str) -> None:
    with store.create(path) as writer:
        writer.write(b"x")


WRITES = {
    "put": lambda store, path: store.put(path, b"x"),
    "create": stream,
    "put_if_absent": lambda store, path: store.put_if_absent(path, b"x"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_reaches_the_disk_with_every_name_on_the_way(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    syncs = Syncs(monkeypatch)
    WRITES[write](store, "sub/x")
    new_parents = [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "run")]
    folder = str(tmp_path / "a" / "run" / "sub")
    assert (syncs.files, syncs.folders) == (1, [*new_parents, folder])
    WRITES[write](store, "sub/y")
    assert (syncs.files, syncs.folders) == (2, [*new_parents, folder, folder])


def test_replacing_and_deleting_reach_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", b"1")
    held = store.read_versioned("x")
    assert held is not None
    assert store.replace_if("x", b"2", held[1])  # makes the folder of the locks
    held = store.read_versioned("x")
    assert held is not None
    syncs = Syncs(monkeypatch)
    assert store.replace_if("x", b"3", held[1])
    assert (syncs.files, len(syncs.folders)) == (1, 1)
    store.delete("x")
    assert (syncs.files, len(syncs.folders)) == (1, 2)


@pytest.mark.parametrize("write", WRITES)
def test_the_file_is_synced_before_it_gets_its_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    visible = []
    fsync = os.fsync

    def look(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            visible.append((tmp_path / "a" / "run" / "x").exists())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", look)
    WRITES[write](store, "x")
    assert visible == [False]


@pytest.mark.parametrize("write", WRITES)
def test_a_failed_write_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    store.put("first", b"x")

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"'x' in file://.*/a/run: the file system is full: free space"):
        WRITES[write](store, "x")
    assert sorted(os.listdir(tmp_path / "a" / "run")) == ["first"]


def test_writes_are_finished_piece_by_piece(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:4]], at))
    store.put("x", b"0123456789")
    assert store.read_range("x", 0, 10) == b"0123456789"


@pytest.fixture(params=["nameless", "named"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files without a name until they are whole, and what stands in for them where the file system has none."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", 0)
    return str(request.param)


def test_a_killed_writer_leaves_nothing_that_anybody_meets(store: Store, tmp_path: Path, temporary: str) -> None:
    store.put("model.ckpt-5.index", b"x")
    writer = store.create("model.ckpt-5.data-00000-of-00001")
    writer.write(b"half")
    assert [info.path for info in store.list("")] == ["model.ckpt-5.index"]
    names = os.listdir(tmp_path / "a" / "run")
    left = [name for name in names if name.startswith(TEMPORARY)]
    assert len(left) == (1 if temporary == "named" else 0)
    assert list((tmp_path / "a" / "run").glob("*ckpt-5*")) == [tmp_path / "a" / "run" / "model.ckpt-5.index"]
    writer.abort()


def test_both_ways_to_write_do_the_same(store: Store, tmp_path: Path, temporary: str) -> None:
    store.put("a", b"old")
    store.put("a", b"new")
    assert store.put_if_absent("b", b"mine")
    assert not store.put_if_absent("b", b"other")
    writer = store.create("c")
    writer.write(b"half")
    writer.abort()
    assert (store.read("a"), store.read("b")) == (b"new", b"mine")
    assert sorted(os.listdir(tmp_path / "a" / "run")) == ["a", "b"]


MIB = 1 << 20


class Pages:
    """Bytes that start on a page, cut into pieces as a test likes; and which of them passed the page cache by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nbytes: int, *, refuse: bool = False) -> None:
        self.memory = mmap.mmap(-1, nbytes)
        self.memory[:] = np.random.default_rng(0).bytes(nbytes)
        self.direct: list[bool] = []
        self._refuse = refuse
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd: int, data: memoryview) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self.direct.append(direct)
        if direct and self._refuse:
            raise OSError(errno.EINVAL, "no direct I/O after all")
        return self._write(fd, data)

    def store(self, store: Store, cuts: list[int]) -> bytes:
        view = memoryview(self.memory)
        with store.create("x") as writer:
            for start, stop in pairwise([0, *cuts, len(view)]):
                writer.write(view[start:stop])
        view.release()
        return store.read("x")


@pytest.fixture
def disk(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of which the page cache can be passed by, whatever disk the tests run on."""
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        monkeypatch.setattr(direct, "_LOCAL_DISKS", {direct._file_system(fd)})
    except OSError:
        pytest.skip("this file system has no direct I/O")
    finally:
        os.close(fd)
    return store


@pytest.mark.parametrize(
    ("nbytes", "cuts", "expected"),
    [
        (2 * MIB, [MIB], [True, True]),
        (2 * MIB + 5, [MIB], [True, True, False]),
        (MIB + 4096, [MIB], [True, True]),
        (3 * MIB, [MIB, MIB + 7, 2 * MIB], [True, False, False, False]),
        (2 * MIB, [4096], [False, False]),
        (100, [], [False]),
    ],
)
def test_whole_pages_of_a_large_file_pass_the_page_cache_by(
    disk: Store, monkeypatch: pytest.MonkeyPatch, nbytes: int, cuts: list[int], expected: list[bool]
) -> None:
    pages = Pages(monkeypatch, nbytes)
    assert pages.store(disk, cuts) == pages.memory[:]
    assert pages.direct == expected


def test_a_disk_that_refuses_is_written_through_the_cache(disk: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(monkeypatch, 2 * MIB, refuse=True)
    assert pages.store(disk, [MIB]) == pages.memory[:]
    assert pages.direct == [True, False, False]


def test_a_file_system_over_a_network_is_written_through_the_cache(
    disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_LOCAL_DISKS", {0x6969})
    pages = Pages(monkeypatch, 2 * MIB)
    assert pages.store(disk, [MIB]) == pages.memory[:]
    assert pages.direct == [False, False]


def test_locks_are_not_listed(store: Store) -> None:
    store.put("x", b"1")
    held = store.read_versioned("x")
    assert held is not None
    store.replace_if("x", b"2", held[1])
    assert [info.path for info in store.list("")] == ["x"]


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/run"):
        with pytest.raises(StorageError, match="is a file, not a directory"):
            open_store(tmp_path / place).check()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EACCES, "not permitted"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "file system is full"),
        (errno.EDQUOT, "quota is used up"),
    ],
)
def test_check_says_why_the_directory_cannot_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match=rf"put_if_absent .* in file://.*/a/run: .*{remedy}"):
        store.check()


def test_a_file_system_without_hard_links_is_unsafe(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UnsafeStoreError, match="has no hard links or forbids them here"):
        store.check()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match=r"not permitted: give this user.*immutable") as caught:
        store.check()
    assert not isinstance(caught.value, UnsafeStoreError)
    assert "hard links" not in str(caught.value)
    monkeypatch.undo()
    assert store.list("") == []
