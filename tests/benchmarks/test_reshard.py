"""The benchmark of planning a reshard: its index is a real one, and its parts are all of each tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import reshard
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.restore.jobs import wanted_jobs
from ray_ckpt.storage import open_store


@pytest.mark.parametrize("parts", [(7, 1), (3, 5)])
def test_the_slices_are_in_the_index_and_all_of_them_are_planned(parts: tuple[int, int], tmp_path: Path) -> None:
    store = open_store(tmp_path)
    reshard.put_index(store, 3, parts)
    stored = open_checkpoint(store, reshard.PREFIX)
    assert [len(tensor.pieces) for tensor in stored.index.tensors.values()] == [parts[0] * parts[1]] * 3
    (whole,) = reshard.cut((1, 1))
    array = np.empty(whole.shape, np.int8)
    assert len(wanted_jobs(stored, [(name, whole, array) for name in stored.names])) == 3 * parts[0] * parts[1]


def test_every_number_of_workers_has_a_time() -> None:
    found = reshard.measure(2, (5, 1))
    assert len(found) == 1 + len(reshard.WORKERS)
    assert min(found) > 0
    assert all(
        tensors * parts[0] * parts[1] == pytest.approx(100_000, rel=0.01) for tensors, parts in reshard.CASES.values()
    )
