"""Restores from segments: the same bits as from a store, verified by what is known of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_ckpt.agent import serving
from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.agent.mirror import mirror
from ray_ckpt.agent.serving import _Told, recall
from ray_ckpt.errors import DamagedError, ObjectMissingError
from ray_ckpt.restore import MappedSource, StoredCheckpoint, lent, open_snapshot, read_boxes
from ray_ckpt.snapshot import Segment, SegmentState, decode_table, in_use
from ray_ckpt.target import read_state
from ray_ckpt.types import Box
from ray_ckpt.writer import sum_up
from tests.agent.remembered import BIG, SAVE, folder, opened, parts_of, remember, states
from tests.system.states import plain, zeros_like


@pytest.fixture
def memories(tmp_path: Path) -> list[HostMemory]:
    return [HostMemory(folder(tmp_path, f"run-{name}")) for name in "ab"]


def segments(memories: list[HostMemory]) -> list[Path]:
    return [path for memory in memories for path in sorted(memory.folder.glob("*.segment"))]


def sum_all_up(memories: list[HostMemory]) -> None:
    for path in segments(memories):
        with Segment.open(path) as segment:
            sum_up(segment)


def restored(stored: StoredCheckpoint, rank: int, world: int) -> Any:
    like = zeros_like(states(world)[rank])
    return read_state(stored, like, rank=rank, world_size=world)()


@pytest.mark.parametrize("summed", [True, False])
def test_every_rank_gets_its_bits_back(memories: list[HostMemory], summed: bool) -> None:
    remember(memories, 2)
    if summed:
        sum_all_up(memories)
    stored = opened(parts_of(memories))
    assert {piece.crc is not None for t in stored.index.tensors.values() for piece in t.pieces} >= {summed}
    for rank in range(2):
        assert plain(restored(stored, rank, 2)) == plain(states(2)[rank])


@pytest.mark.parametrize("summed", [True, False])
def test_any_box_across_the_segments(memories: list[HostMemory], summed: bool) -> None:
    remember(memories, 2)
    if summed:
        sum_all_up(memories)
    whole = np.concatenate([state["big"].array for state in states(2)])
    box = Box((BIG[0] - 2, 12_345), (4, 700_000))
    out = np.zeros(box.shape, np.float32)
    part = Box((1_300_000,), (1_500_000,))
    more = np.zeros(part.shape, np.int32)
    read_boxes(opened(parts_of(memories)), [("big", box, out), ("replica", part, more)])
    assert np.array_equal(out, whole[box.slices])
    assert np.array_equal(more, np.arange(3_000_000, dtype=np.int32)[part.slices])


def taken(memories: list[HostMemory], save: tuple[int, int] = SAVE) -> Any:
    """The only rank's state as a restart takes it, which lets go of the segments after."""
    parts = parts_of(memories, save)
    sources = [MappedSource(part.path, part.fills) for part in parts]
    state = restored(open_snapshot("the memory of a test", parts, sources), 0, 1)
    for source in sources:
        source.close()
    return state


def remember_and_copy(source: HostMemory, target: HostMemory, step: int) -> None:
    """The only rank's snapshot of a step, and its copy."""
    remember([source], 1, step, keep=True)
    (part,) = source.parts((SAVE[0], step), "")
    layout = source.layout(source.sealed()[0].fingerprint)
    assert layout is not None
    mirror(target, part, layout, MappedSource(part.path, part.fills), None)


def is_in(array: Any, memories: list[HostMemory]) -> bool:
    """Whether an array lies in the memory of a segment."""
    address = array.__array_interface__["data"][0]
    names = {path.name for path in segments(memories)}
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, _, rest = line.partition("-")
            last, path = rest.split(" ", 1)
            if int(first, 16) <= address < int(last, 16):
                return Path(path.split()[-1].removesuffix("(deleted)")).name in names
    raise AssertionError("it lies nowhere")


def test_large_arrays_lie_in_the_snapshots_own_memory(memories: list[HostMemory]) -> None:
    remember(memories, 2, keep=True)
    sum_all_up(memories)
    one, other = (restored(opened(parts_of(memories)), 0, 2) for _ in range(2))
    assert is_in(one["big"].array, memories)
    assert not is_in(one["mine"].value, memories)
    one["big"].array[:] = 1.0
    for memory in memories:
        memory.remove()
    assert plain(other) == plain(states(2)[0]), "what one does with its state does not show in the other's"
    assert not one["big"].array.min() < 1.0


