"""Links and special files in a local directory: what is followed, and what nobody waits for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt.errors import StorageError, UnavailableError
from ray_ckpt.log import put_claim
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import Claim


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that is not of the directory."""
    path = tmp_path / "outside" / "file"
    path.parent.mkdir()
    path.write_bytes(b"outside")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def store(run: Path) -> Store:
    return open_store(run)


def test_a_link_to_a_file_is_read_as_that_file(store: Store, run: Path, outside: Path) -> None:
    (run / "link").symlink_to(outside)
    assert store.read("link") == b"outside"
    assert store.read_range("link", 3, 4) == b"side"
    assert (store.size("link"), [(i.path, i.nbytes) for i in store.list("")]) == (7, [("link", 7)])


def test_writing_takes_the_place_of_a_link(store: Store, run: Path, outside: Path) -> None:
    for name in ("put", "created", "replaced"):
        (run / name).symlink_to(outside)
    store.put("put", b"new")
    with store.create("created") as writer:
        writer.write(b"new")
    held = store.read_versioned("replaced")
    assert held is not None
    assert store.replace_if("replaced", b"new", held[1])
    for name in ("put", "created", "replaced"):
        assert not (run / name).is_symlink()
        assert (run / name).read_bytes() == b"new"
    assert outside.read_bytes() == b"outside"


@pytest.mark.parametrize("target", ["file", "missing"])
def test_nothing_is_created_through_a_link(store: Store, run: Path, outside: Path, target: str) -> None:
    (run / "x").symlink_to(outside.with_name(target))
    assert not store.put_if_absent("x", b"new")
    assert sorted(path.name for path in outside.parent.iterdir()) == ["file"]
    assert outside.read_bytes() == b"outside"


def test_only_the_link_is_removed(store: Store, run: Path, outside: Path) -> None:
    (run / "link").symlink_to(outside)
    store.delete("link")
    assert not os.path.lexists(run / "link")
    assert outside.read_bytes() == b"outside"


def test_a_linked_folder_is_not_listed(store: Store, run: Path, outside: Path) -> None:
    (run / "folder").symlink_to(outside.parent)
    (run / "here").write_bytes(b"")
    assert [info.path for info in store.list("")] == ["here"]


def test_what_is_no_file_is_not_listed_and_nobody_waits_for_it(store: Store, run: Path) -> None:
    os.mkfifo(run / "pipe")
    (run / "zero").symlink_to("/dev/zero")
    (run / "loop").symlink_to("loop")
    (run / "gone").symlink_to("missing")
    (run / "here").write_bytes(b"x")
    assert [info.path for info in store.list("")] == ["here"]
    for name in ("pipe", "zero", "loop"):
        with pytest.raises(StorageError, match=rf"read '{name}'"):
            store.read(name)
    for name in ("pipe", "zero"):
        with pytest.raises(StorageError, match="a pipe, socket or device"):
            store.read_range(name, 0, 1)


@pytest.mark.parametrize("name", ["checkpoint", "_ray_ckpt/log/00000000000000000001"])
def test_a_pipe_in_place_of_the_log_is_an_error(run: Path, name: str) -> None:
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(StorageError, match="a pipe"):
        ray_ckpt.checkpoints(run)


def test_a_claim_that_is_a_link_to_nowhere_is_an_error(store: Store, run: Path) -> None:
    folder = run / "_ray_ckpt" / "claims"
    folder.mkdir(parents=True)
    (folder / "model.ckpt-5").symlink_to("missing")
    with pytest.raises(UnavailableError, match="a link to nowhere"):
        put_claim(store, Claim("e1-1", 1, 1, 5, "model.ckpt-5", 3))
