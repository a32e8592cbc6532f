"""A store in memory, and units small enough that small arrays take every path."""

from __future__ import annotations

import uuid

import pytest

from ray_ckpt.restore import check, engine, reads, stored
from ray_ckpt.storage import Store, open_store

SMALL_CHUNK_NBYTES = 64


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 64 bytes, reads of 128, and only the smallest pieces packed; gives the size of a chunk."""
    for module in (check, engine, reads, stored):
        monkeypatch.setattr(module, "CHUNK_NBYTES", SMALL_CHUNK_NBYTES)
    monkeypatch.setattr(engine, "READ_NBYTES", 2 * SMALL_CHUNK_NBYTES)
    monkeypatch.setattr(reads, "PACKED_NBYTES", 32)
    monkeypatch.setattr(reads, "_GAP_NBYTES", 16)
    return SMALL_CHUNK_NBYTES
