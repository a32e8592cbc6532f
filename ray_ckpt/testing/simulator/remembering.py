"""Judges of what lies in host memory: who may overwrite, free and restore it, and what a lost host must not cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_ckpt.testing.simulator.host import Agent, Writer
from ray_ckpt.testing.simulator.reading import Rows, as_rows
from ray_ckpt.testing.simulator.rule import newest
from ray_ckpt.testing.simulator.world import Violation, World

if TYPE_CHECKING:
    from ray_ckpt.protocol.messages import SegmentInfo
    from ray_ckpt.testing.simulator.host import Host
    from ray_ckpt.testing.simulator.memory import Slot
    from ray_ckpt.testing.simulator.oracles import LogOracle
    from ray_ckpt.testing.simulator.trainer import Trainer

Save = tuple[int, int]

COPIES = 2
_HEARD_S = 1.5
"""By then the coordinator has heard of what lies in memory, where no message is lost."""

_HARMLESS = frozenset({"kill_job", "store_error", "late_effect", "slow_store", "stale_list"})


def whole(slots: Iterable[Slot], save: Save) -> bool:
    """Whether these slots hold every rank's part of a save, divided by one plan."""
    plans: dict[tuple[str, int], set[int]] = {}
    for slot in slots:
        info = slot.info
        if slot.whole and info is not None and info.save == save:
            plans.setdefault((info.plan_id, info.world_size), set()).add(info.rank)
    return any(ranks == set(range(size)) for (_, size), ranks in plans.items())


def slots_of(hosts: Iterable[Host]) -> list[Slot]:
    """All segments of some hosts."""
    return [slot for host in hosts for slot in host.slots.values()]


def doubled(hosts: Sequence[Host], save: Save) -> bool:
    """Whether any one of these hosts may be lost, and the rest still holds all of a save."""
    return len(hosts) > 1 and all(whole(slots_of(h for h in hosts if h is not lost), save) for lost in hosts)


