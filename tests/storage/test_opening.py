"""From what users write to a store: canonical URLs, what is refused, and that no credential is shown."""

from __future__ import annotations

import builtins
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.errors import MissingExtraError, StorageError, UnsafeStoreError, UsageError
from ray_ckpt.storage import open_store
from ray_ckpt.storage.retry import is_transient
from ray_ckpt.storage.store import BackedStore
from ray_ckpt.storage.translate import redacted
from ray_ckpt.testing.faulty_store import ALWAYS, Fault, FaultyStore


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("/a/b", "file:///a/b"),
        ("/a/x/../b/", "file:///a/b"),
        ("file:///a/../b", "file:///b"),
        ("file:///a//b/./c/", "file:///a/b/c"),
        ("file:////a", "file:///a"),
        ("local:///a", "file:///a"),
        ("/with space/100%", "file:///with space/100%"),
        ("gs://bucket/run/", "gs://bucket/run"),
        ("gcs://bucket//run/x/..", "gs://bucket/run"),
        ("GS://bucket", "gs://bucket"),
        ("s3a://bucket/run", "s3://bucket/run"),
        ("memory://run", "memory://run"),
        ("memory:///run/", "memory://run"),
    ],
)
def test_one_place_has_one_url(written: str, canonical: str) -> None:
    assert open_store(written).url == canonical


