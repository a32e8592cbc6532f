"""The conformance suite on every kind of store: real files, real servers, and the wrapper without faults."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.faulty_store import FaultyStore
from ray_ckpt.testing.store_suite import StoreSuite


class TestLocal(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(tmp_path / "not made yet" / "run")


class TestMemory(StoreSuite):
    processes = False

    @pytest.fixture
    def store(self) -> Store:
        return open_store(f"memory://{uuid.uuid4().hex}/run")


class TestGcs(StoreSuite):
    @pytest.fixture
    def store(self, gcs_store: Store) -> Store:
        return gcs_store


class TestS3(StoreSuite):
    @pytest.fixture
    def store(self, s3_store: Store) -> Store:
        return s3_store


class TestFaultyWithoutFaults(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return FaultyStore(open_store(tmp_path / "run"))

    def reopen(self, store: Store) -> Store:
        return FaultyStore(pickle.loads(pickle.dumps(store)))


class UnknownFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A file system that this package has no backend for."""

    protocol = "unheard"
    store: dict[str, object] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012


class TestGeneric(StoreSuite):
    exclusive = False
    processes = False

    @pytest.fixture
    def store(self) -> Store:
        fsspec.register_implementation("unheard", UnknownFileSystem, clobber=True)
        return open_store(f"unheard://{uuid.uuid4().hex}/run", single_coordinator=True)

    def test_a_written_object_appears_on_commit_only(self, store: Store) -> None:
        pytest.skip("fsspec promises no such thing of file systems in general")

    def test_an_exception_aborts(self, store: Store) -> None:
        pytest.skip("the old object is replaced from the first byte on")
