"""What an agent tells other hosts of the snapshots in its memory, and how they ask for it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.agent.mirror import CHUNK_NBYTES
from ray_ckpt.agent.wire import Connection, Door
from ray_ckpt.bundle import crc32c
from ray_ckpt.coordinator import find_agent
from ray_ckpt.errors import DamagedError, ObjectMissingError, UnavailableError
from ray_ckpt.protocol.messages import Holders
from ray_ckpt.restore import MappedSource, Part, Source, StoredCheckpoint, open_snapshot
from ray_ckpt.snapshot.space import has_room

logger = logging.getLogger(__name__)

_CALL_S = 30.0
_READ_S = 60.0

_ROOM = 1.2
"""Times the size of the snapshots of this host that must be free beside them before their memory is lent."""

_CONNECTIONS = 4
"""Of a thread: a process has a number of threads that read, and files that it can open."""
_SHUT_S = 60.0

_own = threading.local()
"""A thread's connections, by door: a socket carries one answer at a time."""

_shut: dict[Door, float] = {}
"""Doors that did not open, and until when they are not tried again (monotonic)."""


def _drop(door: Door | None) -> None:
    connection = _own.__dict__.get("connections", {}).pop(door, None)
    if connection is not None:
        connection.close()


class RemoteSource(Source):
    """A segment in the memory of another host, read through its door; where that is shut to us, through Ray's calls."""

    def __init__(self, agent: Any, door: Door | None, part: Part, host: str) -> None:
        self._agent = agent
        self._door = door
        self._part = part
        self._host = host

    def read_into(self, start: int, buffer: memoryview) -> None:
        used_before = self._door in _own.__dict__.get("connections", {})
        try:
            found = self._fetch(start, buffer)
        except OSError as error:
            if not used_before:
                raise self._unavailable(error) from error
            # One that was idle may have been closed.
            try:
                found = self._fetch(start, buffer)
            except OSError as again:
                raise self._unavailable(again) from again
        if not found:
            raise ObjectMissingError(f"{self._part.path} on host {self._host}: the snapshot is gone")

    def _unavailable(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"{self._part.path} on host {self._host}: {error}")

    def _fetch(self, start: int, buffer: memoryview) -> bool:
        """One try; False if the snapshot is gone."""
        connection = self._connection()
        if connection is None:
            return self._ask(start, buffer)
        try:
            return connection.read_into(self._part.path, self._part.fills, start, buffer)
        except (OSError, DamagedError) as error:
            # What is left of the answer must not be taken for the next one.
            _drop(self._door)
            if isinstance(error, DamagedError):
                raise self._unavailable(error) from error
            raise

    def _connection(self) -> Connection | None:
        """This thread's; None where the door does not open."""
        door = self._door
        if door is None or _shut.get(door, 0.0) > time.monotonic():
            return None
        connections: dict[Door, Connection] = _own.__dict__.setdefault("connections", {})
        if door not in connections:
            for old in list(connections)[: 1 - _CONNECTIONS]:
                # What is read lies sorted by hosts.
                _drop(old)
            try:
                connections[door] = Connection(door)
            except OSError as error:
                logger.warning("%r does not open (%s): reading through Ray, which is slower", door, error)
                _shut[door] = time.monotonic() + _SHUT_S
                return None
        return connections[door]

    def _ask(self, start: int, buffer: memoryview) -> bool:
        for at in range(0, len(buffer), CHUNK_NBYTES):
            with buffer[at : at + CHUNK_NBYTES] as chunk:
                try:
                    ref = self._agent.read.remote(self._part.path, self._part.fills, start + at, len(chunk))
                    found = ray.get(ref, timeout=_READ_S)
                except (RayError, TimeoutError) as error:
                    raise UnavailableError(f"{self._part.path}: its host does not answer: {error}") from error
                if found is None:
                    return False
                chunk[:] = memoryview(found[0])
                if crc32c(chunk) != found[1]:
                    raise DamagedError(f"{self._part.path}: bytes were changed on their way from host {self._host}")
        return True


def read_piece(memory: HostMemory, path: str, fills: int, start: int, nbytes: int) -> tuple[Any, int] | None:
    """The other side of Ray's calls: bytes of a snapshot in this host's memory and their crc32c; None if it is gone."""
    data = memory.read(path, fills, start, nbytes)
    # As an array: Ray hands that on without copying it.
    return None if data is None else (np.asarray(data), crc32c(data))


@contextlib.contextmanager
def recall(url: str, save: tuple[int, int], directory: str, holders: Holders, here: str) -> Iterator[StoredCheckpoint]:
    """While this runs, the snapshot of a save, whose parts lie with these hosts, by rank; ``here`` is this process's.

    ``directory``: see `types.LogRecord`; one that was deleted may have had a save of the same numbers.

    Of the hosts that hold a part it is enough that one is still there; the first that answers is read from.

    Raises:
        ObjectMissingError: a part is gone, with its host or from its memory.
        DamagedError: the parts do not belong together.
    """
    told = _ask_all(url, save, directory, {host for hosts in holders for host in hosts})
    lends = here in told and _can_be_replaced(told[here].parts)
    parts: list[Part] = []
    with contextlib.ExitStack() as stack:
        sources: list[Source] = []
        for rank, hosts in enumerate(holders):
            found = next(((h, part) for h in hosts if h in told for part in told[h].parts if part.rank == rank), None)
            if found is None:
                where = " and ".join(hosts)
                raise ObjectMissingError(f"rank {rank}'s snapshot of step {save[1]}, which lay on {where}, is gone")
            host, part = found
            parts.append(part)
            source: Source = (
                MappedSource(part.path, part.fills, lends=lends)
                if host == here
                else RemoteSource(told[host].agent, told[host].door, part, host)
            )
            stack.callback(source.close)
            sources.append(source)
        yield open_snapshot(f"the memory of {len(told)} hosts", parts, sources)


def _can_be_replaced(parts: Collection[Part]) -> bool:
    """Whether there is room for new memory in place of these segments, which is needed if their own is lent.

    All of this host: its ranks come here at the same time, and none makes memory before all have restored.
    """
    if not parts:
        return False
    folder, wanted = Path(next(iter(parts)).path).parent, sum(part.nbytes for part in parts)
    room = has_room(folder, int(_ROOM * wanted))
    if not room:
        logger.info("%d bytes of snapshots are copied, not lent: %s has no room for as many more", wanted, folder)
    return room


class _Told(NamedTuple):
    """One host's answer."""

    agent: Any
    door: Door | None
    parts: list[Part]


def _ask_all(url: str, save: tuple[int, int], directory: str, hosts: Collection[str]) -> dict[str, _Told]:
    """What those hosts hold that answer. One that died a moment ago does not."""
    agents: dict[str, Any] = {}
    for host in hosts:
        with contextlib.suppress(UnavailableError):
            agents[host] = find_agent(url, host)
    refs = {host: agent.parts.remote(save, directory) for host, agent in agents.items()}
    if refs:
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=_CALL_S)
    told: dict[str, _Told] = {}
    for host, ref in refs.items():
        try:
            told[host] = _Told(agents[host], *ray.get(ref, timeout=0))
        except (RayError, TimeoutError) as error:
            logger.warning("host %s does not tell what it holds of step %d: %s", host, save[1], error)
    return told
