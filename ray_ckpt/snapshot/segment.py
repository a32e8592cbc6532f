"""A segment: one snapshot in a file on tmpfs, mapped by trainer, agent and writers alike.

Layout, native byte order (the file never leaves its host):

    0       magic
    8       state, fill count, sizes: 64-bit words, see `_Word`
    56      id of the boot of the machine that filled it, 16 bytes
    72      digest of the table, 16 bytes
    88      the process that fills or filled it: its number, the time it started at; 64-bit words
    104     whether the data is lent (`Segment.lend`): then it never changes again; 64-bit word
    112     JSON of the save id
    4096    try counters of 1024 writers: (order of the attempt, tries so far), 64-bit words
    20480   of each of 1024 writers one byte: whether the checksums of its entries are there
    24576   data, exactly the bytes of the data shards, one after another
    then, from the next page on: the table of entries (`table`)
    then, from the next 64-bit word on: uint32 crc32c of each entry, and of each chunk of each entry of more than one
            (`types.CHUNK_NBYTES`), in the table's order, as far as they have been computed

The state is one aligned word and is stored last, so a crash at any point leaves no segment that looks sealed
and is not. A segment sealed before the machine was booted counts as empty: its pages need not all have
reached the disk it lies on. One process fills at a time: the state changes under a record lock only, but for the word
of the process that fills, and a segment whose filler has died can be emptied by whoever notices.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from ray_ckpt.errors import DamagedError, SaveError, StorageError, UsageError
from ray_ckpt.snapshot.process import ProcessId, boot_id
from ray_ckpt.snapshot.space import check_free, give_name, new_file, raise_full
from ray_ckpt.snapshot.table import (
    SaveId,
    Sums,
    Table,
    chunks_in,
    decode_digests,
    decode_save,
    decode_table,
    encode_save,
)
from ray_ckpt.strict_json import MALFORMED

T = TypeVar("T")

MAX_WRITERS = 1024
MAGIC = b"RAYCKPT5"
"""The last character is the version of the format."""
_PAGE = 4096
_TRIES_AT = 4096
_SUMMED_AT = _TRIES_AT + 16 * MAX_WRITERS
HEADER_NBYTES = _SUMMED_AT + _PAGE
_BOOT = slice(56, 72)
_DIGEST = slice(72, 88)
_SAVE_AT = 112
_STATE_AT = 8
_MADV_POPULATE_WRITE = 23
_POPULATE_NBYTES = 8 << 20
"""Small, as madvise holds the interpreter lock while it runs."""


class SegmentState(IntEnum):
    """What a segment's data is good for.

    SEALED: it is whole, and must stay. KEPT: it is whole, and stays until somebody fills the segment again.
    """

    EMPTY = 0
    FILLING = 1
    SEALED = 2
    KEPT = 3


WHOLE = (SegmentState.SEALED, SegmentState.KEPT)
"""The states in which all data and the table are there."""


class _Word(IntEnum):
    """Index of a header field in 64-bit words. FILLS counts fills, so that a reader notices any."""

    STATE = 1
    DATA_NBYTES = 2
    FILLS = 3
    TABLE_NBYTES = 4
    SAVE_NBYTES = 5
    SEALED_AT_US = 6
    OWNER_PID = 11
    OWNER_STARTED = 12
    LENT = 13


class Segment:
    """A mapped segment; holds a shared lock on its file until `close`.

    ``data`` is the data region, read-only unless opened for writing. ``fills`` changes whenever somebody
    starts to fill it again.
    """

    def __init__(self, path: Path, fd: int, *, writable: bool) -> None:
        self.path = path
        self._fd = fd
        self._filling: int | None = None
        nbytes = os.pread(fd, 8, 8 * _Word.DATA_NBYTES)
        self.data_nbytes = int.from_bytes(nbytes, "little" if np.little_endian else "big")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, HEADER_NBYTES + self.data_nbytes, mmap.MAP_SHARED, protection)
        view = memoryview(self._map)
        self._words = view[:HEADER_NBYTES].cast("Q")
        self._tries = view[_TRIES_AT:_SUMMED_AT].cast("Q")
        self.data = view[HEADER_NBYTES:]
        SegmentState(self._words[_Word.STATE])

    @classmethod
    def create(cls, path: str | Path, data_nbytes: int) -> Segment:
        """Make a new, empty segment for ``data_nbytes`` of data and map it; all its memory is taken now.

        Raises:
            StorageError: the path exists, or the folder has not enough free space.
        """
        if data_nbytes < 0:
            raise UsageError(f"{path}: a segment cannot have {data_nbytes} bytes")
        path = Path(path)
        total = HEADER_NBYTES + data_nbytes
        check_free(path, total)
        try:
            fd, named = new_file(path)
        except OSError as err:
            raise StorageError(f"{path}: cannot create the segment: {err.strerror}") from err
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            # Not ftruncate: pages that a full tmpfs cannot give would kill the process with SIGBUS later.
            os.posix_fallocate(fd, 0, total)
            words = np.zeros(_SAVE_AT // 8, np.uint64)
            words[_Word.DATA_NBYTES] = data_nbytes
            os.pwrite(fd, words.tobytes(), 0)
            os.pwrite(fd, MAGIC, 0)
            made = cls(path, fd, writable=True)
            if not named:
                give_name(fd, path)
            return made
        except BaseException as err:
            os.close(fd)
            if named:
                path.unlink(missing_ok=True)
            if isinstance(err, OSError):
                raise_full(path, total, err)
            raise

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> Segment:
        """Map an existing segment.

        Raises:
            StorageError: it is not there, not a segment, or not this user's.
        """
        path = Path(path)
        try:
            # Not blocking, should it be a pipe.
            mode = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK
            fd = os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as err:
            raise StorageError(f"{path}: cannot open the segment: {err.strerror}") from err
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.pread(fd, len(MAGIC), 0) != MAGIC:
                raise StorageError(f"{path} is not a segment of this version; remove it if nobody uses it")
            # Only now: somebody may hold the lock of another kind of file for ever.
            fcntl.flock(fd, fcntl.LOCK_SH)
            found = os.fstat(fd)
            if found.st_uid != os.getuid() or not found.st_nlink:
                raise StorageError(f"{path}: the segment belongs to another user or has just been removed")
            return cls(path, fd, writable=writable)
        except BaseException as err:
            os.close(fd)
            if isinstance(err, (ValueError, OverflowError)):
                raise StorageError(f"{path}: not a whole segment ({err}); remove it if nobody uses it") from None
            raise

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and unlock; the file stays. Arrays over ``data`` keep the mapping alive until they go."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        for view in (self._words, self._tries, self.data):
            with contextlib.suppress(BufferError):
                view.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    @property
    def state(self) -> SegmentState:
        """The state as any process sees it now."""
        state = SegmentState(self._words[_Word.STATE])
        stale = state in WHOLE and self._map[_BOOT] != boot_id()
        return SegmentState.EMPTY if stale else state

    @property
    def fills(self) -> int:
        """How often this segment has been filled."""
        return self._words[_Word.FILLS]

    @property
    def sealed_at(self) -> float:
        """Wall-clock time of the last seal, in seconds since the epoch."""
        return self._words[_Word.SEALED_AT_US] / 1e6

    @property
    def save(self) -> SaveId | None:
        """The save that fills or filled it; None while it is empty."""
        if self.state is SegmentState.EMPTY:
            return None
        with contextlib.suppress(*MALFORMED):
            return decode_save(self._map[_SAVE_AT : _SAVE_AT + self._words[_Word.SAVE_NBYTES]])
        return None

    @property
    def lent(self) -> bool:
        """Whether somebody was given the data as memory of his own: then it is never filled again."""
        return bool(self._words[_Word.LENT])

    def lend(self, fills: int) -> memoryview | None:
        """The data as private memory, without a copy: pages are copied when they are written to.

        It stays as long as the view does, whatever becomes of the segment: that is never filled again, only removed.
        Nothing is locked by it. None if the segment does not hold this fill any more, or cannot be mapped once more.
        """
        with _range_lock(self._fd, _STATE_AT):
            if self.state not in WHOLE or self.fills != fills:
                return None
            self._words[_Word.LENT] = 1
        try:
            # Opened anew, as the lock would stay with the mapping; by its number, as the file may have another name.
            with open(f"/proc/self/fd/{self._fd}", "rb") as file:
                nbytes, protection = HEADER_NBYTES + self.data_nbytes, mmap.PROT_READ | mmap.PROT_WRITE
                own = mmap.mmap(file.fileno(), nbytes, mmap.MAP_PRIVATE, protection)
        except OSError:
            # Too many files, or too little address space: it can still be read.
            return None
        return memoryview(own)[HEADER_NBYTES:]

    def populate(self) -> None:
        """Map every page into this process now, so that the first snapshot does not pay for it."""
        length = len(self._map)
        for start in range(0, length, _POPULATE_NBYTES):
            try:
                self._map.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_NBYTES, length - start))
            except OSError:
                # Linux before 5.14: write each page's own first byte back.
                pages = np.frombuffer(self._map, np.uint8)[start : start + _POPULATE_NBYTES : _PAGE]
                pages |= np.uint8(0)

    @contextlib.contextmanager
    def fill(self, save: SaveId) -> Iterator[Segment]:
        """While this runs the segment is being filled; unless it was sealed by the end, it is empty then.

        Raises:
            SaveError: it holds a sealed snapshot, which must be released first, or a living process is filling it, or
                its data is lent. A snapshot that is only kept is lost.
        """
        text = encode_save(save)
        if len(text) > _TRIES_AT - _SAVE_AT:
            raise UsageError(f"{self.path}: the save id has {len(text)} bytes; use a shorter run name")
        self._claim()
        self._tries[:] = memoryview(bytes(16 * MAX_WRITERS)).cast("Q")
        self._map[_SUMMED_AT:HEADER_NBYTES] = bytes(_PAGE)
        self._words[_Word.SAVE_NBYTES] = len(text)
        self._map[_SAVE_AT : _SAVE_AT + len(text)] = text
        try:
            yield self
        finally:
            with _range_lock(self._fd, _STATE_AT):
                if self._is_mine:
                    self._words[_Word.STATE] = SegmentState.EMPTY
            self._filling = None

    def _claim(self) -> None:
        """EMPTY -> FILLING by this process. The owner comes first: without one nobody could tell if it died."""
        me = ProcessId.of(os.getpid())
        with _range_lock(self._fd, _STATE_AT):
            if self.lent:
                raise SaveError(f"{self.path}: a restored state lies in it: fill another segment, and remove this one")
            if self.state is SegmentState.SEALED:
                raise SaveError(f"{self.path}: still holds the snapshot {self.save}; release it first")
            if self.state is SegmentState.FILLING and self._filler_lives:
                raise SaveError(
                    f"{self.path}: process {self._words[_Word.OWNER_PID]} is filling it, process {me.pid} wanted to; "
                    "is this rank running twice on this host?"
                )
            self._words[_Word.OWNER_PID], self._words[_Word.OWNER_STARTED] = me.pid, me.started
            self._map[_BOOT] = boot_id()
            self._filling = self._words[_Word.FILLS] + 1
            self._words[_Word.FILLS] = self._filling
            self._words[_Word.STATE] = SegmentState.FILLING

    @property
    def _filler_lives(self) -> bool:
        owner = ProcessId(self._words[_Word.OWNER_PID], self._words[_Word.OWNER_STARTED])
        return self._map[_BOOT] == boot_id() and owner.alive

    @property
    def _is_mine(self) -> bool:
        """Whether the fill that this object has begun still goes on."""
        return (
            self._filling is not None
            and self.state is SegmentState.FILLING
            and self._words[_Word.FILLS] == self._filling
            and self._words[_Word.OWNER_PID] == os.getpid()
        )

    def empty_if_abandoned(self) -> bool:
        """Empty the segment if the process that was filling it has died; whether that was so."""
        if self._words[_Word.STATE] != SegmentState.FILLING:
            return False
        with _range_lock(self._fd, _STATE_AT):
            abandoned = self.state is SegmentState.FILLING and not self._filler_lives
            if abandoned:
                self._words[_Word.STATE] = SegmentState.EMPTY
        return abandoned

    def seal(self, table: bytes, *, keep: bool = False) -> None:
        """Write the table and declare the data whole; ``keep``: KEPT at once, as no save needs it.

        Raises:
            SaveError: the segment is not being filled by this object any more.
            StorageError: no space for the table.
        """
        self._check_mine()
        try:
            os.posix_fallocate(self._fd, self._table_at, max(1, len(table)))
            os.pwrite(self._fd, table, self._table_at)
        except OSError as err:
            raise_full(self.path, len(table), err)
        with _range_lock(self._fd, _STATE_AT):
            self._check_mine()
            self._words[_Word.TABLE_NBYTES] = len(table)
            self._map[_DIGEST] = _digest(table)
            self._words[_Word.SEALED_AT_US] = time.time_ns() // 1000
            self._words[_Word.STATE] = SegmentState.KEPT if keep else SegmentState.SEALED

    def _check_mine(self) -> None:
        if not self._is_mine:
            raise SaveError(
                f"{self.path}: the segment is {self.state.name.lower()} by process {self._words[_Word.OWNER_PID]}, "
                f"expected it being filled by this process, {os.getpid()}; is this rank running twice on this host?"
            )

    def table(self) -> Table:
        """The sealed contents. Raises as `read_table` does."""
        table = self._decoded(decode_table)
        end = max((entry.start + entry.nbytes for entry in table.entries), default=0)
        if end > self.data_nbytes:
            raise DamagedError(f"{self.path}: has {self.data_nbytes} bytes of data, its entries need {end}")
        return table

    def digests(self) -> Mapping[str, int]:
        """The sealed table's ``digests`` alone. Raises as `read_table` does."""
        return self._decoded(decode_digests)

    def _decoded(self, decode: Callable[[bytes], T]) -> T:
        table = self.read_table()
        try:
            return decode(table)
        except MALFORMED as err:
            raise DamagedError(f"{self.path}: not a table of entries ({err!r:.200}); the snapshot is lost") from None

    def read_table(self) -> bytes:
        """The encoded table (`table.encode_table`).

        Raises:
            SaveError: the segment is not sealed.
            DamagedError: the table fails its digest.
        """
        if self.state not in WHOLE:
            raise SaveError(f"{self.path}: the segment is {self.state.name.lower()}, expected it sealed")
        nbytes = self._words[_Word.TABLE_NBYTES]
        data = os.pread(self._fd, min(nbytes, os.fstat(self._fd).st_size), self._table_at)
        if len(data) != nbytes or _digest(data) != self._map[_DIGEST]:
            raise DamagedError(f"{self.path}: the table of entries fails its digest; the snapshot is lost")
        return data

    def release(self, fills: int | None = None) -> None:
        """The snapshot is not needed any more: of this fill, if it is named, and not if it was filled again since."""
        self._leave(fills, WHOLE, SegmentState.EMPTY)

    def keep(self, fills: int | None = None) -> None:
        """No save needs the snapshot any more, but a restart may: of this fill, as `release`."""
        self._leave(fills, (SegmentState.SEALED,), SegmentState.KEPT)

    def _leave(self, fills: int | None, states: Collection[SegmentState], state: SegmentState) -> None:
        with _range_lock(self._fd, _STATE_AT):
            if self._words[_Word.STATE] in states and fills in (None, self.fills):
                self._words[_Word.STATE] = state

    # -- checksums ----------------------------------------------------------------------------------------

    def put_sums(self, table: Table, writer: int, crcs: Sequence[int], chunks: Sequence[int]) -> None:
        """Leave the checksums of one writer's entries, and of their chunks, for those who read the segment later.

        Raises:
            StorageError: no space, or the segment is not there any more; nothing is lost but the checksums.
        """
        first, _ = table.writers[writer]
        chunks_at = len(table.entries) + sum(chunks_in(e.nbytes) for e in table.entries[:first])
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as err:
            raise StorageError(f"{self.path}: cannot open the segment: {err.strerror}") from err
        try:
            for at, sums in ((first, crcs), (chunks_at, chunks)):
                os.pwrite(fd, np.array(sums, np.uint32).tobytes(), self._sums_at + 4 * at)
            os.pwrite(fd, b"\1", _SUMMED_AT + writer)
        except OSError as err:
            raise_full(self.path, 4 * len(crcs), err)
        finally:
            os.close(fd)

    def sums(self) -> Sums:
        """The checksums that are there, and what follows on them in the file."""
        # The flags first: a writer may be leaving the rest at this moment.
        flags = self._map[_SUMMED_AT : _SUMMED_AT + MAX_WRITERS]
        data = os.pread(self._fd, max(os.fstat(self._fd).st_size - self._sums_at, 0), self._sums_at)
        return Sums(data, tuple(map(bool, flags)))

    def next_try(self, writer: int, order: int = 0) -> int:
        """The number of this writer's next try, from 0, never given twice; kept in the file.

        ``order`` rises with the attempts that write this snapshot: each counts from 0.

        Raises:
            SaveError: a later attempt has taken over.
            UsageError: more than 1024 writers.
        """
        if not 0 <= writer < MAX_WRITERS:
            raise UsageError(f"writer {writer}: a segment counts tries of {MAX_WRITERS} writers")
        at = 2 * writer
        with _range_lock(self._fd, _TRIES_AT + 8 * at):
            if self._tries[at] > order:
                raise SaveError(f"{self.path}: a later attempt than {order} writes this snapshot")
            if self._tries[at] < order:
                # In this order: a crash in between skips numbers, and gives none twice.
                self._tries[at] = order
                self._tries[at + 1] = 0
            number = self._tries[at + 1]
            self._tries[at + 1] = number + 1
            return number

    @property
    def _table_at(self) -> int:
        return -(-(HEADER_NBYTES + self.data_nbytes) // _PAGE) * _PAGE

    @property
    def _sums_at(self) -> int:
        return -(-(self._table_at + self._words[_Word.TABLE_NBYTES]) // 8) * 8


@contextlib.contextmanager
def _range_lock(fd: int, start: int) -> Iterator[None]:
    """A record lock between processes; apart from flock's, so that users' shared locks do not block it.

    A record lock does not hold between the threads of a process: another lock does.
    """
    with _threads:
        fcntl.lockf(fd, fcntl.LOCK_EX, 16, start)
        try:
            yield
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN, 16, start)


_threads = threading.Lock()


def _digest(table: bytes) -> bytes:
    return hashlib.blake2b(table, digest_size=16).digest()