class MemoryOracle:
    """Watches the segments.

    ``since``: from when on a snapshot was whole for the first time; ``begun``: the generations that train.
    """

    def __init__(self, world: World, log: LogOracle) -> None:
        self._world = world
        self._log = log
        self._seen: dict[tuple[Save, str, int], dict[int, set[str]]] = {}
        self._taken: dict[tuple[int, Save], Rows] = {}
        self.since: dict[Save, float] = {}
        self._closed: dict[int, set[int]] = {}
        self._given_up: set[Save] = set()
        self.begun: set[int] = set()

    def filling(self, host: Host, slot: Slot) -> None:
        """Somebody begins to fill a segment."""
        mine = [s for s in host.slots.values() if (s.rank, s.replica) == (slot.rank, slot.replica)]
        limit = COPIES if slot.replica else self._world.scenario.slots
        self._require(len(mine) <= limit, f"{host.name} has {len(mine)} segments for rank {slot.rank}")
        self._require(slot.state != "sealed", f"{slot.name} is overwritten while it holds {slot.info}")
        self._require(slot.state != "filling" or not slot.owner or not slot.owner.alive, f"{slot.name} is filled twice")
        if host.agent is not None:
            self._require_unused(slot, host.agent, "overwritten")

    def sealed(self, host: Host, slot: Slot) -> None:
        """A snapshot or a copy of one is declared whole."""
        assert slot.info is not None
        rows = as_rows(entry for writer in slot.contents for entry in writer)
        taken = self._taken.setdefault((slot.info.rank, slot.info.save), rows)
        self._require(rows == taken, f"{slot.name} holds {rows}, but {taken} was taken")
        self._require(slot.replica == slot.info.replica, f"{slot.name} is sealed as {slot.info}")
        self._require(not host.gone, f"{slot.name} is sealed on a host that is gone")
        info = slot.info
        self._seen.setdefault((info.save, info.plan_id, info.world_size), {}).setdefault(info.rank, set()).add(
            host.name
        )
        if whole(slots_of(self._world.cluster.running), info.save):
            self.since.setdefault(info.save, self._world.now)

    def seen(self, save: Save, hosts: int = 1) -> bool:
        """Whether each rank's part of a save has lain on so many hosts, at whatever times.

        What is known of a host's memory is older than what lies there, so more cannot be asked of who decides.
        """
        return any(
            len(parts) == size and all(len(where) >= hosts for where in parts.values())
            for (of, _, size), parts in self._seen.items()
            if of == save
        )

    def given_up(self, save: Save) -> None:
        """A copy of a part of it will not be made: what came before need not be kept for its sake."""
        self._given_up.add(save)

    def kept(self, slot: Slot, segment: SegmentInfo, agent: Agent) -> None:
        """A segment may be overwritten from now on."""
        self._require_unused(slot, agent, "given up")
        self._require_held(slot, segment, ("sealed",))

    def leaving(self, trainer: Trainer) -> None:
        """A rank ends by itself."""
        if trainer.logic.closed and trainer.logic.generation is not None:
            self._closed.setdefault(trainer.logic.generation, set()).add(trainer.rank)

    def freed(self, slot: Slot, segment: SegmentInfo, agent: Agent) -> None:
        """A segment is emptied: what a restart would take instead must have been there."""
        self._require_unused(slot, agent, "freed")
        self._require_held(slot, segment, ("sealed", "kept"))
        generation, best = self._log.top["generation"], newest(self._log.top)
        if generation and len(self._closed.get(generation["number"], ())) == generation["world_size"]:
            saved = best is not None and (best["generation"], best["step"]) >= segment.save
            self._require(saved, f"{slot.name} is freed at the end of the job, and {segment.save} is newer than {best}")
            return
        hosts = self._world.cluster.hosts
        later = {save for save, *_ in self._seen if save > segment.save}
        newer = any(self.seen(save) for save in later)
        lost = not newer and whole(slots_of(hosts), segment.save)
        self._require(not lost, f"{slot.name} with {segment.save} is freed, and nothing newer was ever whole")
        copied = self._world.scenario.replicas and self._world.cluster.is_spread
        newer = not copied or any(self.seen(save, 2) or save in self._given_up for save in later)
        lost = not newer and doubled(hosts, segment.save)
        self._require(not lost, f"{slot.name} with {segment.save} is freed, and nothing newer could lose a host")
        view = agent.logic.view
        chosen = generation is not None and generation["snapshot"] and tuple(generation["snapshot"]) == segment.save
        if chosen and view is not None and view.oldest_generation == generation["number"]:
            begun = generation["number"] in self.begun
            self._require(begun, f"{slot.name} is freed while generation {generation} reads it")

    def _require_unused(self, slot: Slot, agent: Agent, what: str) -> None:
        """A zombie of an agent that is gone notices that the segment holds something else."""
        writers = [w.name for w in slot.users if isinstance(w, Writer) and w.alive and w.agent is agent]
        self._require(not writers, f"{slot.name} is {what} while {writers} use it")

    def _require_held(self, slot: Slot, segment: SegmentInfo, states: Collection[str]) -> None:
        same = slot.info == replace(segment, fills=0, kept=False)
        text = f"{slot.name} is {slot.state} with {slot.info}, but let go for {segment}"
        self._require(same and slot.state in states, text)

    @staticmethod
    def _require(holds: bool, text: str) -> None:
        if not holds:
            raise Violation("memory", text)


