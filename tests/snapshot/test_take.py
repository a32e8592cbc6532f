"""The copy into a segment: exact, whole, and of what was there when it was called."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.bundle import crc32c, decode_strings, dtype_of
from ray_ckpt.errors import SaveError
from ray_ckpt.leaves import PerWorker, Slice
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.plan import make_plan
from ray_ckpt.snapshot import Segment, SegmentState, SegmentTooSmallError, take_snapshot
from ray_ckpt.snapshot import take as take_module
from ray_ckpt.types import IN_PART

from .helpers import save_id, snapshots


def contents(segments: list[Segment]) -> dict[str, Any]:
    """All tensors that the segments hold together, read from their tables and bytes alone."""
    out: dict[str, Any] = {}
    for segment in segments:
        for entry in segment.table().entries:
            raw = bytes(segment.data[entry.start : entry.start + entry.nbytes])
            if entry.dtype == "string":
                array = np.empty(entry.box.shape, object)
                array.reshape(-1)[:] = decode_strings(raw, entry.box.size)
            else:
                array = np.frombuffer(raw, dtype_of(entry.dtype)).reshape(entry.box.shape)
            whole = out.setdefault(entry.name, np.zeros(entry.shape, dtype_of(entry.dtype)))
            whole[entry.box.slices] = array
    return out


def test_every_kind_of_leaf_lies_in_the_segment(tmp_path: Path) -> None:
    nan = np.array([0x7FC0_1234, 0xFF80_0001], np.uint32).view(np.float32)
    state = {
        "nan": nan,
        "big_endian": np.arange(300_000).astype(">i8"),
        "strided": np.arange(600_000.0).reshape(1000, 600)[::2, ::-3],
        "odd": np.arange(3, dtype=np.int8),
        "unaligned": np.arange(400_000, dtype=np.float64),
        "scalar": 7,
        "none": None,
        "empty": np.zeros((0, 3)),
        "text": np.array([["a", "grüße"]], object),
        "bytes": b"\0\xff",
        "own": PerWorker(1.5),
    }
    _, segments = snapshots(tmp_path, [state])
    got = contents(segments)
    assert got.pop("nan").tobytes() == nan.tobytes()
    assert got.pop("text").tolist() == [[b"a", "grüße".encode()]]
    assert got.pop("bytes")[()] == b"\0\xff"
    assert got.pop("own/.per_worker/00000-of-00001") == 1.5
    assert set(got) == {"big_endian", "strided", "odd", "unaligned", "scalar", "empty"}
    for name, array in got.items():
        np.testing.assert_array_equal(array, state[name])


def test_ranks_share_replicas_and_slices(tmp_path: Path) -> None:
    big = np.arange(4096.0).reshape(64, 64)
    states = [
        {"big": big, "w": Slice(big[rank * 32 : rank * 32 + 32], (64, 64), (rank * 32, 0)), "n": 3} for rank in range(2)
    ]
    plan, segments = snapshots(tmp_path, states, cut_nbytes=1000)
    assert sum(rank.fixed_nbytes for rank in plan.ranks) == 2 * big.nbytes + 8
    got = contents(segments)
    np.testing.assert_array_equal(got["big"], big)
    np.testing.assert_array_equal(got["w"], big)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_copy_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(take_module, "_LARGE_NBYTES", 64)
    monkeypatch.setattr(take_module, "_PARALLEL_NBYTES", 64)
    monkeypatch.setattr(take_module, "_CHUNK_NBYTES", 1000)
    state = {
        "a": np.arange(5000.0),
        "swapped": np.arange(5000.0).reshape(50, 100).astype(">f8"),
        "t": np.arange(5000).reshape(50, 100).T,
        "zero": np.float64(3),
    }
    layout, values = layout_of(state, 0, 1)
    (plan,) = make_plan([layout]).ranks
    with Segment.create(tmp_path / "s", plan.fixed_nbytes) as segment:
        take_snapshot(segment, plan, layout, values, save_id(plan.plan_id), threads=threads)
        for name, array in contents([segment]).items():
            np.testing.assert_array_equal(array, state[name])


def test_a_thread_that_fails_fails_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = take_module._run

    def failing(moves: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        run(moves)

    monkeypatch.setattr(take_module, "_LARGE_NBYTES", 64)
    monkeypatch.setattr(take_module, "_PARALLEL_NBYTES", 64)
    monkeypatch.setattr(take_module, "_run", failing)
    with pytest.raises(MemoryError):
        snapshots(tmp_path, [{"a": np.arange(5000.0)}])
    with Segment.open(tmp_path / "0") as segment:
        assert segment.state is SegmentState.EMPTY


def test_the_state_may_change_once_it_returns(tmp_path: Path) -> None:
    array = np.ones(100_000)
    _, segments = snapshots(tmp_path, [{"a": array}])
    array[:] = 2
    np.testing.assert_array_equal(contents(segments)["a"], 1)


def test_jax_shards_are_copied_into_place(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2] or jax.devices()), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    _, segments = snapshots(tmp_path, [{"w": jax.device_put(values, sharding)}])
    np.testing.assert_array_equal(contents(segments)["w"], values)


def test_a_segment_that_is_too_small_says_what_is_needed(tmp_path: Path) -> None:
    layout, values = layout_of({"a": np.zeros(100), "s": "x" * 50}, 0, 1)
    (plan,) = make_plan([layout]).ranks
    with Segment.create(tmp_path / "s", 800) as segment:
        with pytest.raises(SegmentTooSmallError, match="needs 855 bytes, the segment holds 800") as caught:
            take_snapshot(segment, plan, layout, values, save_id(plan.plan_id))
        assert caught.value.needed_nbytes == 855
        assert segment.state is SegmentState.EMPTY


def test_a_plan_of_another_state_or_rank_is_refused(tmp_path: Path) -> None:
    layout, values = layout_of({"a": 1}, 0, 1)
    (plan,) = make_plan([layout]).ranks
    with Segment.create(tmp_path / "s", 800) as segment:
        for save in (save_id("another"), save_id(plan.plan_id, rank=1)):
            with pytest.raises(SaveError, match="plan again"):
                take_snapshot(segment, plan, layout, values, save)


def test_the_table_follows_the_plan_that_was_used(tmp_path: Path) -> None:
    for number, state in enumerate([{"a": 1, "s": "x"}, {"b": 2.0, "s": "xyz"}, {"a": 1, "s": "y"}]):
        _, (segment,) = snapshots(subfolder(tmp_path, number), [state])
        assert {entry.name for entry in segment.table().entries} == set(state)
        segment.close()


def subfolder(folder: Path, number: int) -> Path:
    made = folder / str(number)
    made.mkdir()
    return made


def digests(tmp_path: Path, states: list[Any], step: int, full: bool) -> list[dict[str, int]]:
    found = [layout_of(state, rank, len(states)) for rank, state in enumerate(states)]
    plan = make_plan([layout for layout, _ in found])
    out = []
    for mine, (layout, values) in zip(plan.ranks, found, strict=True):
        path = tmp_path / f"{mine.rank}-{step}-{full}"
        with Segment.create(path, mine.fixed_nbytes + 100) as segment:
            save = save_id(plan.plan_id, step, mine.rank, len(states))
            out.append(take_snapshot(segment, mine, layout, values, save, full_digests=full))
            assert segment.table().digests == segment.digests() == out[-1]
    return out


def test_replicas_have_equal_digests_and_others_do_not(tmp_path: Path) -> None:
    same = np.arange(100_000.0)
    first, second = digests(
        tmp_path,
        [
            {"same": same, "other": same, "s": "x", "n": 1, "mine": PerWorker(1)},
            {"same": same.astype(">f8"), "other": same + (same == 77_777), "s": "y", "n": 1, "mine": PerWorker(2)},
        ],
        0,
        True,
    )
    assert set(first) == set(second) == {"same", "other", "s", "n"}
    assert first["same"] == second["same"] == crc32c(same.data)
    assert {name for name in first if first[name] != second[name]} == {"other", "s"}


def test_samples_of_replicas_are_bounded_agree_and_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested = 0

    def counting(data: Any, crc: int = 0) -> int:
        nonlocal digested
        digested += memoryview(data).nbytes
        return crc32c(data, crc)

    monkeypatch.setattr(take_module, "crc32c", counting)
    state = {"a": np.arange(1_000_000.0).reshape(100, 100, 100), "b": np.arange(500_000.0)}
    changed = {"a": state["a"] + 1, "b": state["b"]}
    seen = set()
    for step in range(3):
        first, second = digests(tmp_path, [state, changed], step, False)
        a, b = "a" + IN_PART, "b" + IN_PART
        assert first.keys() == second.keys() == {a, b}
        assert first[b] == second[b]
        assert first[a] != second[a]
        seen.add(first[b])
    assert len(seen) == 3
    assert digested <= 3 * 2 * 2 * take_module._SAMPLES * take_module._SAMPLE_NBYTES


def test_all_of_many_replicas_are_sampled_in_turn(tmp_path: Path) -> None:
    state = {f"p{i}": float(i) for i in range(2000)}
    names = [digests(tmp_path, [state, state], step, False)[0] for step in range(4)]
    turns = [{name.removesuffix(IN_PART) for name in found} for found in names]
    assert set.union(*turns) == set(state)
    assert max(map(len, turns)) < 800