def test_a_part_that_is_wanted_twice_is_two_arrays(memories: list[HostMemory]) -> None:
    remember(memories[:1], 1, keep=True)
    stored = opened(parts_of(memories[:1]))
    (piece,) = stored.tensor("big").pieces
    first, second = lent(stored, "big", piece.box), lent(stored, "big", piece.box)
    assert first is not None
    assert second is None
    again = np.empty(piece.box.shape, np.float32)
    read_boxes(stored, [("big", piece.box, first), ("big", piece.box, again)])
    assert np.array_equal(first, states(1)[0]["big"].array)
    assert np.array_equal(again, first)


def test_only_whole_parts_are_lent(memories: list[HostMemory]) -> None:
    remember(memories[:1], 1, keep=True)
    stored = opened(parts_of(memories[:1]))
    assert lent(stored, "big", Box((1, 0), (2, BIG[1]))) is None
    assert lent(stored, "step", Box((), ())) is None


@pytest.mark.parametrize("free", [0.5, 1.5])
def test_nothing_is_lent_where_there_is_no_room_for_new_memory(
    memories: list[HostMemory], monkeypatch: pytest.MonkeyPatch, free: float
) -> None:
    remember(memories[:1], 2, keep=True)
    parts = parts_of(memories[:1])
    room = int(free * sum(part.nbytes for part in parts))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room, total=room))
    told = {"here": _Told(None, None, parts)}
    monkeypatch.setattr(serving, "_ask_all", lambda *_: told)
    with recall("url", SAVE, "", (("here",), ("here",)), "here") as stored:
        state = restored(stored, 0, 2)
    assert is_in(state["big"].array, memories) is (free > 1)
    assert [Segment.open(path).lent for path in segments(memories)] == [free > 1, False]
    assert plain(state) == plain(states(2)[0])


def test_a_state_in_lent_memory_outlives_the_snapshots_after_it(memories: list[HostMemory]) -> None:
    memory = memories[0]
    remember([memory], 1, keep=True)
    lent_name = memory.sealed()[0].name
    state = taken([memory])
    for step in (6, 7, 8):
        remember([memory], 1, step, keep=True)
        assert lent_name in {info.name for info in memory.sealed()}, "until a save needs no older one"
    (saved,) = (info for info in memory.sealed() if info.step == 8)
    memory.keep(saved)
    (first,) = (info for info in memory.sealed() if info.name == lent_name)
    memory.free(first, {0})
    assert not (memory.folder / lent_name).exists()
    assert plain(state) == plain(states(1)[0])


def test_a_lent_snapshot_that_is_not_needed_goes(memories: list[HostMemory]) -> None:
    memory = memories[0]
    remember([memory], 1)
    (info,) = memory.sealed()
    state = taken([memory])
    memory.free(info, {0})
    assert segments([memory]) == []
    assert plain(state) == plain(states(1)[0])


def test_of_lent_snapshots_the_newest_stays_until_it_is_freed(memories: list[HostMemory]) -> None:
    """A newer one that is kept may not be whole on all ranks."""
    memory = memories[0]
    for step in (5, 6):
        remember([memory], 1, step, keep=True)
        taken([memory], (SAVE[0], step))
    remember([memory], 1, 7)
    (saved,) = (info for info in memory.sealed() if info.step == 7)
    memory.keep(saved)
    assert sorted(info.step for info in memory.sealed()) == [6, 7]


def test_what_is_freed_after_it_was_lent_can_still_be_read(memories: list[HostMemory]) -> None:
    remember(memories[:1], 1, keep=True)
    stored = opened(parts_of(memories[:1]))
    (piece,) = stored.tensor("big").pieces
    array = lent(stored, "big", piece.box)
    assert array is not None
    (info,) = memories[0].sealed()
    memories[0].free(info, set())
    read_boxes(stored, [("big", piece.box, array)])
    assert np.array_equal(array, states(1)[0]["big"].array)


def test_copies_are_not_made_into_lent_memory(memories: list[HostMemory]) -> None:
    source, target = memories
    found = {}
    for step in (5, 6, 7, 8):
        remember_and_copy(source, target, step)
        found[step] = taken([target], (SAVE[0], step))
    assert sorted(info.step for info in target.sealed()) == [7, 8]
    assert len(segments([target])) == 2
    for state in found.values():
        assert plain(state) == plain(states(1)[0])


def flip(path: Path, value: float) -> None:
    """Change the one element of this value in a segment's data."""
    with Segment.open(path, writable=True) as segment:
        data = np.frombuffer(segment.data, np.uint8)
        at = bytes(segment.data).index(np.float32(value).tobytes())
        data.flags.writeable = True
        data[at] ^= 1
        del data


def test_a_changed_byte_is_noticed_where_checksums_are_known(memories: list[HostMemory]) -> None:
    remember(memories, 2)
    sum_all_up(memories)
    flip(segments(memories)[1], float(states(2)[1]["big"].array[1, 77]))
    stored = opened(parts_of(memories))
    with pytest.raises(DamagedError, match="tensor 'big'"):
        restored(stored, 1, 2)
    assert plain(restored(stored, 0, 2)["big"]) == plain(states(2)[0]["big"]), "of other chunks nothing is wrong"


