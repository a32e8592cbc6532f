"""A store in memory and records to put into it."""

from __future__ import annotations

import uuid

import pytest

from ray_ckpt.storage import Store, open_store


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")
