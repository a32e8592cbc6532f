"""What every `Store` must do: inherit `StoreSuite` in a test module and give it a ``store`` fixture.

class TestMyStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return open_store(tmp_path)
"""

from __future__ import annotations

import array
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ray_ckpt.errors import DamagedError, ObjectMissingError, StorageError, UsageError
from ray_ckpt.storage import Store
from ray_ckpt.testing.faulty_store import ALWAYS, Fault, FaultyStore
from ray_ckpt.testing.racing import RACERS, race_processes, race_threads

BAD_PATHS = ("", "/", "/etc/x", "..", "../x", "a/../../x", "a//b", "./a", "a/", "gs://b/x", "a\0b")
ODD_NAMES = ("a%2Fb", "with space", "q?x=1&y", "hash#1", "plus+", "{brace}", "été", "a=b,c;d@e", "x.index")


class StoreSuite:
    """Conformance tests. ``exclusive`` False leaves out what needs exclusive creation."""

    exclusive = True
    processes = True
    """Whether other processes see the store's objects."""
    large_nbytes = (32 << 20) + (1 << 20) + 17
    """More than one block of a streamed upload, and no multiple of anything."""

    @pytest.fixture
    def store(self) -> Store:
        """An empty directory."""
        raise NotImplementedError("give the suite a store fixture")

    def reopen(self, store: Store) -> Store:
        """An independent store on the same directory."""
        reopened: Store = pickle.loads(pickle.dumps(store))
        return reopened

    def race(self, store: Store, action: Any) -> list[Any]:
        """Results of `RACERS` processes, where they see the objects, else threads."""
        return (race_processes if self.processes else race_threads)(store, action)

    @pytest.mark.parametrize("nbytes", [0, 1, 100_000])
    def test_what_is_put_is_read(self, store: Store, nbytes: int) -> None:
        data = bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)
        store.put("dir/sub/object", data)
        assert store.read("dir/sub/object") == data
        assert store.size("dir/sub/object") == nbytes

    def test_put_replaces(self, store: Store) -> None:
        store.put("x", b"a longer first one")
        store.put("x", b"second")
        assert store.read("x") == b"second"

    def test_any_contiguous_buffer_can_be_put(self, store: Store) -> None:
        numbers = array.array("I", [1, 2, 1 << 31])
        store.put("x", memoryview(numbers))
        assert store.read("x") == numbers.tobytes()

    def test_data_that_looks_like_a_multipart_boundary(self, store: Store) -> None:
        data = b"a\r\n--==0==\r\n--==0==--\n--boundary--"
        store.put("x", data)
        assert store.put_if_absent("y", data)
        assert store.read("x") == store.read("y") == data

    def test_large_objects(self, store: Store) -> None:
        data = memoryview(bytes(range(251)) * (self.large_nbytes // 251 + 1))[: self.large_nbytes]
        store.put("put", data)
        with store.create("streamed") as writer:
            for start in range(0, len(data), 5_000_011):
                writer.write(data[start : start + 5_000_011])
        for path in ("put", "streamed"):
            buffer = bytearray(len(data))
            store.read_into(path, 0, memoryview(buffer))
            assert buffer == data
            assert store.read_range(path, len(data) - 3, 3) == data[-3:]

    def test_missing_objects(self, store: Store) -> None:
        store.put("there", b"x")
        for path in ("x", "there2", "no/such/dir/x"):
            with pytest.raises(ObjectMissingError, match=path):
                store.read(path)
            with pytest.raises(ObjectMissingError):
                store.size(path)
            with pytest.raises(ObjectMissingError):
                store.read_range(path, 0, 1)
            with pytest.raises(ObjectMissingError):
                store.read_range(path, 0, 0)
            assert store.read_versioned(path) is None

    def test_a_written_object_appears_on_commit_only(self, store: Store) -> None:
        writer = store.create("a/x")
        writer.write(b"one ")
        writer.write(memoryview(b"two"))
        assert store.list("") == []
        assert store.read_versioned("a/x") is None
        writer.commit()
        assert store.read("a/x") == b"one two"

    def test_an_aborted_object_never_appears(self, store: Store) -> None:
        writer = store.create("x")
        writer.write(b"data")
        writer.abort()
        writer.commit()
        assert store.list("") == []

    def test_an_exception_aborts(self, store: Store) -> None:
        store.put("x", b"old")

        def fail() -> None:
            with store.create("x") as writer:
                writer.write(b"new")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert store.read("x") == b"old"
        assert len(store.list("")) == 1

    def test_leaving_the_context_commits_once(self, store: Store) -> None:
        with store.create("x") as writer:
            writer.write(b"data")
            writer.commit()
        with store.create("empty"):
            pass
        assert (store.read("x"), store.read("empty")) == (b"data", b"")

    def test_put_if_absent(self, store: Store) -> None:
        assert store.put_if_absent("log/1", b"mine")
        assert not store.put_if_absent("log/1", b"yours")
        assert not self.reopen(store).put_if_absent("log/1", b"theirs")
        assert store.read("log/1") == b"mine"
        assert store.put_if_absent("log/1", b"mine"), "the same bytes are its own, met by a retry"

    def test_replace_if(self, store: Store) -> None:
        assert store.replace_if("x", b"1", None)
        assert not store.replace_if("x", b"other", None)
        data, version = _versioned(store, "x")
        assert data == b"1"
        assert self.reopen(store).replace_if("x", b"2", version)
        assert not store.replace_if("x", b"3", version)
        data, version = _versioned(store, "x")
        assert data == b"2"
        store.delete("x")
        assert not store.replace_if("x", b"4", version)
        assert store.read_versioned("x") is None

    def test_ranges(self, store: Store) -> None:
        store.put("x", b"0123456789")
        assert store.read_range("x", 0, 10) == b"0123456789"
        assert store.read_range("x", 3, 4) == b"3456"
        assert store.read_range("x", 9, 1) == b"9"
        assert store.read_range("x", 5, 0) == b""
        buffer = bytearray(b"......")
        store.read_into("x", 2, memoryview(buffer)[1:4])
        assert buffer == b".234.."

    @pytest.mark.parametrize(("start", "nbytes"), [(0, 11), (8, 3), (10, 1), (50, 1)])
    def test_a_range_beyond_the_end_is_damage(self, store: Store, start: int, nbytes: int) -> None:
        store.put("dir/x", b"0123456789")
        with pytest.raises(DamagedError, match=f"'dir/x'.*{start} to {start + nbytes}.*10 bytes"):
            store.read_range("dir/x", start, nbytes)

    def test_listing(self, store: Store) -> None:
        for path in ("b", "a/2", "a/1", "a/sub/3", "ab/4", "a.x"):
            store.put(path, path.encode())
        assert [info.path for info in store.list("")] == ["a.x", "a/1", "a/2", "a/sub/3", "ab/4", "b"]
        assert [info.path for info in store.list("a")] == ["a/1", "a/2", "a/sub/3"]
        assert [info.path for info in store.list("a/")] == ["a/1", "a/2", "a/sub/3"]
        assert [(info.path, info.nbytes) for info in store.list("a/sub")] == [("a/sub/3", 7)]
        assert store.list("nothing") == store.list("b") == []
        assert abs(store.list("ab")[0].modified - time.time()) < 3600

    def test_an_empty_directory_lists_nothing(self, store: Store) -> None:
        assert store.list("") == store.list("a/b") == []

    def test_another_store_sees_every_change_at_once(self, store: Store) -> None:
        other = self.reopen(store)
        assert other.url == store.url
        assert other.list("") == []
        store.put("a/x", b"1")
        assert [info.path for info in other.list("a")] == ["a/x"]
        assert other.read("a/x") == b"1"
        store.delete("a/x")
        assert other.list("a") == []
        assert other.read_versioned("a/x") is None

    def test_delete(self, store: Store) -> None:
        store.put("a/x", b"1")
        store.delete("a/x")
        store.delete("a/x")
        store.delete("never/was")
        assert store.list("") == []

    def test_odd_names(self, store: Store) -> None:
        paths = [f"dir/{name}" for name in ODD_NAMES]
        for path in paths:
            assert store.put_if_absent(path, path.encode())
        assert [info.path for info in store.list("dir")] == sorted(paths)
        for path in paths:
            data, version = _versioned(store, path)
            assert data == store.read(path) == store.read_range(path, 0, len(data)) == path.encode()
            assert store.replace_if(path, b"new", version)
            assert store.size(path) == 3
            store.delete(path)
        assert store.list("") == []

    @pytest.mark.parametrize("path", BAD_PATHS)
    def test_paths_stay_inside(self, store: Store, path: str) -> None:
        calls: list[Any] = [store.read, store.read_versioned, store.size, store.delete, store.create]
        calls += [lambda p: store.put(p, b""), lambda p: store.put_if_absent(p, b"")]
        calls += [lambda p: store.replace_if(p, b"", "v"), lambda p: store.read_range(p, 0, 1)]
        if path.rstrip("/") not in ("", "a"):
            calls.append(store.list)
        for call in calls:
            with pytest.raises(UsageError, match="is not a path inside"):
                call(path)

    def test_check_leaves_nothing_behind(self, store: Store) -> None:
        store.put("x", b"1")
        store.check()
        assert [info.path for info in store.list("")] == ["x"]

    def test_threads_share_a_store(self, store: Store) -> None:
        def work(number: int) -> bytes:
            store.put(f"t/{number}", str(number).encode())
            return store.read(f"t/{number}")

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(32))) == [str(number).encode() for number in range(32)]
        assert len(store.list("t")) == 32

    def test_one_racer_creates(self, store: Store) -> None:
        self._exclusive_only()
        won = self.race(store, create_as)
        assert sum(won) == 1
        assert store.read("race") == _name(won.index(True))

    def test_one_racer_replaces(self, store: Store) -> None:
        self._exclusive_only()
        store.put("race", b"start")
        version = _versioned(store, "race")[1]
        store.put("version", version.encode())
        won = self.race(store, replace_as)
        assert sum(won) == 1
        assert store.read("race") == _name(won.index(True))

    def test_no_increment_is_lost(self, store: Store) -> None:
        self._exclusive_only()
        store.put("count", b"0 start")
        assert all(self.race(store, increment))
        assert store.read("count").split()[0] == str(RACERS).encode()

    def test_a_lost_reply_is_read_back(self, store: Store) -> None:
        for times in (1, ALWAYS):
            faulty = FaultyStore(store, [Fault("put_if_absent", "after", times=times)])
            assert faulty.put_if_absent(f"mine-{times}", b"mine")
            assert store.read(f"mine-{times}") == b"mine"
            _, version = _versioned(store, f"mine-{times}")
            faulty = FaultyStore(store, [Fault("replace_if", "after", times=times)])
            assert faulty.replace_if(f"mine-{times}", b"new", version)
            assert store.read(f"mine-{times}") == b"new"

    @pytest.mark.parametrize("name", ["put_if_absent", "replace_if"])
    def test_a_lost_reply_and_then_silence_is_read_back(self, store: Store, name: str) -> None:
        """The write happened, but no attempt ever got an answer: only the object itself can tell."""
        faulty = FaultyStore(store, [Fault(name, "after"), Fault(name, "before", first=2, times=ALWAYS)])
        version = None
        if name == "replace_if":
            store.put("x", b"old")
            _, version = _versioned(store, "x")
        assert faulty.replace_if("x", b"mine", version)
        assert store.read("x") == b"mine"
        assert len([call for call in faulty.calls if call == (name, "x")]) == faulty.faults.attempts

    @pytest.mark.parametrize("times", [1, ALWAYS])
    def test_another_writer_wins_behind_a_lost_request(self, store: Store, times: int) -> None:
        other = self.reopen(store)

        def act() -> None:
            other.put_if_absent("x", b"other's")

        plan = [Fault("put_if_absent", "call", hook=act), Fault("put_if_absent", "before", times=times)]
        assert not FaultyStore(store, plan).put_if_absent("x", b"mine")
        assert store.read("x") == b"other's"

    def test_a_request_that_never_arrives_is_an_error(self, store: Store) -> None:
        plan = [Fault(name, "before", times=ALWAYS) for name in ("put_if_absent", "replace_if")]
        faulty = FaultyStore(store, plan)
        with pytest.raises(StorageError, match=r"put_if_absent 'x'.*check the network"):
            faulty.put_if_absent("x", b"mine")
        store.put("x", b"old")
        with pytest.raises(StorageError, match=r"replace_if 'x'.*check the network"):
            faulty.replace_if("x", b"mine", _versioned(store, "x")[1])
        assert store.read("x") == b"old"

    def _exclusive_only(self) -> None:
        if not self.exclusive:
            pytest.skip("the store promises nothing to several writers")


def _name(number: int) -> bytes:
    return b"racer %d" % number


def _versioned(store: Store, path: str) -> tuple[bytes, str]:
    found = store.read_versioned(path)
    assert found is not None, f"{path} is missing"
    return found


def create_as(store: Store, number: int) -> bool:
    """A racer that creates the object."""
    return store.put_if_absent("race", _name(number))


def replace_as(store: Store, number: int) -> bool:
    """A racer that replaces the version all have seen."""
    return store.replace_if("race", _name(number), store.read("version").decode())


def increment(store: Store, number: int) -> bool:
    """A racer that adds one to a number, however often it must try. Contents name their writer."""
    while True:
        data, version = _versioned(store, "count")
        count = int(data.split()[0]) + 1
        if store.replace_if("count", b"%d by %d" % (count, number), version):
            return True