def test_a_snapshot_that_is_filled_again_is_gone(memories: list[HostMemory]) -> None:
    remember(memories, 2, keep=True)
    stored = opened(parts_of(memories))
    with Segment.open(segments(memories)[0], writable=True) as segment:
        save = segment.save
        assert save is not None
        with segment.fill(save), pytest.raises(ObjectMissingError, match="overwritten"):
            restored(stored, 0, 2)
    assert parts_of(memories[:1]) == []


def test_parts_of_two_snapshots_are_not_put_together(memories: list[HostMemory]) -> None:
    remember(memories, 2)
    first = parts_of(memories)
    with pytest.raises(DamagedError, match="parts are of"):
        opened([first[0], first[0]])
    with pytest.raises(DamagedError):
        opened(first[:1])


def test_a_copy_holds_the_same_and_its_checksums(memories: list[HostMemory]) -> None:
    remember(memories[:1], 2, keep=True)
    source, target = memories
    for part in source.parts(SAVE, ""):
        layout = source.layout(next(i.fingerprint for i in source.sealed() if i.rank == part.rank))
        assert layout is not None
        mirror(target, part, layout, MappedSource(part.path, part.fills), None)
    copies = target.parts(SAVE, "")
    assert all(all(part.sums.known[: len(decode_table(part.table).writers)]) for part in copies)
    assert {(info.replica, info.kept) for info in target.sealed()} == {(True, True)}
    stored = opened(sorted(copies, key=lambda part: part.rank))
    for rank in range(2):
        assert plain(restored(stored, rank, 2)) == plain(states(2)[rank])


def test_two_copies_of_a_rank_at_most(memories: list[HostMemory]) -> None:
    source, target = memories
    for step in (5, 6, 7, 8):
        remember_and_copy(source, target, step)
    assert sorted(info.step for info in target.sealed()) == [7, 8]
    assert len(segments([target])) == 2


def test_a_copy_that_breaks_off_leaves_nothing(memories: list[HostMemory]) -> None:
    source, target = memories
    remember([source], 1, keep=True)
    (part,) = source.parts(SAVE, "")
    layout = source.layout(source.sealed()[0].fingerprint)
    assert layout is not None
    with pytest.raises(ObjectMissingError):
        mirror(target, part, layout, MappedSource(part.path, part.fills + 1), None)
    assert target.sealed() == []
    mirror(target, replace(part), layout, MappedSource(part.path, part.fills), 1e9)
    assert [info.step for info in target.sealed()] == [5]


def test_a_writer_leaves_its_checksums(memories: list[HostMemory]) -> None:
    remember(memories, 1)
    assert not any(parts_of(memories)[0].sums.known)
    with Segment.open(segments(memories)[0]) as segment:
        assert segment.state is SegmentState.SEALED
        sum_up(segment)
    (part,) = parts_of(memories)
    assert all(part.sums.known[: len(decode_table(part.table).writers)])


def test_a_source_that_is_closed_keeps_no_segment(memories: list[HostMemory]) -> None:
    remember(memories[:1], 1, keep=True)
    (part,) = memories[0].parts(SAVE, "")
    for segment in memories[0]._segments.values():
        segment.close()
    source = MappedSource(part.path, part.fills)
    assert in_use(part.path)
    source.close()
    assert not in_use(part.path)


def test_kept_memory_is_given_up_only_where_nobody_uses_it(memories: list[HostMemory]) -> None:
    memory = memories[0]
    remember([memory], 2, keep=True)
    first, second = (info.name for info in sorted(memory.sealed(), key=lambda info: info.sealed))
    with Segment.open(memory.path(first)):
        assert memory.give_up_kept()
        assert [info.name for info in memory.sealed()] == [first], "what is used keeps its contents"
        assert not memory.give_up_kept()
    assert memory.give_up_kept()
    assert memory.sealed() == []
    assert second != first


def test_of_kept_memory_what_is_lent_is_given_up_last(memories: list[HostMemory]) -> None:
    memory = memories[0]
    for step in (5, 6):
        remember([memory], 1, step, keep=True)
        if step == 5:
            taken([memory])
    assert memory.give_up_kept()
    assert [info.step for info in memory.sealed()] == [5]


def test_a_save_of_a_deleted_directory_with_the_same_numbers_is_not_told_of(memories: list[HostMemory]) -> None:
    remember(memories[:1], 1)
    assert len(memories[0].parts(SAVE, "")) == 1
    assert memories[0].parts(SAVE, "another") == []
