"""What a restart can find in host memory: which snapshots are whole, where they lie, and how long they are kept.

See docs/design/0004-memory-tiers.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import Holders, SegmentInfo
from ray_ckpt.protocol.planner import replica_mismatch
from ray_ckpt.protocol.roster import Roster, Save
from ray_ckpt.types import Checkpoint


@dataclass(slots=True)
class Snapshot:
    """One save's snapshots, wherever they lie: by rank, the hosts and what each holds."""

    parts: dict[int, dict[str, SegmentInfo]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every rank's part is there, and all were divided by one plan."""
        some = [next(iter(held.values())) for held in self.parts.values()]
        return len({(s.plan_id, s.world_size) for s in some}) == 1 and len(some) == some[0].world_size

    @property
    def agrees(self) -> bool:
        """No array that several ranks hold is known to differ."""
        return replica_mismatch({rank: next(iter(held.values())) for rank, held in self.parts.items()}) is None

    @property
    def doubled(self) -> bool:
        """Every rank's part lies on two hosts at least."""
        return all(len(held) > 1 for held in self.parts.values())

    @property
    def settled(self) -> bool:
        """Every rank's part lies on two hosts, or will not."""
        return all(len(held) > 1 or any(s.alone for s in held.values()) for held in self.parts.values())

    @property
    def holders(self) -> Holders:
        """By rank, the hosts to ask: the rank's own first."""
        return tuple(
            tuple(sorted(held, key=lambda host: (held[host].replica, host))) for _, held in sorted(self.parts.items())
        )


class Recall:
    """The snapshots on hosts that live. Saves are (generation, step); later ones compare greater."""

    def __init__(self, ledger: Ledger, roster: Roster) -> None:
        self._ledger = ledger
        self._roster = roster
        self._seen = -1
        self._snapshots: dict[Save, Snapshot] = {}
        self._agree: dict[Save, bool] = {}

    @property
    def whole(self) -> dict[Save, Snapshot]:
        """All that are whole. Of a plan that fits no more, or of a start long over, as well."""
        if self._seen != self._roster.changed:
            self._seen = self._roster.changed
            found: dict[Save, Snapshot] = {}
            for rank, save, held in self._roster.snapshots():
                there = {host: info for host, info in held.items() if self._roster.can_tell(host)}
                if there:
                    found.setdefault(save, Snapshot()).parts[rank] = there
            complete = {save: s for save, s in found.items() if s.complete}
            # Once a save: it takes long with many ranks, and what was taken does not change.
            self._agree = {s: self._agree[s] if s in self._agree else complete[s].agrees for s in complete}
            self._snapshots = {save: s for save, s in complete.items() if self._agree[save]}
        return self._snapshots

    def holders(self, save: Save | None) -> Holders:
        """Where the parts of a snapshot lie, by rank; empty unless it is whole."""
        found = self.whole.get(save) if save is not None else None
        return found.holders if found is not None else ()

    def newer_than(self, checkpoint: Checkpoint | None, tried: Save | None = None) -> Save | None:
        """The newest snapshot that a start may take instead of ``checkpoint``, the newest in the store; None for none.

        Of the last generation, whatever it is: its steps follow on all that it restored. Of an older one only what
        the last one started from itself. Instead of what the last one has ``tried`` to start from, in vain: what that
        one's generation had taken before.
        """
        if tried is None:
            eligible = self._eligible
        else:
            eligible = [save for save in self.whole if save[0] == tried[0] and save < tried]
        newest = max(eligible, default=None)
        if newest is None or (checkpoint is not None and (checkpoint.generation, checkpoint.step) >= newest):
            return None
        return newest

    @property
    def _eligible(self) -> list[Save]:
        last = self._ledger.head.generation
        return [save for save in self.whole if last is not None and (save[0] == last.number or save == last.snapshot)]

    @property
    def newest(self) -> Save | None:
        """The newest whole snapshot."""
        return max(self.whole, default=None)

    @property
    def kept_from(self) -> Save | None:
        """The newest whole snapshot that a start may take, of all where it may take none; or the one before it of the
        same generation, should the newest not be readable. Those before need not be kept.

        What processes took that a newer start has left behind may be newer than what that one began with.
        """
        last = sorted(self._eligible or self.whole)[-2:]
        return next((save for save in last if save[0] == last[-1][0]), None)

    @property
    def newest_is_whole(self) -> bool:
        """Whether all parts are there of the newest snapshot of which any part lies anywhere, and no later generation
        than its own has been.
        """
        last, newest = self._ledger.head.generation, self.newest
        seen = [save for _, save, held in self._roster.snapshots() if held]
        return newest is not None and last is not None and max(seen) == newest and newest[0] == last.number

    @property
    def newest_doubled(self) -> Save | None:
        """The newest whole snapshot that any one host may be lost of."""
        return max((save for save, s in self.whole.items() if s.doubled), default=None)

    @property
    def newest_settled(self) -> Save | None:
        """The newest of which no further copy is to come: of those that a start may take, else of all."""
        whole = self.whole
        return max((save for save in self._eligible or whole if whole[save].settled), default=None)


def peers(domains: dict[str, str]) -> dict[str, str]:
    """For each host, by its failure domain, the one that copies its snapshots: each copies one other's.

    Where no domain has more than half of the hosts, it is one of another domain. A host alone has none.
    """
    order = sorted(domains, key=lambda host: (domains[host], host))
    if len(order) < 2:
        return {}
    largest = max(Counter(domains.values()).values())
    shift = largest if largest < len(order) else 1
    return {host: order[(i + shift) % len(order)] for i, host in enumerate(order)}
