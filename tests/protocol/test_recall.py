"""What a start may take from host memory, and which host copies which one's snapshots."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from ray_ckpt.protocol.flows import Flows
from ray_ckpt.protocol.ledger import Ledger
from ray_ckpt.protocol.messages import HostReport, Nodes, SegmentInfo
from ray_ckpt.protocol.recall import Recall, peers
from ray_ckpt.protocol.roster import Roster
from ray_ckpt.types import Checkpoint, Generation, LogRecord

COMMIT = Checkpoint(step=6, prefix="p", attempt="a", generation=3, time=0.0, nbytes=0, num_shards=1, world_size=2)


def part(rank: int, generation: int, step: int, *, plan: str = "plan", world_size: int = 2) -> SegmentInfo:
    """One rank's snapshot."""
    name = f"r{rank}-{generation}-{step}"
    return SegmentInfo(rank, generation, step, world_size, plan, "cadence", 1, rank, world_size, name=name)


class Memory:
    """What hosts report, and the last generation in the log."""

    def __init__(self, last: Generation) -> None:
        ledger = Ledger(Flows(), "me")
        ledger._head = LogRecord(1, "seal", 1, "me", 0.0, (), (), last, 0)
        self.roster = Roster()
        self.recall = Recall(ledger, self.roster)
        self.ledger = ledger
        self._sequence = 0

    def hold(self, host: str, *segments: SegmentInfo) -> None:
        """All that lies on a host now."""
        self._sequence += 1
        self.roster.update(HostReport(host, "1", self._sequence, segments=segments), 0.0)


def both(generation: int, step: int) -> Memory:
    """Each of two ranks has a snapshot on its own host; generation 3 was the last."""
    memory = Memory(Generation(3, 2, None))
    for rank in range(2):
        memory.hold(f"h{rank}", part(rank, generation, step))
    return memory


def newest(memory: Memory) -> tuple[int, int] | None:
    """The newest whole snapshot, as it is now."""
    return memory.recall.newest


def test_a_snapshot_is_whole_once_every_rank_has_its_part() -> None:
    memory = Memory(Generation(3, 2, None))
    memory.hold("h0", part(0, 3, 7))
    assert newest(memory) is None
    memory.hold("h1", part(1, 3, 7))
    assert newest(memory) == (3, 7)
    assert memory.recall.holders((3, 7)) == (("h0",), ("h1",))
    memory.hold("h1", part(1, 3, 8))
    assert newest(memory) is None
    assert memory.recall.holders((3, 7)) == ()


@pytest.mark.parametrize("other", [part(1, 3, 7, plan="another"), part(1, 3, 7, world_size=3)])
def test_parts_of_several_plans_make_no_whole(other: SegmentInfo) -> None:
    memory = both(3, 7)
    memory.hold("h1", other)
    assert newest(memory) is None


def test_parts_whose_replicas_differ_make_no_whole() -> None:
    memory = both(3, 7)
    memory.hold("h0", replace(part(0, 3, 7), digests=(("w", 1),)))
    memory.hold("h1", replace(part(1, 3, 7), digests=(("w", 1),)))
    assert newest(memory) == (3, 7)
    other = Memory(Generation(3, 2, None))
    other.hold("h0", replace(part(0, 3, 7), digests=(("w", 1),)))
    other.hold("h1", replace(part(1, 3, 7), digests=(("w", 2),)))
    assert newest(other) is None


def test_a_host_that_is_dead_holds_nothing() -> None:
    memory = both(3, 7)
    assert memory.roster.told(Nodes(dead=frozenset({"h1"})))
    assert newest(memory) is None


def test_a_copy_takes_the_place_of_a_lost_original() -> None:
    memory = both(3, 7)
    assert memory.recall.newest_doubled is None
    memory.hold("h0", part(0, 3, 7), replace(part(1, 3, 7), replica=True, name="copy"))
    assert memory.recall.newest_doubled is None
    memory.hold("h1", part(1, 3, 7), replace(part(0, 3, 7), replica=True, name="copy"))
    assert memory.recall.newest_doubled == (3, 7)
    assert memory.recall.holders((3, 7)) == (("h0", "h1"), ("h1", "h0"))
    memory.roster.told(Nodes(dead=frozenset({"h1"})))
    assert memory.recall.holders((3, 7)) == (("h0",), ("h0",))
    assert memory.recall.newest_doubled is None


