"""Reading a checkpoint from real servers that have bad times, and one that was damaged there: right bytes or an error
that names file and tensor.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np
import pytest

from ray_ckpt.catalog import load
from ray_ckpt.errors import DamagedError, StorageError
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import Store, open_store, retry
from ray_ckpt.testing.servers import gcs_server, s3_server
from tests.restore.make import commit, flip, random_bits, same_bits, truncate
from tests.storage.faults import ALWAYS, Line, Strike, line_to

ARRAYS = {
    "big": random_bits(np.dtype(np.float32), (1200, 1100), 7),
    "small": np.arange(7),
}
NEWEST = "model.ckpt-500"


@pytest.fixture(scope="module", params=[gcs_server, s3_server])
def module_line(request: pytest.FixtureRequest) -> Iterator[Line]:
    with request.param() as server, line_to(server) as line:
        yield line


@pytest.fixture
def line(module_line: Line, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    yield module_line
    module_line.clear()


@pytest.fixture
def store(line: Line) -> Store:
    """A directory beside the line with two checkpoints in it."""
    made = open_store(f"{line.url}/{uuid.uuid4().hex[:12]}", storage_options=line.server.storage_options)
    for step in (400, 500):
        commit(made, step, ARRAYS)
    return made


def on_data(method: str, path: str) -> bool:
    """A request for bytes of the newest one's data shards."""
    return method == "GET" and f"{NEWEST}.data" in path and "list-type" not in path


def read(line: Line, store: Store, step: int | None = None, timeout_s: float = 30.0) -> dict[str, np.ndarray]:
    return load(store.url, step, storage_options=line.options(timeout_s))


@pytest.mark.parametrize("what", ["503", "429", "reset", "cut"])
def test_a_restore_in_a_storm_has_the_right_bytes(line: Line, store: Store, what: str) -> None:
    strike = Strike(what, on_data, first=2, times=4)
    line.meeting(strike)
    found = read(line, store)
    assert strike.struck == 4
    assert all(same_bits(found[name], array) for name, array in ARRAYS.items())


def test_a_byte_that_flips_on_the_way_is_found_and_named(line: Line, store: Store) -> None:
    """On S3 by the client, which has the service's checksum of the whole object, so it is read again."""
    stored = open_checkpoint(store, NEWEST)
    path = stored.shard_path(stored.tensor("big").pieces[0].shard_id)
    told = rf"'{path}' in {store.url}"
    if line.server.scheme == "gs":
        told += " is damaged: tensor 'big'"
    line.meeting(Strike("flip", lambda method, target: on_data(method, target) and path in target, times=ALWAYS))
    with pytest.raises((DamagedError, StorageError), match=told):
        read(line, store, 500, timeout_s=8.0)


@pytest.mark.parametrize("module_line", [s3_server], indirect=True)
def test_a_byte_that_flips_once_on_the_way_from_s3_is_read_again(line: Line, store: Store) -> None:
    strike = Strike("flip", on_data)
    line.meeting(strike)
    found = read(line, store, 500)
    assert strike.struck == 1
    assert all(same_bits(found[name], array) for name, array in ARRAYS.items())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no shard", "no index"])
def test_what_was_damaged_in_the_bucket_is_named_and_an_older_one_taken(
    line: Line, store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    stored = open_checkpoint(store, NEWEST)
    path = stored.shard_path(stored.tensor("big").pieces[0].shard_id)
    told = rf"{path}.* tensor 'big'"
    if damage == "flipped":
        flip(store, path, 5000)
    elif damage == "truncated":
        truncate(store, path, store.size(path) - 1)
    elif damage == "no shard":
        store.delete(path)
        told = path
    else:
        store.delete(f"{NEWEST}.index")
        told = rf"{NEWEST}\.index"
    with pytest.raises(DamagedError, match=f"(?s){told}"):
        read(line, store, 500)
    found = read(line, store)
    assert all(same_bits(found[name], array) for name, array in ARRAYS.items())
    assert any(NEWEST in message for message in caplog.messages)


def test_a_restore_from_a_server_that_falls_silent_ends(line: Line, store: Store) -> None:
    line.meeting(Strike("hold", on_data, first=2, times=ALWAYS), timeout_s=8.0)
    with pytest.raises(StorageError, match=rf"'{NEWEST}\.data-.* in {store.url}: still failing after \d tr"):
        read(line, store, 500, timeout_s=8.0)
