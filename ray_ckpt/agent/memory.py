"""A host's snapshot memory: the segments of one run on this host, made and warmed in the background."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from ray_ckpt.agent.owning import OWNER, REPLICA, SUFFIX, adopt, drop_foreign, is_replica, lock, rank_of, segment_name
from ray_ckpt.errors import DamagedError, SaveError, StorageError
from ray_ckpt.metadata import DEFAULT_KIND
from ray_ckpt.protocol.messages import SegmentInfo, Trigger
from ray_ckpt.restore import Part
from ray_ckpt.snapshot import (
    WHOLE,
    Segment,
    SegmentState,
    default_folder,
    drop_unused,
    private_folder,
    reclaim,
)
from ray_ckpt.snapshot.layouts import keep_layout, read_layouts
from ray_ckpt.snapshot.space import has_room
from ray_ckpt.types import Layout

logger = logging.getLogger(__name__)

_INCARNATION = "incarnation"
_REPLICAS = 2
"""Of each rank: the last whole one outlives the transfer of the next."""

_ABANDONED_S = 60.0
"""A segment that nobody has open for so long after it was last filled belongs to nobody."""

_FORGOTTEN_S = 24 * 3600.0
"""A snapshot that no start of its job has taken over for so long is not wanted any more."""


Digests = tuple[tuple[str, int], ...]
"""Of a snapshot's replicas, by name."""


