"""Shards from segments, read back by plain TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt import writer as writer_module
from ray_ckpt.bundle import crc32c, decode_run, encode_partitioned, encode_run, merge_index
from ray_ckpt.errors import SaveError, StorageError
from ray_ckpt.leaves import Slice
from ray_ckpt.snapshot import Segment
from ray_ckpt.storage import ObjectWriter, Store, open_store
from ray_ckpt.types import Plan, ShardReport
from ray_ckpt.writer import write_shard

from .helpers import snapshots


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = tmp_path / "store"
    folder.mkdir()
    return open_store(f"file://{folder}")


def write(path: Any, plan: Plan, store: Store, local: int = 0, rank: int = 0, **changes: Any) -> ShardReport:
    number = plan.ranks[rank].writer_base + local
    arguments: dict[str, Any] = {
        "generation": 2,
        "step": 5,
        "plan_id": plan.plan_id,
        "writer": local,
        "store": store,
        "prefix": "model.ckpt-5",
        "shard_id": number,
        "num_shards": plan.num_writers + 1,
        "attempt": "e1-1",
        "attempt_try": 0,
    }
    return write_shard(path, **{**arguments, **changes})


def write_all(segments: list[Segment], plan: Plan, store: Store) -> list[ShardReport]:
    return [
        write(segment.path, plan, store, local, rank)
        for rank, segment in enumerate(segments)
        for local in range(len(plan.ranks[rank].writers))
    ]


def commit(reports: list[ShardReport], plan: Plan, store: Store) -> None:
    """The index, as the coordinator merges it."""
    partitioned = encode_run(
        sorted(
            (tensor.name.encode(), encode_partitioned(tensor.dtype, tensor.shape, tensor.boxes))
            for tensor in plan.tensors
            if len(tensor.boxes) > 1
        )
    )
    index = merge_index([*(report.run for report in reports), partitioned], plan.num_writers + 1)
    store.put("model.ckpt-5.index", index)


def test_tensorflow_reads_what_two_ranks_wrote(tmp_path: Path, store: Store) -> None:
    tf = pytest.importorskip("tensorflow")
    big = np.arange(3_000_000, dtype=np.float32).reshape(1500, 2000)
    states = [
        {
            "big": big,
            "w": Slice(big[:, rank * 1000 : (rank + 1) * 1000], big.shape, (0, rank * 1000)),
            "half": np.arange(7, dtype=np.float16),
            "text": np.array([["a", "b"], ["", "grüße"]], object),
            "n": 3,
            f"only{rank}": np.arange(5 + rank),
        }
        for rank in range(2)
    ]
    plan, segments = snapshots(tmp_path, states, cut_nbytes=1 << 20, min_writer_nbytes=1 << 20)
    assert plan.num_writers == 4
    reports = write_all(segments, plan, store)
    assert [report.writer for report in reports] == [0, 1, 2, 3]
    commit(reports, plan, store)
    reader = tf.train.load_checkpoint(str(tmp_path / "store" / "model.ckpt-5"))
    np.testing.assert_array_equal(reader.get_tensor("big"), big)
    np.testing.assert_array_equal(reader.get_tensor("w"), big)
    np.testing.assert_array_equal(reader.get_tensor("half"), np.arange(7))
    assert reader.get_tensor("text").tolist() == [[b"a", b"b"], [b"", "grüße".encode()]]
    assert reader.get_tensor("n") == 3
    np.testing.assert_array_equal(reader.get_tensor("only1"), np.arange(6))
    for segment in segments:
        segment.close()


def test_the_shard_is_the_range_of_the_segment(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_NBYTES", 1000)
    state = {"a": np.arange(1000.0), "b": np.arange(125.0), "c": np.arange(126.0), "s": "text"}
    plan, (segment,) = snapshots(tmp_path, [state], max_writers_per_rank=1)
    report = write(segment.path, plan, store)
    shard = store.read(report.path)
    assert report.path == "model.ckpt-5.data-00000-of-00002"
    assert len(shard) == report.nbytes == segment.data_nbytes
    assert shard == bytes(segment.data)
    assert [key for key, _ in decode_run(report.run)] == [b"a", b"b", b"c", b"s"]
    # Whole entries up to one chunk have no crcs of chunks.
    entries = {entry.name: entry for entry in segment.table().entries}
    expected = [
        crc32c(shard[at : min(at + 1000, entry.start + entry.nbytes)])
        for entry in (entries["a"], entries["c"])
        for at in range(entry.start, entry.start + entry.nbytes, 1000)
    ]
    assert np.frombuffer(report.chunks, "<u4").tolist() == expected
    segment.close()


def test_a_state_without_bytes_has_an_empty_shard(tmp_path: Path, store: Store) -> None:
    plan, (segment,) = snapshots(tmp_path, [{"z": np.zeros((0, 2))}])
    report = write(segment.path, plan, store)
    assert (report.nbytes, store.read(report.path)) == (0, b"")
    assert len(decode_run(report.run)) == 1
    segment.close()


@pytest.mark.parametrize("change", [{"generation": 3}, {"step": 6}, {"plan_id": "x"}, {"writer": 1}, {"writer": -1}])
def test_another_snapshot_is_refused(tmp_path: Path, store: Store, change: dict[str, Any]) -> None:
    plan, (segment,) = snapshots(tmp_path, [{"a": 1}])
    with pytest.raises(SaveError, match="has been replaced"):
        write(segment.path, plan, store, **change)
    assert store.list("") == []
    segment.close()


def test_a_missing_or_released_segment_is_an_error(tmp_path: Path, store: Store) -> None:
    plan, (segment,) = snapshots(tmp_path, [{"a": 1}])
    with pytest.raises(StorageError, match="cannot open"):
        write(tmp_path / "absent", plan, store)
    segment.release()
    with pytest.raises(SaveError, match="is empty"):
        write(segment.path, plan, store)
    segment.close()


class Interfering:
    """A store during whose first write something happens to the segment."""

    def __init__(self, store: Store, happens: Any) -> None:
        self.store = store
        self.happens = happens

    def create(self, path: str) -> ObjectWriter:
        target = self.store.create(path)
        write_first, happens = target.write, self.happens

        def write_then(data: Any) -> None:
            write_first(data)
            happens()

        target.write = write_then  # type: ignore[method-assign]
        return target


def refill(segment: Segment) -> None:
    table = os.pread(os.open(segment.path, os.O_RDONLY), 1 << 20, segment._table_at)
    save = segment.save
    assert save is not None
    segment.release()
    with segment.fill(save):
        segment.seal(table.rstrip(b"\0"))


@pytest.mark.parametrize("happens", [Segment.release, refill])
def test_a_snapshot_that_is_released_meanwhile_is_not_stored(tmp_path: Path, store: Store, happens: Any) -> None:
    plan, (segment,) = snapshots(tmp_path, [{"a": np.arange(1000)}])
    interfering: Any = Interfering(store, lambda: happens(segment))
    with pytest.raises(SaveError, match="step 5 was released"):
        write(segment.path, plan, interfering)
    assert store.list("") == []
    segment.close()


def test_a_failing_store_leaves_the_segment_free(tmp_path: Path, store: Store) -> None:
    plan, (segment,) = snapshots(tmp_path, [{"a": np.arange(1000)}])

    def fail() -> None:
        raise StorageError("disk full")

    failing: Any = Interfering(store, fail)
    with pytest.raises(StorageError, match="disk full"):
        write(segment.path, plan, failing)
    assert store.list("") == []
    assert write(segment.path, plan, store, attempt_try=1).attempt_try == 1
    segment.close()


class Recording(ObjectWriter):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def write(self, data: Any) -> None:
        assert isinstance(data, memoryview)
        self.sizes.append(data.nbytes)

    def commit(self) -> None: ...

    def abort(self) -> None: ...


def test_small_entries_are_written_together_and_large_ones_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_NBYTES", 1000)
    state = {"large": np.zeros(10_000, np.int8), **{f"s{i}": np.zeros(10, np.int8) for i in range(500)}}
    plan, (segment,) = snapshots(tmp_path, [state], max_writers_per_rank=1)
    recording = Recording()

    class Only:
        def create(self, path: str) -> ObjectWriter:
            return recording

    store: Any = Only()
    write(segment.path, plan, store)
    assert recording.sizes == [1000] * 15
    segment.close()
