"""Faults between a store and its server: an operation does what it should, or fails within its time; never half."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import pytest

from ray_ckpt.errors import StorageError, UsageError
from ray_ckpt.storage import Store, gcs, open_store, remote, retry, s3
from ray_ckpt.testing.faulty_store import Fault, FaultyStore
from tests.storage.faults import ALWAYS, EachOnce, Line, Strike, is_object_read, is_upload, line_to

BLOCK_NBYTES = 5 << 20
"""The smallest part that S3 takes."""

LARGE = bytes(range(256)) * (6 << 12)
"""Two parts."""


@pytest.fixture(scope="module", params=["gcs", "s3"])
def module_line(request: pytest.FixtureRequest) -> Iterator[Line]:
    with line_to(request.getfixturevalue(request.param)) as line:
        yield line


@pytest.fixture
def line(module_line: Line) -> Iterator[Line]:
    yield module_line
    module_line.clear()


@pytest.fixture
def folder() -> str:
    """Where nobody else has objects."""
    return uuid.uuid4().hex[:12]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits between tries."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (remote, gcs, s3):
        monkeypatch.setattr(module, "BLOCK_NBYTES", BLOCK_NBYTES)


def put_if_absent(store: Store, folder: str) -> None:
    assert store.put_if_absent(f"{folder}/new", b"mine")


def swap(store: Store, folder: str) -> None:
    held = store.read_versioned(f"{folder}/old")
    assert held is not None
    assert store.replace_if(f"{folder}/old", b"new", held[1])


OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "put": lambda store, folder: store.put(f"{folder}/new", b"mine"),
    "put_if_absent": put_if_absent,
    "replace_if": swap,
    "read": lambda store, folder: store.read(f"{folder}/old"),
    "read_into": lambda store, folder: store.read_range(f"{folder}/old", 1, 4),
    "size": lambda store, folder: store.size(f"{folder}/old"),
    "list": lambda store, folder: store.list(folder),
    "delete": lambda store, folder: store.delete(f"{folder}/old"),
}
RESULTS = {"read": b"there was one", "read_into": b"here", "size": 13}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("what", ["503", "429", "reset"])
def test_a_storm_is_waited_out(line: Line, folder: str, what: str, name: str) -> None:
    line.beside.put(f"{folder}/old", b"there was one")
    storm = Strike(what, times=3)
    found = OPERATIONS[name](line.meeting(storm), folder)
    assert storm.struck == 3
    assert found == RESULTS.get(name, found)
    if name in ("put", "put_if_absent"):
        assert line.beside.read(f"{folder}/new") == b"mine"


@pytest.mark.parametrize("status", ["503", "429"])
@pytest.mark.parametrize("name", ["put", "read_into", "list"])
def test_a_service_that_asks_for_a_wait_gets_it(
    line: Line, folder: str, name: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.beside.put(f"{folder}/old", b"there was one")
    heard: list[float] = []
    original = retry.asked_s

    def asked_s(error: BaseException | None) -> float:
        heard.append(original(error))
        return 0.0

    monkeypatch.setattr(retry, "asked_s", asked_s)
    OPERATIONS[name](line.meeting(Strike(f"{status}:7")), folder)
    # gcsfs does not say.
    assert heard == [7.0 if line.url.startswith("s3") else 0.0]


class Asking(ConnectionError):
    """As botocore's errors carry a service's answer."""

    def __init__(self, after: str) -> None:
        self.response = {"ResponseMetadata": {"HTTPHeaders": {"retry-after": after}}}


@pytest.mark.parametrize(
    ("after", "least_s"),
    [("7", 7.0), ("3600", retry.LONGEST_ASKED_S), ("-3", 0.0), ("nan", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)],
)
def test_the_wait_that_is_asked_for_comes_before_ours(after: str, least_s: float) -> None:
    answers: list[Exception | None] = [Asking(after), None]
    waits: list[float] = []

    def call() -> None:
        error = answers.pop(0)
        if error is not None:
            raise error

    retry.retrying(call, "it", 3, 1000.0, sleep=waits.append)
    (waited,) = waits
    assert least_s <= waited <= least_s + 0.1


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_storm_without_an_end_is_an_error_that_tells_of_it(line: Line, folder: str, name: str) -> None:
    line.beside.put(f"{folder}/old", b"there was one")
    store = line.meeting(Strike("503", times=ALWAYS), timeout_s=1.0)
    last = "SlowDown|of the test|Service Unav|not done|no answer"
    told = rf"(?s)'{folder}.* in {line.url}: still failing after \d+ tries in \d.*({last})"
    with pytest.raises(StorageError, match=told):
        OPERATIONS[name](store, folder)
    assert [info.path for info in line.beside.list(folder)] == [f"{folder}/old"]
    assert line.beside.read(f"{folder}/old") == b"there was one"


@pytest.mark.parametrize("name", ["read", "read_into"])
def test_a_download_that_breaks_off_is_repeated(line: Line, folder: str, name: str) -> None:
    line.beside.put(f"{folder}/old", b"there" * 100_000)
    strike = Strike("cut", is_object_read, times=2)
    store = line.meeting(strike)
    found = store.read(f"{folder}/old") if name == "read" else store.read_range(f"{folder}/old", 0, 500_000)
    assert strike.struck == 2
    assert found == b"there" * 100_000


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_silent_server_is_asked_again(line: Line, folder: str, name: str) -> None:
    line.beside.put(f"{folder}/old", b"there was one")
    strike = Strike("hold")
    OPERATIONS[name](line.meeting(strike, timeout_s=4.0), folder)
    assert strike.struck == 1


@pytest.mark.parametrize("name", ["put_if_absent", "read_into", "list"])
def test_a_server_that_stays_silent_is_named(line: Line, folder: str, name: str) -> None:
    line.beside.put(f"{folder}/old", b"there was one")
    store = line.meeting(Strike("hold", times=ALWAYS), timeout_s=1.0)
    told = rf"{name[:4]}.*'{folder}.* in {line.url}: still failing after \d tr.* in \d.*(imeout|not done)"
    with pytest.raises(StorageError, match=told):
        OPERATIONS[name](store, folder)
    assert [info.path for info in line.beside.list(folder)] == [f"{folder}/old"]


@pytest.mark.parametrize("what", ["503", "429", "reset", "drop"])
@pytest.mark.usefixtures("small_blocks")
def test_an_upload_goes_on_after_faults(line: Line, folder: str, what: str) -> None:
    """At its start, at each of its parts, and on S3 at its completion."""
    faults = EachOnce(what)
    with unless_unsure(what, line), line.meeting(faults).create(f"{folder}/shard") as writer:
        for start in range(0, len(LARGE), 1 << 20):
            writer.write(LARGE[start : start + (1 << 20)])
            assert line.beside.list(folder) == []
    assert line.beside.read(f"{folder}/shard") == LARGE
    assert len(faults.struck) >= 3


def unless_unsure(what: str, line: Line) -> AbstractContextManager[None]:
    """A completion on S3 whose reply is lost may be told as a failure; the object is whole all the same."""
    return suppress(StorageError) if what == "drop" and line.server.scheme == "s3" else nullcontext()


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.usefixtures("small_blocks")
def test_permission_is_lost_in_the_middle_of_an_upload(line: Line, folder: str, first: int) -> None:
    strike = Strike("403", is_upload, first=first, times=ALWAYS)
    store = line.meeting(strike)
    told = rf"create '{folder}/shard' in {line.url}: not permitted: give this user"
    with pytest.raises(StorageError, match=told), store.create(f"{folder}/shard") as writer:
        writer.write(LARGE)
    assert line.beside.list(folder) == []
    assert strike.struck == 1, "it is of no use to ask again"
    if line.server.scheme == "s3":
        assert not pending_uploads(line.beside, folder)


def pending_uploads(store: Store, folder: str) -> list[str]:
    """Uploads that were begun on S3 and neither completed nor aborted: their parts are paid for."""
    backend = store.backend  # type: ignore[attr-defined]
    bucket = backend.root.partition("/")[0]
    found = backend.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    return [upload["Key"] for upload in found if f"/{folder}/" in upload["Key"]]


@pytest.mark.usefixtures("small_blocks")
def test_an_upload_to_a_server_that_falls_silent_ends(line: Line, folder: str) -> None:
    store = line.meeting(Strike("hold", is_upload, first=2, times=ALWAYS), timeout_s=1.0)
    told = rf"create '{folder}/shard' in {line.url}: still failing"
    with pytest.raises(StorageError, match=told), store.create(f"{folder}/shard") as writer:
        writer.write(LARGE)
    assert line.beside.list(folder) == []


@pytest.mark.parametrize("module_line", ["gcs"], indirect=True)
@pytest.mark.usefixtures("small_blocks")
def test_an_upload_that_has_become_too_long_is_an_error(line: Line, folder: str) -> None:
    store = line.meeting(Strike("twice", is_upload, first=2))
    with pytest.raises(StorageError, match=r"create .*Size mismatch"), store.create(f"{folder}/shard") as writer:
        writer.write(LARGE)


def test_a_call_that_hangs_below_is_given_up(tmp_path: Path) -> None:
    """As on a mounted file system whose server is gone: nothing ends such a call."""
    over = threading.Event()

    def hang() -> None:
        over.wait(60)

    open_store(tmp_path).put("x/old", b"there")
    store = open_store(tmp_path, storage_options={"timeout_s": 0.2})
    told = r" in file://.*: still failing after 1 try in \d+\.\d s: .*not done within 0\.\d s"
    for operation in OPERATIONS.values():
        with pytest.raises(StorageError, match=told):
            operation(FaultyStore(store, [Fault("*", "call", times=ALWAYS, hook=hang)]), "x")
    writer = FaultyStore(store, [Fault("write", "call", hook=hang)]).create("new")
    with pytest.raises(StorageError, match=r"create 'new' in .*not done within 0\.2 s"):
        writer.write(b"x")
    over.set()


@pytest.mark.parametrize("found", [0, -1, "10", True, float("inf"), None])
def test_a_time_that_is_none(tmp_path: Path, found: object) -> None:
    with pytest.raises(UsageError, match="timeout_s in storage_options must be a positive number"):
        open_store(tmp_path, storage_options={"timeout_s": found})
