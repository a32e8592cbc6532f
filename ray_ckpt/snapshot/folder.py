"""Segments of a folder: where they lie, who uses them, and how they go."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot.segment import MAGIC, Segment, SegmentState
from ray_ckpt.snapshot.table import SaveId

_BASE = Path("/dev/shm")
_SEGMENT_NAME = "[0-9][0-9][0-9][0-9][0-9]-*.segment"


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment as `scan` sees it.

    ``state`` is None if it is of another version of the format; ``save`` is None then too, and while it is empty.
    ``modified`` is in seconds since the epoch.
    """

    path: Path
    state: SegmentState | None
    save: SaveId | None
    data_nbytes: int
    in_use: bool
    modified: float


def default_folder(run_id: str) -> Path:
    """The folder of a run's segments on tmpfs, made private to this user.

    Raises:
        StorageError: somebody else has put something in its place.
    """
    return private_folder(private_folder(_BASE / f"ray_ckpt-{os.getuid()}") / run_id)


def private_folder(path: Path) -> Path:
    """Make this folder, unless it is there already, as this user's alone: whoever may write there could swap files.

    Raises:
        StorageError: something else, or somebody else's, lies in its place; a link is never followed.
    """
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as err:
        raise StorageError(f"{path}: cannot make a folder for segments: {err.strerror}") from err
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(f"{path} is not a folder of this user's alone (mode 0700); remove it")
    return path


def in_use(path: str | Path) -> bool:
    """True while any process, this one too, has the segment open."""
    with _exclusive(path) as alone:
        return not alone


def reclaim(path: str | Path) -> bool:
    """Remove a segment that nobody has open; False if somebody has."""
    with _exclusive(path) as alone:
        if alone:
            Path(path).unlink(missing_ok=True)
        return alone


def scan(folder: str | Path) -> list[SegmentInfo]:
    """The segments in a folder, by name; other files are skipped. A folder that is not there has none."""
    found = []
    for path in sorted(Path(folder).glob("*")):
        with contextlib.suppress(StorageError, FileNotFoundError):
            used, now = in_use(path), path.stat()
            if is_foreign(path):
                found.append(SegmentInfo(path, None, None, now.st_size, used, now.st_mtime))
                continue
            with Segment.open(path) as segment:
                found.append(SegmentInfo(path, segment.state, segment.save, segment.data_nbytes, used, now.st_mtime))
    return found


def is_foreign(path: str | Path) -> bool:
    """Whether this is a segment of another version of the format, which this one cannot read. Raises `StorageError`."""
    with _opened(path) as fd:
        found = os.fstat(fd)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
        magic = os.pread(fd, len(MAGIC), 0) if ours else b""
        return len(magic) == len(MAGIC) and magic != MAGIC and magic[:-1] == MAGIC[:-1] and magic[-1:].isdigit()


def drop_unused(folder: str | Path, empty_since: float, kept_since: float) -> list[Path]:
    """Remove the segments of all runs in a folder that nobody has open nor will want; their paths.

    Empty ones not modified since ``empty_since`` (seconds since the epoch; one that is younger may be about to be
    opened): their processes were killed before they could give them back, some of them while they filled one. And any
    not modified since ``kept_since``: whatever it holds, nobody has come to recover it. Never raises: the folder may
    hold anything else too.
    """
    gone = []
    for path in sorted(Path(folder).glob(f"*/{_SEGMENT_NAME}")):
        with contextlib.suppress(StorageError, OSError):
            modified = path.stat().st_mtime
            if modified >= empty_since or in_use(path):
                continue
            # What comes first also tells whether it is a segment at all.
            if (_is_empty(path) or modified < kept_since) and reclaim(path):
                gone.append(path)
    return gone


def _is_empty(path: Path) -> bool:
    if is_foreign(path):
        return False
    with Segment.open(path, writable=True) as segment:
        segment.empty_if_abandoned()
        return segment.state is SegmentState.EMPTY


@contextlib.contextmanager
def _exclusive(path: str | Path) -> Iterator[bool]:
    """Whether we are the only user, who holds the file as long as this runs."""
    with _opened(path) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    try:
        # Not blocking, should it be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise StorageError(f"{path}: cannot open the segment: {err.strerror}") from err
    try:
        yield fd
    finally:
        os.close(fd)
