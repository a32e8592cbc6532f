"""Pointers: what a report leaves with Ray Train, and the way from there to the data. No cluster, no training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import GcsFileSystem
from ray.train import Checkpoint

import ray_ckpt
from ray_ckpt.errors import DamagedError, NoCheckpointError, UsageError
from ray_ckpt.log import live_checkpoints
from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.servers import gcs_server
from ray_ckpt.train import Pointer
from ray_ckpt.train.pointer import FILE, write
from tests.restore.make import commit, record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run's directory with steps 3 and 5."""
    store = open_store(tmp_path / "run")
    for step in (3, 5):
        commit(store, step, {"w": np.full(4, step, np.float32)})
    return store


def pointing(folder: Path, pointer: Pointer) -> Checkpoint:
    """Ray Train's checkpoint with this pointer."""
    folder.mkdir(exist_ok=True)
    write(pointer, str(folder))
    return Checkpoint.from_directory(folder)


def test_a_pointer_comes_back_as_it_was_and_loads_its_own_step(store: Store, tmp_path: Path) -> None:
    pointer = Pointer(store.url, 3, "model.ckpt-3", 1, {"token": "a secret"})
    checkpoint = pointing(tmp_path / "p", pointer)
    found = ray_ckpt.from_train(checkpoint)
    assert found == pointer
    assert "secret" not in Path(checkpoint.path, FILE).read_text() + repr(pointer)
    assert found.path == f"{tmp_path}/run/model.ckpt-3"
    np.testing.assert_array_equal(found.load(names=["w"])["w"], np.full(4, 3, np.float32))
    assert Pointer("gs://bucket/run", 3, "model.ckpt-3", 1).path == "gs://bucket/run/model.ckpt-3"


def test_a_pointer_whose_data_was_deleted_says_what_is_there(store: Store, tmp_path: Path) -> None:
    pointer = ray_ckpt.from_train(pointing(tmp_path / "p", Pointer(store.url, 3, "model.ckpt-3", 1)))
    kept = [checkpoint for checkpoint in live_checkpoints(store) if checkpoint.step == 5]
    record(store, kept)
    with pytest.raises(NoCheckpointError, match=r"model\.ckpt-3 in file://.*, was deleted by retention.*steps 5"):
        pointer.load()
    again = Pointer(store.url, 5, "e2-1/model.ckpt-5", 2)
    with pytest.raises(NoCheckpointError, match=r"e2-1/model\.ckpt-5 .*, of start 2,.* replaced.*steps 5"):
        again.load()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(NoCheckpointError, match="nor is any other checkpoint: was the directory moved or deleted"):
        pointer.load()


def test_what_is_no_pointer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none was committed before the last"):
        ray_ckpt.from_train(None)
    with pytest.raises(UsageError, match=r"needs a ray\.train\.Checkpoint such as .*found '/tmp/x'"):
        ray_ckpt.from_train("/tmp/x")
    (tmp_path / "model.pt").touch()
    with pytest.raises(NoCheckpointError, match=r"is no checkpoint of ckpt\.report.*it holds model\.pt"):
        ray_ckpt.from_train(Checkpoint.from_directory(tmp_path))
    with pytest.raises(NoCheckpointError, match="deleted by num_to_keep"):
        ray_ckpt.from_train(Checkpoint.from_directory(tmp_path / "gone"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"url": "gs://b/r"}', '{"url": "", "step": 1, "prefix": "p", "generation": 1}']
)
def test_a_damaged_pointer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DamagedError, match=rf"{tmp_path}/{FILE} is not a pointer"):
        ray_ckpt.from_train(Checkpoint.from_directory(tmp_path))


def test_how_ray_reaches_its_storage_is_how_the_data_beside_it_is_reached() -> None:
    with gcs_server() as server:
        bucket = server.make_bucket("bucket")
        store = open_store(f"{bucket}/exp/ray_ckpt", storage_options=server.storage_options)
        commit(store, 3, {"w": np.arange(4)})
        host = server.endpoint.removeprefix("http://")
        filesystem = GcsFileSystem(anonymous=True, endpoint_override=host, scheme="http")
        exp = open_store(f"{bucket}/exp", storage_options=server.storage_options)
        for name, url in [("beside", store.url), ("elsewhere", "file:///tmp/other")]:
            exp.put(f"{name}/{FILE}", _text(url))
        found = ray_ckpt.from_train(Checkpoint("bucket/exp/beside", filesystem))
        np.testing.assert_array_equal(found.load()["w"], np.arange(4))
        other = ray_ckpt.from_train(Checkpoint("bucket/exp/elsewhere", filesystem))
        assert other.storage_options == {}


def _text(url: str) -> bytes:
    content: dict[str, Any] = {"url": url, "step": 3, "prefix": "model.ckpt-3", "generation": 1}
    return str(content).replace("'", '"').encode()
