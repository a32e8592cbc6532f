"""What an agent tells other hosts of the snapshots in its memory, and how they ask for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.agent.mirror import CHUNK_NBYTES, Piece
from ray_ckpt.coordinator import find_agent
from ray_ckpt.errors import ObjectMissingError, UnavailableError
from ray_ckpt.protocol.messages import Holders
from ray_ckpt.restore import MappedSource, Part, Source, StoredCheckpoint, open_snapshot

logger = logging.getLogger(__name__)

_CALL_S = 10.0
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


def recall(url: str, save: tuple[int, int], holders: Holders, here: str) -> StoredCheckpoint:
    """The snapshot of a save, whose parts lie with these hosts, by rank; ``here`` is this process's host.

    Of the hosts that hold a part it is enough that one is still there.

    Raises:
        ObjectMissingError: a part is gone, with its host or from its memory.
        DamagedError: the parts do not belong together.
    """
    agents, told = _ask_all(url, save, {host for hosts in holders for host in hosts})
    parts, sources = [], []
    for rank, hosts in enumerate(holders):
        found = next(((host, part) for host in hosts for part in told.get(host, ()) if part.rank == rank), None)
        if found is None:
            raise ObjectMissingError(
                f"rank {rank}'s snapshot of step {save[1]} was with {' and '.join(hosts)}, and is gone"
            )
        host, part = found
        parts.append(part)
        sources.append(MappedSource(part.path, part.fills) if host == here else RemoteSource(agents[host], part, host))
    return open_snapshot(f"the memory of {len(agents)} hosts", parts, sources)


def _ask_all(url: str, save: tuple[int, int], hosts: Collection[str]) -> tuple[dict[str, Any], dict[str, list[Part]]]:
    """The agents of those hosts that answer, and what they hold. One that died a moment ago does not."""
    agents: dict[str, Any] = {}
    for host in hosts:
        with contextlib.suppress(UnavailableError):
            agents[host] = find_agent(url, host)
    refs = {host: agent.parts.remote(save) for host, agent in agents.items()}
    if refs:
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=_CALL_S)
    told: dict[str, list[Part]] = {}
    for host, ref in refs.items():
        try:
            told[host] = ray.get(ref, timeout=0)
        except (RayError, TimeoutError) as error:
            logger.warning("host %s does not tell what it holds of step %d: %s", host, save[1], error)
    return {host: agents[host] for host in told}, told