class HostMemory:
    """All segments of one host, those left in other folders of the ``run`` too. Thread safe."""

    def __init__(self, folder: str | Path, run: str | None = None) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._segments: dict[str, Segment] = {}
        self._digests: dict[str, tuple[Segment, int, Digests]] = {}
        self._layouts: dict[str, Layout] = {}
        self._wanted: dict[int, int] = {}
        self._owner = lock(self.folder / OWNER)
        self._run = run
        for other in self._others():
            adopt(other, self.folder)
        self._open_found()

    def _others(self) -> list[Path]:
        """The run's folders of other agents on this machine."""
        found = self.folder.parent.glob(f"{self._run}-*") if self._run is not None else ()
        return sorted(path for path in found if path != self.folder)

    def _open_found(self) -> bool:
        """Open what an agent before this one has made; whether there was anything."""
        names = set(self._segments)
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            with contextlib.suppress(StorageError):
                if path.name not in names and not drop_foreign(path):
                    self._segments[path.name] = Segment.open(path, writable=True)
        return set(self._segments) != names

    @property
    def has_others(self) -> bool:
        """Whether another agent of the run has, or had, a folder on this machine."""
        return bool(self._others())

    def take_over(self, living: Collection[str]) -> bool:
        """Take over what was still owned or used when this agent came; whether there was anything.

        Not from ``living`` hosts: their agents come back.
        """
        with self._making, self._lock:
            for other in self._others():
                host = other.name.rpartition("-")[2]
                if not any(name.startswith(host) for name in living):
                    adopt(other, self.folder)
            return self._open_found()

    @classmethod
    def open(cls, run: str, host: str, folder: str | None) -> HostMemory:
        """The memory of a run on one host, under ``folder`` or on the machine's tmpfs."""
        name = f"{run}-{host[:12]}"
        if folder is None:
            own = default_folder(name)
        else:
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            own = private_folder(Path(folder) / name)
        return cls(own, run)

    def sweep(self) -> None:
        """Remove what other runs left behind that were killed, or whose cluster ended first: it fills the host."""
        now = time.time()
        for path in drop_unused(self.folder.parent, now - _ABANDONED_S, now - _FORGOTTEN_S):
            logger.info("%s: removed, as its run is gone", path)

    def prepare(self, rank: int, nbytes: int, slots: int, living: Collection[int] = ()) -> list[str]:
        """Make up to ``slots`` segments that hold ``nbytes`` each for a rank, and populate them; their paths.

        One is made at least; a second one only if it leaves the machine some memory. Empty segments of ranks that
        are not ``living`` on this host are given up first.

        Raises:
            StorageError: not even one fits; the text has the remedy.
        """
        with self._making:
            self._wanted[rank] = nbytes
            self._give_up(rank, nbytes, living)
            with self._lock:
                mine = [(n, s) for n, s in self._segments.items() if rank_of(n) == rank and not is_replica(n)]
            fitting = [segment for _, segment in mine if segment.data_nbytes >= nbytes and not segment.lent]
            taken = {name for name, _ in mine}
            for name in (segment_name(rank, str(slot)) for slot in itertools.count()):
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
                of = rank_of(name)
                if of == rank and (segment.data_nbytes < nbytes or segment.lent):
                    segment.close()
                    segment.path.unlink(missing_ok=True)
                    del self._segments[name]
                elif of != rank and of not in living:
                    self._give_up_unused(name)

    def give_back(self, rank: int, *, closed: bool) -> None:
        """Remove the segments of a rank that has left: the empty ones, with ``closed`` those that are kept too."""
        with self._making, self._lock:
            for name, segment in list(self._segments.items()):
                if rank_of(name) != rank or is_replica(name):
                    continue
                if closed and segment.state is SegmentState.KEPT:
                    segment.release()
                if segment.state is SegmentState.EMPTY:
                    self._give_up_unused(name)

    def give_up_replicas(self, since: float) -> None:
        """Remove the memory for copies that none has been made in since then (seconds since the epoch)."""
        with self._making, self._lock:
            for name, segment in list(self._segments.items()):
                unused = is_replica(name) and segment.state is SegmentState.EMPTY
                if unused and segment.path.stat().st_mtime < since:
                    self._give_up_unused(name)

    def give_up_kept(self) -> bool:
        """Remove the oldest snapshot that no save needs and nobody has open, for want of memory; whether there was one.

        Only where nobody restores from it any more. Lent ones last: a state may still lie in their memory.
        """
        with self._making, self._lock:
            kept = [(s.lent, s.sealed_at, n) for n, s in self._segments.items() if s.state is SegmentState.KEPT]
            for *_, name in sorted(kept):
                self._give_up_unused(name)
                if name not in self._segments:
                    return True
        return False

    def _give_up_unused(self, name: str) -> None:
        """A process of which this agent does not know yet may have the segment mapped: then it stays."""
        segment = self._segments.pop(name)
        segment.close()
        with contextlib.suppress(StorageError):
            if not reclaim(segment.path):
                self._segments[name] = Segment.open(segment.path, writable=True)

    def _has_room(self, nbytes: int, rank: int) -> bool:
        enough = has_room(self.folder, nbytes)
        if not enough:
            logger.warning(
                "rank %d gets one snapshot of %d bytes, not two: %s has %d bytes left. A save that falls due while "
                "another is written will wait; free memory, or give the container a larger /dev/shm",
                rank, nbytes, self.folder, shutil.disk_usage(self.folder).free,
            )  # fmt: skip
        return enough

    def sealed(self) -> list[SegmentInfo]:
        """All sealed snapshots, as the protocol sees them; what a dead process was filling is emptied."""
        with self._lock:
            for segment in self._segments.values():
                if segment.empty_if_abandoned():
                    logger.warning("%s: the process that was filling it has died; the segment is empty", segment.path)
            return list(self._whole())

    def _whole(self) -> Iterator[SegmentInfo]:
        for name, segment in self._segments.items():
            info = self._info(name, segment)
            if info is not None:
                yield info

    def _info(self, name: str, segment: Segment) -> SegmentInfo | None:
        state = segment.state
        save = segment.save if state in WHOLE else None
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
            fills=segment.fills,
            kept=state is SegmentState.KEPT,
            replica=save.replica,
            directory=save.directory,
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

    def free(self, info: SegmentInfo, living: Collection[int]) -> None:
        """This snapshot is not needed any more; nor is the memory, where its rank is not ``living`` on this host, or
        needs more by now.

        Of copies, the next one comes soon, or see `give_up_replicas`.
        """
        with self._lock:
            segment = self._segments.get(info.name)
            if segment is not None:
                segment.release(info.fills)
                outgrown = segment.data_nbytes < self._wanted.get(info.rank, 0)
                unused = segment.lent or (not is_replica(info.name) and (outgrown or info.rank not in living))
                if segment.state is SegmentState.EMPTY and unused:
                    self._give_up_unused(info.name)

    def keep(self, info: SegmentInfo) -> None:
        """No save needs this snapshot any more; it stays until its memory is needed.

        Of older ones that nobody can fill again, as their data is lent, the rank's newest stays until it is freed: this
        one may not be whole on all ranks. Those before go, as the next snapshots would have overwritten them.
        """
        with self._lock:
            segment = self._segments.get(info.name)
            if segment is None:
                return
            segment.keep(info.fills)
            lent = [(s.sealed_at, n) for n, s in self._segments.items() if s.lent and rank_of(n) == info.rank]
            for sealed_at, name in sorted(lent)[:-1]:
                if self._segments[name].state is SegmentState.KEPT and sealed_at < segment.sealed_at:
                    self._give_up_unused(name)

    # -- for other hosts and for restarts ---------------------------------------------------------------

    def parts(self, save: tuple[int, int], directory: str) -> list[Part]:
        """What lies here of a directory's save, ranks' own snapshots before replicas of others."""
        of = (save, directory)
        with self._lock:
            held = [(i, self._segments[i.name]) for i in self._whole() if (i.save, i.directory) == of]
        found = []
        for info, segment in sorted(held, key=lambda pair: pair[0].replica):
            layout = self.layout(info.fingerprint)
            if layout is not None:
                with contextlib.suppress(SaveError, DamagedError):
                    found.append(_part(info, segment, layout))
        return found

    def read(self, path: str, fills: int, start: int, nbytes: int) -> memoryview | None:
        """Bytes of a snapshot; None if its segment does not hold it any more."""
        with self._lock:
            segment = self._segments.get(Path(path).name)
        if segment is None:
            return None
        # By numpy, which lets other threads go on meanwhile.
        data = np.frombuffer(segment.data[start : start + nbytes], np.uint8).copy().data
        # After the copy: who fills it again changes this first.
        return data if segment.fills == fills and segment.state in WHOLE else None

    def layout(self, fingerprint: str) -> Layout | None:
        """A layout that lies beside the segments."""
        if fingerprint not in self._layouts:
            # Read once: they may be of thousands of leaves, and many ask at a restart.
            self._layouts.update(read_layouts(self.folder))
        return self._layouts.get(fingerprint)

    def room_for_replica(self, rank: int, nbytes: int) -> Segment:
        """A segment for the next copy of a rank's snapshot: an empty one, a new one, or that of the oldest copy.

        Raises:
            StorageError: there is no room.
        """
        with self._making:
            with self._lock:
                mine = {n: s for n, s in self._segments.items() if rank_of(n) == rank and is_replica(n)}
                for name, segment in list(mine.items()):
                    if segment.state is SegmentState.EMPTY and segment.data_nbytes < nbytes:
                        self._give_up_unused(name)
                        del mine[name]
            fitting = [s for s in mine.values() if s.data_nbytes >= nbytes and not s.lent]
            empty = next((s for s in fitting if s.state is SegmentState.EMPTY), None)
            if empty is not None:
                # Not given up as unused before it is filled.
                os.utime(empty.path)
                return empty
            if len(mine) >= _REPLICAS:
                kept = [s for s in mine.values() if s.state is SegmentState.KEPT]
                oldest = min(kept, key=lambda s: s.sealed_at, default=None)
                if oldest is None:
                    raise StorageError(f"{self.folder}: all {len(mine)} copies of rank {rank} are still needed")
                if oldest in fitting:
                    return oldest
                with self._lock:
                    oldest.release()
                    self._give_up_unused(oldest.path.name)
            if not has_room(self.folder, nbytes):
                free = shutil.disk_usage(self.folder).free
                raise StorageError(f"{self.folder}: a copy of {nbytes} bytes would leave too little of {free} free")
            names = (segment_name(rank, f"{REPLICA}{i}") for i in itertools.count())
            name = next(name for name in names if name not in mine)
            segment = Segment.create(self.folder / name, nbytes)
            with self._lock:
                self._segments[name] = segment
            return segment

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
        if self._owner >= 0:
            os.close(self._owner)
        with self._lock:
            for segment in self._segments.values():
                segment.close()
            self._segments.clear()
            shutil.rmtree(self.folder, ignore_errors=True)


def _part(info: SegmentInfo, segment: Segment, layout: Layout) -> Part:
    kinds = {leaf.name: leaf.kind for leaf in layout.leaves if leaf.kind != DEFAULT_KIND}
    table, sums = segment.read_table(), segment.sums()
    return Part(info.rank, str(segment.path), info.fills, segment.data_nbytes, table, sums, layout.tree, kinds)


def _trigger(text: str) -> Trigger:
    known: tuple[Trigger, ...] = ("cadence", "proposal", "explicit", "final", "memory")
    return next((t for t in known if t == text), "explicit")
