"""A host's snapshot memory: the segments of one run on this host, made and warmed in the background."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

from ray_ckpt.errors import DamagedError, SaveError, StorageError
from ray_ckpt.protocol.messages import SegmentInfo, Trigger
from ray_ckpt.snapshot import Segment, SegmentState, default_folder, drop_empty, reclaim
from ray_ckpt.snapshot.layouts import keep_layout, read_layouts
from ray_ckpt.types import Layout

logger = logging.getLogger(__name__)

_SUFFIX = ".segment"
_INCARNATION = "incarnation"
_ABANDONED_S = 60.0
"""A segment that nobody has open for so long after it was last filled belongs to nobody."""

_RESERVE = 0.05
"""Share of the tmpfs that is left to others, who may be the training processes."""


Digests = tuple[tuple[str, int], ...]
"""Of a snapshot's replicas, by name."""


class HostMemory:
    """All segments of one host. Thread safe."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._segments: dict[str, Segment] = {}
        self._digests: dict[str, tuple[Segment, int, Digests]] = {}
        for path in sorted(self.folder.glob("*" + _SUFFIX)):
            # What an agent before this one has made.
            with contextlib.suppress(StorageError):
                self._segments[path.name] = Segment.open(path, writable=True)

    @classmethod
    def open(cls, run: str, host: str, folder: str | None) -> HostMemory:
        """The memory of a run on one host, under ``folder`` or on the machine's tmpfs."""
        name = f"{run}-{host[:12]}"
        if folder is None:
            own = default_folder(name)
        else:
            own = Path(folder) / name
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(own)

    def sweep(self) -> None:
        """Remove what other runs left behind that were killed, or whose cluster ended first: it fills the host."""
        for path in drop_empty(self.folder.parent, time.time() - _ABANDONED_S):
            logger.info("%s: removed, as its run is gone", path)

    def prepare(self, rank: int, nbytes: int, slots: int, living: Collection[int] = ()) -> list[str]:
        """Make up to ``slots`` segments that hold ``nbytes`` each for a rank, and populate them; their paths.

        One is made at least; a second one only if it leaves the machine some memory. Empty segments of ranks that
        are not ``living`` on this host are given up first.

        Raises:
            StorageError: not even one fits; the text has the remedy.
        """
        with self._making:
            self._give_up(rank, nbytes, living)
            with self._lock:
                mine = [(n, s) for n, s in self._segments.items() if _rank_of(n) == rank]
            fitting = [segment for _, segment in mine if segment.data_nbytes >= nbytes]
            taken = {name for name, _ in mine}
            for name in (f"{rank:05d}-{slot}{_SUFFIX}" for slot in range(2 * slots)):
                if len(fitting) >= slots or (fitting and not self._has_room(nbytes, rank)):
                    break
                if name not in taken:
                    # Without the lock, which the agent's event loop waits for: it can take seconds.
                    segment = Segment.create(self.folder / name, nbytes)
                    with self._lock:
                        self._segments[name] = segment
                    fitting.append(segment)
        for segment in fitting:
            segment.populate()
        return [str(segment.path) for segment in fitting[:slots]]

    def _give_up(self, rank: int, nbytes: int, living: Collection[int]) -> None:
        """Remove what lies empty: this rank's too small segments, and those of ranks that are not here any more."""
        with self._lock:
            for name, segment in list(self._segments.items()):
                if segment.state is not SegmentState.EMPTY:
                    continue
                of = _rank_of(name)
                if of == rank and segment.data_nbytes < nbytes:
                    segment.close()
                    segment.path.unlink(missing_ok=True)
                    del self._segments[name]
                elif of != rank and of not in living:
                    self._give_up_unused(name)

    def give_back(self, rank: int) -> None:
        """Remove the empty segments of a rank that has left."""
        with self._making, self._lock:
            for name, segment in list(self._segments.items()):
                if _rank_of(name) == rank and segment.state is SegmentState.EMPTY:
                    self._give_up_unused(name)

    def _give_up_unused(self, name: str) -> None:
        """A process of which this agent does not know yet may have the segment mapped: then it stays."""
        segment = self._segments.pop(name)
        segment.close()
        with contextlib.suppress(StorageError):
            if not reclaim(segment.path):
                self._segments[name] = Segment.open(segment.path, writable=True)

    def _has_room(self, nbytes: int, rank: int) -> bool:
        usage = shutil.disk_usage(self.folder)
        enough = usage.free - nbytes > _RESERVE * usage.total
        if not enough:
            logger.warning(
                "rank %d gets one snapshot of %d bytes, not two: %s has %d bytes left. A save that falls due while "
                "another is written will wait; free memory, or give the container a larger /dev/shm",
                rank, nbytes, self.folder, usage.free,
            )  # fmt: skip
        return enough

    def sealed(self) -> list[SegmentInfo]:
        """All sealed snapshots, as the protocol sees them; what a dead process was filling is emptied."""
        with self._lock:
            for segment in self._segments.values():
                if segment.empty_if_abandoned():
                    logger.warning("%s: the process that was filling it has died; the segment is empty", segment.path)
            return [info for name, s in self._segments.items() if (info := self._info(name, s)) is not None]

    def _info(self, name: str, segment: Segment) -> SegmentInfo | None:
        save = segment.save if segment.state is SegmentState.SEALED else None
        if save is None:
            return None
        return SegmentInfo(
            rank=save.rank,
            generation=save.generation,
            step=save.step,
            world_size=save.world_size,
            plan_id=save.plan_id,
            trigger=_trigger(save.trigger),
            writers=save.writers,
            writer_base=save.writer_base,
            num_writers=save.num_writers,
            fingerprint=save.fingerprint,
            digests=self._digests_of(name, segment),
            name=name,
            due=save.due,
            sealed=segment.sealed_at,
        )

    def _digests_of(self, name: str, segment: Segment) -> Digests:
        """Read once for each snapshot. A segment that is made anew under a name counts its fills from one again."""
        fills = segment.fills
        known = self._digests.get(name)
        if known is not None and known[0] is segment and known[1] == fills:
            return known[2]
        found: Digests = ()
        try:
            found = tuple(sorted(segment.digests().items()))
        except (SaveError, DamagedError) as error:
            logger.warning("%s", error)
        self._digests[name] = segment, fills, found
        return found

    def path(self, name: str) -> str:
        """The file of a segment."""
        return str(self.folder / name)

    def nbytes(self, name: str) -> int:
        """What a segment can hold, in bytes."""
        with self._lock:
            return self._segments[name].data_nbytes

    def next_try(self, name: str, writer: int, epoch: int) -> int:
        """The number of a writer's next try in the attempt of this epoch; kept in the segment."""
        with self._lock:
            return self._segments[name].next_try(writer, epoch)

    def free(self, name: str) -> None:
        """The snapshot in this segment is not needed any more."""
        with self._lock:
            segment = self._segments.get(name)
            if segment is not None:
                segment.release()

    def next_incarnation(self) -> str:
        """A name for an agent that sorts after those of all agents before it, even if the clock went back."""
        path = self.folder / _INCARNATION
        last = 0
        with contextlib.suppress(OSError, ValueError):
            last = int(path.read_text())
        number = max(last + 1, time.time_ns())
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(str(number))
        partial.rename(path)
        return f"{number:020d}"

    def keep_layout(self, layout: Layout) -> None:
        """Put a layout beside the segments, so that it outlives this process."""
        keep_layout(self.folder, layout)

    def layouts(self) -> dict[str, Layout]:
        """The layouts that lie beside the segments."""
        return read_layouts(self.folder)

    def remove(self) -> None:
        """Give all memory back: the run on this host has ended and everything is decided."""
        with self._lock:
            for segment in self._segments.values():
                segment.close()
            self._segments.clear()
            shutil.rmtree(self.folder, ignore_errors=True)


def _rank_of(name: str) -> int:
    return int(name.partition("-")[0])


def _trigger(text: str) -> Trigger:
    known: tuple[Trigger, ...] = ("cadence", "proposal", "explicit", "final")
    return next((t for t in known if t == text), "explicit")
