"""Copies of snapshots on other hosts, pulled from their agents piece by piece, as `ray_ckpt.agent.mirror` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_ckpt.protocol.host import Mirror
from ray_ckpt.protocol.messages import SegmentInfo
from ray_ckpt.testing.simulator.memory import Slot
from ray_ckpt.testing.simulator.world import Violation

if TYPE_CHECKING:
    from ray_ckpt.testing.simulator.host import Agent, Host

REPLICAS = 2
_PATIENCE_S = 5.0
_PIECES = 2
_AGAIN_S = 0.1


class Asked:
    """The source's side: asks the peer, and waits for its answer no longer than it has patience."""

    def __init__(self, agent: Agent, action: Mirror) -> None:
        if action.peer == agent.where:
            raise Violation("memory", f"{agent.where} is to copy its own snapshots")
        self._agent = agent
        self._segment = action.segment
        self._open = True
        agent.later(_PATIENCE_S, lambda: self._end(whole=False))
        peer = agent.world.cluster.named(action.peer)
        if peer is not None:
            agent.world.send(agent.where, peer.name, lambda: self._arrive(peer))

    def _arrive(self, peer: Host) -> None:
        if peer.agent is not None and peer.agent.alive:
            begin(peer.agent, self._agent.host, self._segment, self._answer)

    def _answer(self, peer: str, whole: bool) -> None:
        self._agent.world.send(peer, self._agent.where, lambda: self._end(whole=whole))

    def _end(self, *, whole: bool) -> None:
        """The peer has its copy, or will not have one."""
        if self._open and self._agent.alive:
            self._open = False
            if not whole:
                self._agent.world.oracles.memory.given_up(self._segment.save)
            self._agent.logic.on_mirrored(self._segment, whole=whole)
            self._agent.kick()


class Copy:
    """The peer's side: one snapshot on its way into this host's memory. It dies with the agent."""

    def __init__(self, agent: Agent, source: Host, segment: SegmentInfo, done: Callable[[str, bool], None]) -> None:
        self._agent = agent
        self._source = source
        self._done = done
        self._pieces: list[list[Any]] = []
        if any(slot.state == "filling" and slot.owner is agent for slot in agent.host.copies_of(segment.rank)):
            # One copy of a rank's snapshots at a time, as the agent's lock has it: a message may come twice.
            agent.later(_AGAIN_S, lambda: begin(agent, source, segment, done))
            return
        if agent.logic.has_copy(segment):
            self._end(whole=True)
            return
        found = source.find(segment.rank, segment.save, agent.where)
        room = self._room(segment.rank)
        if found is None or room is None:
            what = "is gone" if found is None else "has no room"
            agent.world.tell("%s cannot copy rank %d of %s: it %s", agent.name, segment.rank, segment.save, what)
            self._end(whole=False)
            return
        self._from, self._fills = found, found.fills
        self._slot = room
        agent.world.oracles.memory.filling(agent.host, room)
        room.begin(agent)
        self._filling = room.fills
        agent.later(agent.world.rng.uniform(0.02, 0.5), self._pull)

    def _room(self, rank: int) -> Slot | None:
        """An empty slot for copies of this rank, a new one, or that of the oldest copy that may go."""
        host = self._agent.host
        mine = host.copies_of(rank)
        free = [slot for slot in mine if slot.free]
        empty = next((slot for slot in free if slot.state != "kept"), None)
        if empty is not None or len(mine) >= REPLICAS:
            return empty or min(free, key=lambda slot: slot.sealed_at, default=None)
        return host.add_slot(rank, f"copy{len(mine)}", replica=True)

    def _pull(self) -> None:
        """The next piece; one that has come too late is noticed after it was read."""
        self._agent.world.point(self._agent)
        reached = self._agent.world.talks(self._source.name, self._agent.where)
        lives = not self._source.gone and self._source.agent is not None and self._source.agent.alive
        if not (reached and lives and self._from.whole and self._from.fills == self._fills):
            self._slot.release()
            self._end(whole=False)
            return
        count, got = len(self._from.contents), len(self._pieces)
        stop = count if got + 1 == _PIECES else count // _PIECES
        self._pieces.append(self._from.contents[sum(map(len, self._pieces)) : stop])
        if self.complete:
            self._seal()
        else:
            self._agent.later(self._agent.world.rng.uniform(0.02, 0.5), self._pull)

    @property
    def complete(self) -> bool:
        """Whether all pieces are here."""
        return len(self._pieces) == _PIECES

    def _seal(self) -> None:
        info, layout = self._from.info, self._from.layout
        assert info is not None
        assert layout is not None
        contents = [rows for piece in self._pieces for rows in piece]
        copy = replace(info, replica=True, name=self._slot.name)
        self._slot.seal(copy, layout, contents, self._agent.world.now, keep=copy.trigger == "memory")
        self._agent.world.tell("%s has a copy of rank %d of %s", self._agent.name, info.rank, info.save)
        self._agent.world.oracles.memory.sealed(self._agent.host, self._slot)
        self._end(whole=True)

    def _end(self, *, whole: bool) -> None:
        self._agent.kick()
        self._done(self._agent.where, whole)


def begin(agent: Agent, source: Host, segment: SegmentInfo, done: Callable[[str, bool], None]) -> None:
    """Have this agent copy a snapshot."""
    Copy(agent, source, segment, done)