def test_what_a_start_left_behind_does_not_outdate_what_the_next_one_began_with() -> None:
    memory = Memory(Generation(3, 2, 4, snapshot=(2, 4)))
    for rank in range(2):
        memory.hold(f"h{rank}", part(rank, 2, 4), part(rank, 2, 5))
    assert memory.recall.kept_from == (2, 4)
    assert memory.recall.newest_settled is None, "as its copies are still to come"
    for rank in range(2):
        memory.hold(f"h{rank}", part(rank, 2, 4), part(rank, 2, 5), part(rank, 3, 5))
    assert memory.recall.kept_from == (3, 5)


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        ((3, 7), (3, 7)),
        ((3, 6), None),
        ((3, 5), None),
        ((2, 9), None),
        ((4, 7), None),
    ],
)
def test_of_the_last_generation_what_is_newer_than_the_newest_commit(
    held: tuple[int, int], taken: tuple[int, int] | None
) -> None:
    assert both(*held).recall.newer_than(COMMIT) == taken


def test_what_the_last_generation_started_from_may_be_taken_again() -> None:
    memory = both(2, 9)
    memory.ledger._head = replace(memory.ledger.head, generation=Generation(3, 2, 9, snapshot=(2, 9)))
    old = replace(COMMIT, generation=2, step=8)
    assert memory.recall.newer_than(old) == (2, 9)
    assert memory.recall.newer_than(None) == (2, 9)
    assert memory.recall.newer_than(COMMIT) is None
    assert memory.recall.newer_than(old, (2, 9)) is None


def test_what_proved_unreadable_is_not_taken_again() -> None:
    memory = Memory(Generation(3, 2, None))
    for rank in range(2):
        memory.hold(f"h{rank}", part(rank, 3, 7), part(rank, 3, 8))
    assert memory.recall.newer_than(COMMIT) == (3, 8)
    # By then the next generation is in the log.
    memory.ledger._head = replace(memory.ledger.head, generation=Generation(4, 2, 8, snapshot=(3, 8)))
    assert memory.recall.newer_than(COMMIT, (3, 8)) == (3, 7)
    assert memory.recall.newer_than(COMMIT, (3, 7)) is None
    assert memory.recall.newer_than(replace(COMMIT, step=7), (3, 8)) is None


def test_instead_of_a_damaged_checkpoint_what_its_own_generation_had_taken_before() -> None:
    memory = both(3, 5)
    memory.ledger._head = replace(memory.ledger.head, generation=Generation(4, 2, 6))
    older = replace(COMMIT, step=4)
    assert memory.recall.newer_than(older, (3, 6)) == (3, 5)
    assert memory.recall.newer_than(older, (2, 6)) is None
    assert memory.recall.newer_than(None, (4, 6)) is None


def test_the_one_before_the_newest_is_kept_too_if_it_is_of_the_same_generation() -> None:
    memory = both(3, 7)
    assert memory.recall.kept_from == (3, 7)
    for rank in range(2):
        memory.hold(f"h{rank}", *(part(rank, 3, step) for step in (6, 7, 8)))
    assert memory.recall.kept_from == (3, 7)
    for rank in range(2):
        memory.hold(f"h{rank}", *(part(rank, 3, step) for step in (7, 8)), part(rank, 4, 9))
    memory.ledger._head = replace(memory.ledger.head, generation=Generation(4, 2, 8, snapshot=(3, 8)))
    assert memory.recall.kept_from == (4, 9)


def test_before_the_first_generation_there_is_nothing_to_take() -> None:
    memory = both(3, 7)
    memory.ledger._head = replace(memory.ledger.head, generation=None)
    assert memory.recall.newer_than(None) is None


LAYOUTS = [
    ("a",),
    ("a", "b"),
    ("a", "a"),
    ("a", "b", "c"),
    ("a", "a", "b", "b"),
    ("a", "a", "b"),
    ("a", "a", "a", "b", "b", "c"),
    ("a", "b", "b", "c", "c", "c"),
    ("a", "a", "a", "a"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids="".join)
def test_each_host_copies_one_other_and_one_of_another_domain_where_that_can_be(layout: tuple[str, ...]) -> None:
    domains = {f"h{i}": domain for i, domain in enumerate(layout)}
    found = peers(domains)
    if len(layout) == 1:
        assert found == {}
        return
    assert set(found) == set(found.values()) == set(domains)
    assert all(host != peer for host, peer in found.items())
    if 2 * max(layout.count(domain) for domain in layout) <= len(layout):
        assert all(domains[host] != domains[peer] for host, peer in found.items())


def test_peers_do_not_depend_on_the_order_in_which_hosts_are_named() -> None:
    domains = {"h0": "a", "h1": "b", "h2": "a", "h3": "b"}
    orders = [dict(items) for items in itertools.permutations(domains.items())]
    assert all(peers(order) == peers(domains) for order in orders)
