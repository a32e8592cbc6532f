"""Finding processes of a run at a certain moment, so that a test can kill them then."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import StorageError
from ray_ckpt.snapshot import Segment, SegmentState, default_folder
from tests.system.job import Job, get
from tests.system.waiting import eventually

_OFTEN_S = 0.001


def kill_writer(job: Job) -> None:
    """SIGKILL a writer task's process in the middle of its shard."""
    eventually(lambda: kill_writer_if_any(job), "a writer in the middle of a shard", every_s=_OFTEN_S)


def kill_writer_if_any(job: Job) -> bool:
    """The same if there is one now."""
    pid = _writer_of(job.path)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    return pid is not None


def _writer_of(folder: Path) -> int | None:
    """A process in the middle of an object that is too large for an index; unfinished files have no name."""
    start = f"{folder}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for fd in (process / "fd").iterdir():
                target = os.readlink(fd)
                if target.startswith(start) and target.endswith("(deleted)") and fd.stat().st_size > 1 << 20:
                    return int(process.name)
    return None


def until_filling(job: Job, rank: int) -> None:
    """Wait until a rank is in the middle of a snapshot."""
    eventually(lambda: SegmentState.FILLING in segment_states(job, rank), f"rank {rank} snapshots", every_s=_OFTEN_S)


def segment_folder(job: Job, rank: int) -> Path:
    """Where the agent of a rank's host keeps this run's segments."""
    return default_folder(f"{run_id(job.url)}-{job.hosts[rank][:12]}")


def segment_states(job: Job, rank: int) -> list[SegmentState]:
    """The states of a rank's segments."""
    found = []
    for path in segment_folder(job, rank).glob(f"{rank:05d}-*"):
        try:
            with Segment.open(path) as segment:
                found.append(segment.state)
        except StorageError:
            continue
    return found


def during(job: Job, stage: str) -> Callable[[], bool]:
    """Whether a save of the run is in this stage, as its coordinator says."""
    return lambda: any(s.state == stage for s in get(job.coordinator().status.remote()).saves)


def flip_table(job: Job, rank: int, step: int) -> None:
    """A bit of a rank's own snapshot of this step changes, where that is always verified."""
    for path in segment_folder(job, rank).glob(f"{rank:05d}-[0-9]*"):
        with Segment.open(path) as segment:
            held, at = segment.save, segment._table_at
        if held is not None and held.step == step:
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 1]))
            return
    raise AssertionError(f"no snapshot of step {step} of rank {rank}")