def test_relative_paths_and_path_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("run").url == open_store(Path("run")).url == f"file://{tmp_path}/run"
    assert open_store(tmp_path / "x" / ".." / "run").url == f"file://{tmp_path}/run"


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "empty string"),
        ("gs://", "no bucket"),
        ("s3:///", "no bucket"),
        ("file://relative/path", "no absolute path"),
        ("simplecache::gs://b/x", "chains file systems"),
        ("gs:/bucket/run", r"did you mean gs://bucket/run\?"),
        ("s3:bucket/run", r"did you mean s3://bucket/run\?"),
        ("GCS:/b", r"did you mean GCS://b\?"),
        ("file:/a/b", r"did you mean file:///a/b\?"),
        ("memory:", r"did you mean memory://\.\.\.\?"),
        (None, "path or a URL .*found None"),
        (5, "path or a URL .*found 5"),
        (b"/x", "path or a URL .*found b'/x'"),
        ("nonsense://x", r"unknown scheme nonsense://: expected one of file://, memory://, gs://, s3://"),
    ],
)
def test_what_is_no_directory_is_refused(written: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        open_store(written)


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(UsageError, match="storage_options") as caught:
        open_store("s3://AKIA:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match="did you mean s3://") as caught:
        open_store("s3:/AKIA:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_a_colon_may_be_in_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("./gs:/x").url == f"file://{tmp_path}/gs:/x"
    assert open_store("run:5/x").url == f"file://{tmp_path}/run:5/x"


def test_other_file_systems_need_a_promise() -> None:
    with pytest.raises(UnsafeStoreError, match="single_coordinator=True"):
        open_store("ftp://host/run")
    store = open_store("dir://host/run", single_coordinator=True, storage_options={"path": "x"})
    assert not store.exclusive
    assert open_store("/a", single_coordinator=True).exclusive


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real: Callable[..., Any] = builtins.__import__

    def fake(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", fake)


@pytest.mark.parametrize(
    ("url", "package", "text"),
    [("s3://b", "s3fs", r"pip install ray_ckpt\[s3\]"), ("gs://b", "gcsfs", "pip install gcsfs")],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str, text: str) -> None:
    without(monkeypatch, package)
    with pytest.raises(MissingExtraError, match=text):
        open_store(url)


def test_a_missing_package_of_another_file_system_is_named() -> None:
    with pytest.raises(MissingExtraError, match="adlfs"):
        open_store("abfs://container/run", single_coordinator=True)


def test_a_pickled_store_keeps_everything() -> None:
    store = open_store("dir://host/run", single_coordinator=True, storage_options={"path": "x"})
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, again.exclusive, again.options) == (store.url, False, {"path": "x"})
    assert isinstance(again, BackedStore)


OPTIONS = {"key": "AKIAEXAMPLE", "client_kwargs": {"aws_session_token": "tokentoken"}, "project": "shown"}
OPTIONS |= {"secret": "slash/and+plus", "connection_string": "AccountName=a;AccountKey=bbbb=="}
OPTIONS |= {"credential": [b"bytesbytes", {"x": "unnamed", "private_key": "cccc"}]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("denied for AKIAEXAMPLE of shown", "denied for *** of shown"),
        ("header tokentoken", "header ***"),
        ("http://user:pw@host/x?y=1", "http://***@host/x?y=1"),
        ("GET /x?X-Amz-Signature=abc&y=1", "GET /x?X-Amz-Signature=***&y=1"),
        ("https://x.blob/y?sv=1&sig=ab%3D&se=2", "https://x.blob/y?sv=1&sig=***&se=2"),
        ("https://ghp_token@host/x, gs://bucket/a@b", "https://***@host/x, gs://bucket/a@b"),
        ("with slash%2Fand%2Bplus or slash/and+plus", "with *** or ***"),
        ("AccountName=a;AccountKey=bbbb== and bytesbytes and cccc", "*** and *** and ***"),
        ("nothing here", "nothing here"),
    ],
)
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert redacted(text, OPTIONS) == shown


def test_no_credential_is_in_an_error_or_its_trace(tmp_path: Path) -> None:
    inner = open_store(tmp_path, storage_options=OPTIONS)
    plan = [Fault("read", "before", error=lambda: ValueError("bad key AKIAEXAMPLE"))]
    with pytest.raises(StorageError, match=r"bad key \*\*\*") as caught:
        FaultyStore(inner, plan).read("x")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "AKIA" not in repr(inner)


def test_the_cause_is_kept_where_it_shows_nothing(tmp_path: Path) -> None:
    plan = [Fault("read", "before", error=lambda: ValueError("odd"))]
    with pytest.raises(StorageError, match=r"read 'x' in file://.*ValueError: odd") as caught:
        FaultyStore(open_store(tmp_path), plan).read("x")
    assert isinstance(caught.value.__cause__, ValueError)


def test_transient_errors_are_retried_and_others_are_not(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("x", b"1")
    attempts = FaultyStore(store).faults.attempts
    for times, calls in ((1, 2), (attempts - 1, attempts)):
        faulty = FaultyStore(store, [Fault("read", "before", times=times)])
        assert faulty.read("x") == b"1"
        assert len(faulty.calls) == calls
    faulty = FaultyStore(store, [Fault("read", "before", times=ALWAYS)])
    with pytest.raises(StorageError, match=r"still failing after 6 tries in \d+\.\d s: .*ConnectionResetError"):
        faulty.read("x")
    assert len(faulty.calls) == attempts
    faulty = FaultyStore(store, [Fault("read", "before", error=PermissionError)])
    with pytest.raises(StorageError, match="not permitted"):
        faulty.read("x")
    assert len(faulty.calls) == 1


def http_error(code: object) -> Exception:
    error = Exception("service")
    error.code = code  # type: ignore[attr-defined]
    return error


def library_error(package: str, name: str) -> Exception:
    base = type(name, (Exception,), {"__module__": f"{package}.errors"})
    error: Exception = type("Derived", (base,), {})()
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(16, "SlowDown"), True),
        (OSError(5, "ConditionalRequestConflict"), True),
        (http_error(503), True),
        (http_error("429"), True),
        (http_error(403), False),
        (library_error("aiohttp", "ClientError"), True),
        (library_error("botocore", "HTTPClientError"), True),
        (library_error("botocore", "FlexibleChecksumError"), True),
        (library_error("gcsfs", "ChecksumError"), True),
        (library_error("other", "ClientError"), False),
        (FileNotFoundError(), False),
        (FileExistsError(), False),
        (PermissionError(), False),
        (OSError(28, "full"), False),
        (ValueError(), False),
    ],
)
def test_what_is_transient(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


def test_a_truncating_fault_is_seen_as_damage(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    FaultyStore(store, [Fault("put", "truncate")]).put("x", b"1234")
    assert store.read("x") == b"12"
    assert os.path.getsize(tmp_path / "x") == 2
