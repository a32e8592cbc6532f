"""What an agent tells other hosts of the snapshots in its memory, and how they ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.agent.mirror import CHUNK_NBYTES, Piece
from ray_ckpt.coordinator import find_agent
from ray_ckpt.errors import ObjectMissingError, UnavailableError
from ray_ckpt.restore import MappedSource, Part, Source, StoredCheckpoint, open_snapshot

_CALL_S = 30.0
_READ_S = 60.0


class RemoteSource(Source):
    """A segment in the memory of another host, read through that host's agent."""

    def __init__(self, agent: Any, part: Part, host: str) -> None:
        self._agent = agent
        self._part = part
        self._host = host

    def read_into(self, start: int, buffer: memoryview) -> None:
        starts = range(0, len(buffer), CHUNK_NBYTES)
        # All at once: each is a message to the other host and one back.
        asked = [ask(self._agent, self._part, start + at, min(CHUNK_NBYTES, len(buffer) - at)) for at in starts]
        for at, wait in zip(starts, asked, strict=True):
            found = wait()
            if found is None:
                raise ObjectMissingError(f"{self._part.path} on host {self._host}: the snapshot is gone")
            data = memoryview(found[0])
            buffer[at : at + len(data)] = data


def ask(agent: Any, part: Part, start: int, nbytes: int) -> Callable[[], Piece]:
    """Begin to read bytes of another host's snapshot; what is given waits for them.

    That raises `UnavailableError` if the host does not answer.
    """
    ref = agent.read.remote(part.path, part.fills, start, nbytes)

    def wait() -> Piece:
        try:
            found: Piece = ray.get(ref, timeout=_READ_S)
        except (RayError, TimeoutError) as error:
            raise UnavailableError(f"{part.path}: its host does not answer: {error}") from error
        return found

    return wait


def recall(url: str, save: tuple[int, int], holders: Sequence[str], here: str) -> StoredCheckpoint:
    """The snapshot of a save, whose parts lie with these hosts, by rank; ``here`` is this process's host.

    Raises:
        UnavailableError: a host does not answer.
        ObjectMissingError: a part is gone.
        DamagedError: the parts do not belong together.
    """
    agents = {host: find_agent(url, host) for host in dict.fromkeys(holders)}
    try:
        refs = {host: agent.parts.remote(save) for host, agent in agents.items()}
        told: dict[str, list[Part]] = dict(zip(refs, ray.get(list(refs.values()), timeout=_CALL_S), strict=True))
    except (RayError, TimeoutError) as error:
        raise UnavailableError(f"not all of the hosts {sorted(agents)} answered: {error}") from error
    parts, sources = [], []
    for rank, host in enumerate(holders):
        part = next((p for p in told[host] if p.rank == rank), None)
        if part is None:
            raise ObjectMissingError(f"host {host} has no snapshot of rank {rank} of step {save[1]} any more")
        parts.append(part)
        sources.append(MappedSource(part.path, part.fills) if host == here else RemoteSource(agents[host], part, host))
    return open_snapshot(f"the memory of {len(agents)} hosts", parts, sources)
