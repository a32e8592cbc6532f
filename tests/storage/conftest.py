"""The two storage servers, started once for the whole folder, and an empty directory in each."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.servers import Server, gcs_server, s3_server


@pytest.fixture(scope="session")
def gcs() -> Iterator[Server]:
    with gcs_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    with s3_server() as server:
        yield server


def empty_directory(server: Server) -> Store:
    """A store in a new bucket, so that nobody else's objects are near."""
    url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:12]}")
    return open_store(f"{url}/runs/1", storage_options=server.storage_options)


@pytest.fixture
def gcs_store(gcs: Server) -> Store:
    return empty_directory(gcs)


@pytest.fixture
def s3_store(s3: Server) -> Store:
    return empty_directory(s3)
