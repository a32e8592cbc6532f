"""Whose a folder of segments is, and how they are called.

The agent that owns a folder holds a lock on it while it lives. What lies in a folder of the run without an owner, of a
Ray node that is no more, belongs to the next agent of the run on this machine.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot import in_use, is_foreign, reclaim
from ray_ckpt.snapshot.layouts import keep_layout, read_layouts

logger = logging.getLogger(__name__)

SUFFIX = ".segment"
OWNER = "owner.lock"
REPLICA = "r"
_ADOPTED = "a"


def lock(path: Path) -> int:
    """Own a folder for as long as this process lives, by the lock on a file in it; -1 if another process does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd


def adopt(other: Path, own: Path) -> None:
    """Move what lies in a folder of the same run into ours, if nobody owns that and nobody uses it.

    Segments that no process of this version can read are removed.
    """
    try:
        if other.is_symlink() or other.lstat().st_uid != os.getuid():
            return
        owner = lock(other / OWNER)
    except OSError:
        return
    if owner < 0:
        return
    try:
        for layout in read_layouts(other).values():
            # First, as a snapshot without its layout explains nothing; and copied, as what stays needs its own.
            keep_layout(own, layout)
        for path in sorted(other.glob(f"*{SUFFIX}")):
            if not drop_foreign(path) and not in_use(path):
                # By inode: no two folders of one run can hold the same.
                mark = REPLICA if is_replica(path.name) else _ADOPTED
                path.rename(own / segment_name(rank_of(path.name), f"{mark}{path.stat().st_ino}"))
                logger.info("%s: taken over from a node that is gone", path)
        if not any(other.glob(f"*{SUFFIX}")):
            shutil.rmtree(other, ignore_errors=True)
    except (OSError, StorageError, ValueError) as error:
        logger.warning("%s: could not be taken over: %s", other, error)
    finally:
        os.close(owner)


def drop_foreign(path: Path) -> bool:
    """Whether a segment is of another version of the format; then it is removed, if nobody uses it."""
    foreign = is_foreign(path)
    if foreign and reclaim(path):
        logger.info("%s: removed, as it is of another version", path)
    return foreign


def segment_name(rank: int, mark: str) -> str:
    """The file of a rank's segment; ``mark`` tells it from its others."""
    return f"{rank:05d}-{mark}{SUFFIX}"


def is_replica(name: str) -> bool:
    """Whether a segment is for copies of another host's snapshots."""
    return name.partition("-")[2].startswith(REPLICA)


def rank_of(name: str) -> int:
    """The rank whose snapshots a segment is for."""
    return int(name.partition("-")[0])
