"""What only a real server shows: replies lost on the wire, buckets that are not there, forks, refusals."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ray_ckpt.errors import StorageError, UnsafeStoreError
from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.servers import Server, gcs_server
from tests.storage.proxy import Decide, proxy


@pytest.fixture(params=["gcs", "s3"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@contextmanager
def behind_proxy(server: Server, decide: Decide) -> Iterator[tuple[Store, Store]]:
    """One store through the proxy, and one on the same directory beside it."""
    url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}") + "/run"
    with proxy(server.endpoint, decide) as endpoint:
        through = open_store(url, storage_options={**server.storage_options, "endpoint_url": endpoint})
        yield through, open_store(url, storage_options=server.storage_options)


class DropConditional:
    """Drops the replies of the first conditional writes."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.dropped = 0

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> str:
        conditional = "ifGenerationMatch" in path or "if-none-match" in headers or "if-match" in headers
        if not conditional or self.dropped >= self.left:
            return "pass"
        self.dropped += 1
        return "drop"


def test_the_reply_of_a_creation_is_lost(server: Server) -> None:
    drop = DropConditional(1)
    with behind_proxy(server, drop) as (through, beside):
        assert through.put_if_absent("x", b"mine")
        assert drop.dropped == 1
        assert beside.read("x") == b"mine"
        assert not through.put_if_absent("x", b"another")


def test_the_reply_of_a_lost_race_is_lost(server: Server) -> None:
    drop = DropConditional(1)
    with behind_proxy(server, drop) as (through, beside):
        beside.put("x", b"theirs")
        assert not through.put_if_absent("x", b"mine")
        assert drop.dropped == 1
        assert beside.read("x") == b"theirs"


def test_the_reply_of_a_swap_is_lost(server: Server) -> None:
    drop = DropConditional(1)
    with behind_proxy(server, drop) as (through, beside):
        beside.put("x", b"old")
        held = through.read_versioned("x")
        assert held is not None
        assert through.replace_if("x", b"new", held[1])
        assert drop.dropped == 1
        assert beside.read("x") == b"new"
        assert not through.replace_if("x", b"newer", held[1])


def test_a_service_that_ignores_conditions_is_unsafe(s3: Server) -> None:
    with (
        behind_proxy(s3, lambda *_: "strip") as (through, _),
        pytest.raises(UnsafeStoreError, match="does not honour exclusive creation"),
    ):
        through.check()


def test_a_bucket_that_is_not_there(server: Server) -> None:
    store = open_store(f"{server.scheme}://no-such-bucket/run", storage_options=server.storage_options)
    with pytest.raises(StorageError, match=f"{server.scheme}://no-such-bucket/run: the bucket .*create it"):
        store.check()
    with pytest.raises(StorageError, match="create it"):
        store.put("x", b"1")
    assert store.list("") == []


def test_a_server_that_is_not_there_is_named() -> None:
    options = {"endpoint_url": "http://127.0.0.1:1", "key": "k" * 8, "secret": "s" * 8}
    store = open_store("s3://bucket/run", storage_options=options)
    store.backend.attempts = 1  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="read 'x' in s3://bucket/run: still failing"):
        store.read("x")


def test_without_credentials_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(StorageError, match="no credentials were found"):
        open_store("gs://bucket/run").read("x")


def _read(store: Store, path: str, sender: multiprocessing.connection.Connection) -> None:
    sender.send(store.read(path))


def test_a_store_in_use_survives_a_fork(server: Server) -> None:
    url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}")
    store = open_store(url, storage_options=server.storage_options)
    store.put("x", b"1")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_read, args=(store, "x", sender))
    child.start()
    try:
        assert receiver.poll(60), "the forked process hangs"
        assert receiver.recv() == b"1"
        assert store.read("x") == b"1"
    finally:
        child.kill()
        child.join()


def test_a_bucket_can_be_the_directory(server: Server) -> None:
    url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}")
    store = open_store(url, storage_options=server.storage_options)
    store.put("a/x", b"1")
    assert [info.path for info in store.list("")] == ["a/x"]
    assert store.url == url


def test_a_server_ends_with_its_block() -> None:
    with gcs_server() as server:
        assert server.process.poll() is None
    assert server.process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)
