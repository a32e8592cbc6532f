"""The log: one winner a number, a head found in a few requests, and nothing taken that is not a record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.errors import CheckpointError, DamagedError, RayCkptError, StorageError, UsageError
from ray_ckpt.log import append, decode_record, encode_record, live_checkpoints, prune, read_head
from ray_ckpt.log.codec import CHECKSUM
from ray_ckpt.log.records import LOG, MIN_KEPT, record_path
from ray_ckpt.storage import Store, open_store
from ray_ckpt.testing.faulty_store import ALWAYS, Fault, FaultyStore
from ray_ckpt.testing.racing import race_processes
from ray_ckpt.types import Dying, Generation, LogRecord
from tests.log.records import APPENDS_EACH, append_some, checkpoint, fill, record

FULL = dataclasses.replace(
    record(42, checkpoint(1, superseded=True), checkpoint(2)),
    dying=(Dying(checkpoint(0), 7.5),),
    generation=Generation(3, 8, None),
    attempt="e1-2",
    step=2,
    reason="ein Grund",
)


@pytest.mark.parametrize("wanted", [record(1), FULL, dataclasses.replace(FULL, generation=Generation(1, 2, 9))])
def test_a_record_comes_back(wanted: LogRecord) -> None:
    assert decode_record(encode_record(wanted), "here") == wanted


def unsealed(made: LogRecord) -> dict[str, Any]:
    """The record as its JSON says it, without the checksum, as older versions wrote it."""
    value: dict[str, Any] = json.loads(encode_record(made))
    assert value.pop(CHECKSUM) > 0
    return value


def test_a_record_without_a_checksum_is_read() -> None:
    assert decode_record(json.dumps(unsealed(FULL)).encode(), "here") == FULL


def test_any_changed_value_is_damage() -> None:
    raw = encode_record(FULL)
    key = raw.index(CHECKSUM.encode())
    for at in range(len(raw)):
        if chr(raw[at]).isdigit() and at not in range(key, key + len(CHECKSUM)):
            changed_digit = b"8" if raw[at : at + 1] == b"1" else b"1"
            with pytest.raises(RayCkptError):
                decode_record(raw[:at] + changed_digit + raw[at + 1 :], "here")
    with pytest.raises(DamagedError, match=r"here is no LogRecord.*crc32c should be"):
        decode_record(raw.replace(b"ein Grund", b"kein Grund"), "here")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"step": 5.0}, r"step: expected int, found 5\.0"),
        ({"kind": "party"}, "kind: expected one of"),
        ({"live": (dataclasses.replace(checkpoint(1), step=1.0),)}, "live: step: expected int"),
        ({"live": (dataclasses.replace(checkpoint(1), prefix="../x"),)}, r"\.\./x"),
        ({"generation": Generation("1", 2, None)}, "generation: number: expected int, found '1'"),  # type: ignore[arg-type]
    ],
)
def test_what_no_reader_would_take_is_not_written(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        encode_record(dataclasses.replace(FULL, **changes))


def test_keys_of_later_versions_are_ignored() -> None:
    value = unsealed(FULL)
    value["later"] = value["live"][0]["later"] = {"a": 1}
    assert decode_record(json.dumps(value).encode(), "here") == FULL


def test_a_newer_format_is_refused() -> None:
    value = {**json.loads(encode_record(FULL)), "format": 2}
    with pytest.raises(CheckpointError, match=r"here was written by a newer ray_ckpt .format 2") as caught:
        decode_record(json.dumps(value).encode(), "here")
    assert not isinstance(caught.value, DamagedError)


def changed(**changes: object) -> bytes:
    value = {**unsealed(FULL), **changes}
    return json.dumps({key: item for key, item in value.items() if item != "gone"}).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"junk",
        b"\xff\xfe",
        b"[]",
        b"3",
        encode_record(FULL)[:-7],
        changed(format="gone"),
        changed(format="1"),
        changed(sequence="gone"),
        changed(sequence="1"),
        changed(sequence=True),
        changed(kind="party"),
        changed(live={}),
        changed(live=[3]),
        changed(generation=[1, 2, 3]),
        changed(time=None),
    ],
)
def test_junk_is_damage(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="here is no LogRecord"):
        decode_record(raw, "here")


@pytest.mark.parametrize("prefix", ["../x", "/etc/x", "gs://other/x", "", "a/../../x"])
def test_a_prefix_may_not_leave_the_directory(prefix: str) -> None:
    away = dataclasses.replace(checkpoint(1), prefix=prefix)
    for bad in (record(1, away), dataclasses.replace(record(1), dying=(Dying(away, 1.0),))):
        with pytest.raises(DamagedError, match=r"here names the checkpoint .*inside the checkpoint directory"):
            decode_record(json.dumps(dataclasses.asdict(bad) | {"format": 1}).encode(), "here")


def test_an_empty_directory_has_no_head(store: Store) -> None:
    assert read_head(store) is None
    assert live_checkpoints(store) == []


def test_appending_moves_the_head(store: Store) -> None:
    top = fill(store, 1, 3)
    assert read_head(store) == top
    assert live_checkpoints(store) == [checkpoint(3)]
    assert [info.path for info in store.list(LOG)] == [f"_ray_ckpt/log/{n:020d}" for n in (1, 2, 3)]


def test_a_taken_number_gives_the_head(store: Store) -> None:
    top = fill(store, 1, 3)
    assert append(store, record(2, owner="other")) == (False, top)
    assert append(store, record(3, owner="other")) == (False, top)
    assert read_head(store) == top


def test_an_append_can_be_repeated(store: Store) -> None:
    mine = record(1)
    assert append(store, mine) == append(store, mine) == (True, mine)


def test_a_lost_reply_is_a_success(store: Store) -> None:
    mine = record(1)
    faulty = FaultyStore(store, [Fault("put_if_absent", "after", times=ALWAYS)])
    assert append(faulty, mine) == (True, mine)


def test_no_reply_and_no_record_is_an_error(store: Store) -> None:
    faulty = FaultyStore(store, [Fault("put_if_absent", "before", times=ALWAYS)])
    with pytest.raises(StorageError):
        append(faulty, record(1))
    assert read_head(store) is None


@pytest.mark.parametrize("length", [5, 200])
def test_the_head_costs_few_requests(store: Store, length: int) -> None:
    top = fill(store, 1, length)
    faulty = FaultyStore(store)
    assert read_head(faulty) == top
    assert len(faulty.calls) == 3


def test_a_stale_listing_is_probed_past(store: Store) -> None:
    top = fill(store, 1, 9)
    faulty = FaultyStore(store, [Fault("list", "truncate", times=ALWAYS)])
    assert read_head(faulty) == top
    assert append(faulty, record(9, owner="other")) == (False, top)


def test_a_listing_that_shows_nothing_yet(store: Store) -> None:
    top = fill(store, 1, 1)
    assert read_head(FaultyStore(store, [Fault("list", "truncate")])) == top


def test_a_head_that_is_pruned_while_it_is_read(store: Store) -> None:
    fill(store, 1, 3)

    def others_go_on() -> None:
        prune(store, fill(store, 4, 40), keep=MIN_KEPT)

    faulty = FaultyStore(store, [Fault("read", "call", hook=others_go_on)])
    assert read_head(faulty) == record(40, checkpoint(40))


def test_a_log_that_is_never_there_when_read_is_an_error(store: Store) -> None:
    fill(store, 1, 1)
    faulty = FaultyStore(store, [Fault("read", "before", times=ALWAYS, error=FileNotFoundError)])
    with pytest.raises(RayCkptError, match="pruned faster than it could be read"):
        read_head(faulty)


def test_pruning_keeps_the_last(store: Store) -> None:
    top = fill(store, 1, 100)
    prune(store, top)
    assert [info.path for info in store.list(LOG)] == [record_path(n) for n in range(37, 101)]
    assert read_head(store) == top
    prune(store, top, keep=MIN_KEPT)
    assert len(store.list(LOG)) == MIN_KEPT
    with pytest.raises(UsageError, match="keep=3"):
        prune(store, top, keep=3)


@pytest.mark.parametrize("sequence", [1, 40, 84])
def test_a_pruned_number_cannot_be_won(store: Store, sequence: int) -> None:
    """A coordinator that slept while the log moved on finds its number free, and must still lose."""
    top = fill(store, 1, 100)
    prune(store, top, keep=MIN_KEPT)
    assert append(store, record(sequence, owner="sleeper")) == (False, top)
    assert len(store.list(LOG)) == MIN_KEPT


def test_a_successor_right_behind_does_not_undo_an_append(store: Store) -> None:
    top = fill(store, 1, 3)

    def successor() -> None:
        fill(store, 5, 5)

    mine = record(4, *top.live)
    assert append(FaultyStore(store, [Fault("list", "call", hook=successor)]), mine) == (True, mine)
    assert read_head(store) == record(5, checkpoint(5))


def test_other_files_in_the_folder_are_no_records(store: Store) -> None:
    top = fill(store, 1, 2)
    store.put(f"{LOG}/notes.txt", b"x")
    store.put(f"{LOG}/99", b"x")
    assert read_head(store) == top


def test_a_damaged_head_is_named_with_the_remedy(store: Store) -> None:
    fill(store, 1, 2)
    store.put(record_path(3), b"{}")
    remedy = "remove that file to go on from record 2, which lists steps 2"
    with pytest.raises(DamagedError, match=f"{store.url}/{record_path(3)}.*{remedy}"):
        read_head(store)
    store.put(record_path(4), b"{}")
    with pytest.raises(DamagedError, match=f"{record_path(4)}.* remove that file and all above number 2"):
        read_head(store)


def test_readers_go_back_below_damaged_records(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    fill(store, 1, 2)
    store.put(record_path(3), b"{}")
    store.put(record_path(4), encode_record(record(9, checkpoint(9))))
    assert live_checkpoints(store) == [checkpoint(2)]
    assert f"{record_path(4)} says it is record 9" in caplog.text
    assert "reading record 2 instead, which lists steps 2" in caplog.text


def test_a_log_of_damaged_records_only_is_no_empty_one(store: Store) -> None:
    store.put(record_path(1), b"{}")
    for read in (read_head, live_checkpoints):
        with pytest.raises(DamagedError, match="no older record can be read"):
            read(store)


def test_a_newer_version_is_not_stepped_back_from(store: Store) -> None:
    fill(store, 1, 2)
    store.put(record_path(3), json.dumps({"format": 99}).encode())
    with pytest.raises(CheckpointError, match="newer ray_ckpt"):
        live_checkpoints(store)


def test_many_processes_append_without_gaps(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    won = race_processes(store, append_some, racers=6)
    total = 6 * APPENDS_EACH
    assert sorted(sequence for each in won for sequence in each) == list(range(1, total + 1))
    owners = {sequence: f"racer {number}" for number, each in enumerate(won) for sequence in each}
    for info in store.list(LOG):
        held = decode_record(store.read(info.path), info.path)
        assert held.owner == owners[held.sequence]
