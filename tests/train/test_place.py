"""From pyarrow's file systems to URLs and options of fsspec."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow.fs
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from pyarrow.fs import FSSpecHandler, GcsFileSystem, LocalFileSystem, PyFileSystem, S3FileSystem, SubTreeFileSystem

from ray_ckpt.errors import UsageError
from ray_ckpt.storage import open_store
from ray_ckpt.testing.servers import gcs_server, s3_server
from ray_ckpt.train import Place, place_of

KEYS = {"access_key": "an-id", "secret_key": "a-secret"}


def wrapped(protocol: str, **options: Any) -> PyFileSystem:
    return PyFileSystem(FSSpecHandler(fsspec.filesystem(protocol, skip_instance_cache=True, **options)))


@pytest.mark.parametrize(
    ("filesystem", "path", "expected"),
    [
        (LocalFileSystem(), "/runs/a", Place("file:///runs/a")),
        (SubTreeFileSystem("/runs", LocalFileSystem()), "a", Place("file:///runs/a")),
        (wrapped("file"), "/runs/a", Place("file:///runs/a")),
        (S3FileSystem(region="eu"), "bucket/a", Place("s3://bucket/a", {"client_kwargs": {"region_name": "eu"}})),
        (
            S3FileSystem(**KEYS, session_token="t", endpoint_override="127.0.0.1:9", scheme="http", region="here"),
            "bucket/a",
            Place(
                "s3://bucket/a",
                {
                    "key": "an-id",
                    "secret": "a-secret",
                    "token": "t",
                    "endpoint_url": "http://127.0.0.1:9",
                    "client_kwargs": {"region_name": "here"},
                },
            ),
        ),
        (
            S3FileSystem(anonymous=True, endpoint_override="https://minio.example", region="here"),
            "bucket/a",
            Place(
                "s3://bucket/a",
                {"anon": True, "endpoint_url": "https://minio.example", "client_kwargs": {"region_name": "here"}},
            ),
        ),
        (GcsFileSystem(), "bucket/a", Place("gs://bucket/a")),
        (
            GcsFileSystem(anonymous=True, endpoint_override="127.0.0.1:9", scheme="http", project_id="p"),
            "bucket/a",
            Place("gs://bucket/a", {"token": "anon", "endpoint_url": "http://127.0.0.1:9", "project": "p"}),
        ),
        (wrapped("gcs", token="anon"), "bucket/a", Place("gs://bucket/a", {"token": "anon"})),
        (wrapped("gcs", token="anon", asynchronous=False), "b/a", Place("gs://b/a", {"token": "anon"})),
        (wrapped("s3", key="an-id", secret="s"), "/bucket/a/", Place("s3://bucket/a", {"key": "an-id", "secret": "s"})),
        (SubTreeFileSystem("bucket/runs", GcsFileSystem()), "a", Place("gs://bucket/runs/a")),
        (
            PyFileSystem(FSSpecHandler(DirFileSystem("bucket/runs", fsspec.filesystem("gcs", token="anon")))),
            "a",
            Place("gs://bucket/runs/a", {"token": "anon"}),
        ),
    ],
)  # fmt: skip
def test_the_place_of_what_is_known(filesystem: pyarrow.fs.FileSystem, path: str, expected: Place) -> None:
    found = place_of(filesystem, path)
    assert (found.url, found.storage_options) == (expected.url, expected.storage_options)
    open_store(found.url, storage_options=found.storage_options)


class Odd(SimpleNamespace):
    """A file system of no known kind."""


class Settled:
    """Has the settings of an S3FileSystem that would ask a server when it is made."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __reduce__(self) -> tuple[Any, ...]:
        return Settled, (self._settings,)


Settled.__name__ = "S3FileSystem"


@pytest.mark.parametrize(
    ("filesystem", "text"),
    [
        (Odd(), "storage on a Odd at 'b/run'.*expected a local disk, S3, GCS"),
        (Settled({"role_arn": "arn:aws:iam::1:role/x"}), "'b/run' was opened with role_arn"),
        (Settled("another form"), "S3FileSystem at 'b/run', of a version of pyarrow that hides its settings"),
        (S3FileSystem(proxy_options="http://proxy:1", region="here"), "'b/run' was opened with proxy_options"),
        (GcsFileSystem(target_service_account="x@y"), "'b/run' was opened with target_service_account"),
        (
            PyFileSystem(FSSpecHandler(fsspec.get_filesystem_class("gcs")("a-project", token="anon"))),
            "positional arguments",
        ),
        (PyFileSystem(pyarrow.fs.FSSpecHandler(Odd())), "FSSpecHandler at 'b/run': only those"),
    ],
)
def test_what_cannot_be_handed_on_is_named(filesystem: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        place_of(filesystem, "b/run")


def test_no_secret_is_in_the_text_of_a_place() -> None:
    place = place_of(S3FileSystem(**KEYS, region="here"), "bucket/a")
    assert "secret" in str(place.storage_options)
    assert "secret" not in repr(place)


def test_what_one_side_writes_on_a_real_server_the_other_reads(tmp_path: Path) -> None:
    with s3_server() as s3, gcs_server() as gcs:
        options = s3.storage_options
        for server, filesystem in [
            (s3, S3FileSystem(
                access_key=options["key"], secret_key=options["secret"], region="eu-west-1", scheme="http",
                endpoint_override=s3.endpoint.removeprefix("http://"),
            )),
            (gcs, GcsFileSystem(anonymous=True, endpoint_override=gcs.endpoint.removeprefix("http://"), scheme="http")),
            (gcs, wrapped("gcs", **gcs.storage_options)),
        ]:  # fmt: skip
            bucket = server.make_bucket(f"bucket-{type(filesystem).__name__.lower()}")
            place = place_of(filesystem, f"{bucket.partition('//')[2]}/run")
            open_store(place.url, storage_options=place.storage_options).put("a", b"from here")
            with filesystem.open_input_stream(f"{place.url.partition('//')[2]}/a") as file:
                assert file.readall() == b"from here"