class RecallOracle:
    """Judges the choice of a snapshot, by the records in the log and what ever lay in memory."""

    def __init__(self, world: World, memory: MemoryOracle) -> None:
        self._world = world
        self._memory = memory

    def sealed(self, before: Any, record: Any) -> None:
        """A generation was sealed, or takes something else to start from."""
        new, old = record["generation"], before["generation"]
        best = newest(before)
        commit = (best["generation"], best["step"]) if best else (-1, -1)
        if new["snapshot"] is None:
            if new["round"] == 1 and old is not None:
                self._judge_missed(old, commit)
            return
        save = (int(new["snapshot"][0]), int(new["snapshot"][1]))
        self._require(old is not None, f"{new} takes a snapshot of nobody")
        if new["round"] == 1:
            eligible = save[0] == old["number"] or save == _save_of(old)
            self._require(newest(record) == best, f"a snapshot was taken, and the newest checkpoint is no more {best}")
        else:
            tried = _save_of(old) or commit
            eligible = save[0] == tried[0] and save < tried
            left = newest(record)
            commit = (left["generation"], left["step"]) if left else (-1, -1)
            self._require(commit < tried, f"{tried} cannot be read, and {left} is the newest checkpoint")
        self._require(eligible, f"generation {new['number']} takes {save}, but the one before is {old}")
        self._require(save > commit, f"{save} is taken from memory, {commit} is committed")
        self._require(self._memory.seen(save), f"{save} was never whole in memory")
        self._require(new["restored_step"] == save[1], f"{new} names another step than its snapshot")
        if new["round"] > 1:
            return
        self._judge_missed(old, max(save, commit))

    def _judge_missed(self, old: Any, taken: Save) -> None:
        """Where nothing but the job dies, the newest whole snapshot is found."""
        scenario = self._world.scenario
        wish = self._world.wish
        if scenario.faults - {"kill_job"} or scenario.crashes or scenario.lose_at or wish is None:
            return
        if wish.kind != "newest" or wish.stored:
            return
        slots, heard = slots_of(self._world.cluster.running), self._world.now - _HEARD_S
        for save, since in self._memory.since.items():
            eligible = save[0] == old["number"] or save == _save_of(old)
            there = since < heard and whole(slots, save)
            self._require(not eligible or not there or save <= taken, f"{save} lies in memory, but {taken} was taken")

    @staticmethod
    def is_excused(world: World) -> bool:
        """Whether a snapshot may be gone by the time that it is read."""
        scenario = world.scenario
        return bool(scenario.faults - _HARMLESS or scenario.crashes or scenario.lose_at)

    @staticmethod
    def _require(holds: bool, text: str) -> None:
        if not holds:
            raise Violation("recall", text)


class SavingOracle:
    """A save whose parts all lie on other hosts than the one that is lost must commit, where nothing else fails."""

    def __init__(self, world: World, log: LogOracle) -> None:
        self._world = world
        self._log = log
        self._losses = 0
        self.owed: set[Save] = set()

    def host_lost(self, lost: Host) -> None:
        """A host is about to be gone."""
        world, top = self._world, self._log.top
        self._losses += 1
        self.owed.clear()
        fair = not world.scenario.faults and not world.scenario.crashes and self._losses == 1
        if not fair or not world.scenario.replicas or top is None or top["generation"] is None:
            return
        heard = world.now - _HEARD_S
        there = [s for s in slots_of(h for h in world.cluster.running if h is not lost) if s.sealed_at < heard]
        there = [s for s in there if s.state == "sealed" and s.info is not None and s.info.trigger != "memory"]
        decided = {(c["generation"], c["step"]) for c in self._log.commits} | self._aborted
        for save in {s.info.save for s in there if s.info is not None} - decided:
            if save[0] == top["generation"]["number"] and whole(there, save):
                world.tell("%s must be committed without %s", save, lost.name)
                self.owed.add(save)

    @property
    def _aborted(self) -> set[Save]:
        number = self._log.generations
        return {(number.get(r["attempt"], -1), r["step"]) for r in self._log.history if r["kind"] == "abort"}

    def judge_end(self) -> None:
        """All is quiet."""
        done = {(c["generation"], c["step"]) for c in self._log.commits}
        if self._world.scenario.lose_head:
            # Another coordinator opens no save once the next start is there; but that begins from the snapshot.
            sealed = [r["generation"] for r in self._log.history if r["kind"] == "seal"]
            done |= {save for save in self.owed if any((_save_of(g) or (-1, -1)) >= save for g in sealed)}
        missing = self.owed - done
        if missing:
            raise Violation("saving", f"{sorted(missing)} lay whole on the other hosts, and was not committed")


def _save_of(generation: Any) -> Save | None:
    held = generation["snapshot"]
    return (held[0], held[1]) if held else None
