"""Independent judges: they see the disk and what processes did, and share no code with what they judge.

files      I1, I3, I7: what the log lists is whole; one writer a path; nothing is deleted that may not be
tensorflow what the `checkpoint` file names is whole
log        I2, I4, I5: order, epochs, one commit for a save, the newest never goes back
commits    I9: a commit holds exactly the snapshots that all ranks of one start took at one step
training   I10, I6: one restore for all ranks, of the newest; what workers are told is true; stops at one step
memory     I8: no segment is freed or filled under a writer, nor freed too early; memory is bounded (`remembering`)
recall     what a start takes from memory: one whole save, of the last generation, newer than the newest commit
saving     one lost host of those with replicas costs no save
quiet      I6: when nothing fails any more, nothing is left waiting or lying about
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_ckpt.testing.simulator.disk import Mutation
from ray_ckpt.testing.simulator.reading import Read, Rows, as_rows
from ray_ckpt.testing.simulator.remembering import MemoryOracle, RecallOracle, SavingOracle
from ray_ckpt.testing.simulator.rule import LOG, damage_of, newest, parsed, top_record
from ray_ckpt.testing.simulator.scenario import GRACE_S
from ray_ckpt.testing.simulator.world import Violation, World

if TYPE_CHECKING:
    from ray_ckpt.protocol.messages import RestoreDecision
    from ray_ckpt.testing.simulator.job import Reader
    from ray_ckpt.testing.simulator.trainer import Trainer
    from ray_ckpt.types import Layout

_START_S = 25.0
"""The deadlines of a start: the saves before it are decided, hosts are heard of, the roll is called."""

STATE = "checkpoint"
CLAIMS = "_ray_ckpt/claims/"
_DATA = re.compile(r"(.*)\.(?:index|data-\d{5}-of-\d{5})")
_NAMED = re.compile(r'^(all_)?model_checkpoint_paths?: "(.*)"$', re.MULTILINE)


def prefix_of(path: str) -> str | None:
    """The checkpoint a file belongs to; None for other files."""
    match = _DATA.fullmatch(path)
    return match[1] if match else None


class Oracles:
    """All judges of one run."""

    def __init__(self, world: World) -> None:
        self.log = LogOracle()
        self.commits = CommitOracle()
        self.files = FileOracle(world, self.log)
        self.memory = MemoryOracle(world, self.log)
        self.recall = RecallOracle(world, self.memory)
        self.saving = SavingOracle(world, self.log)
        self.training = TrainingOracle(world, self)
        world.disk.watchers.append(self._on_mutation)
        self._objects = world.disk.objects

    def _on_mutation(self, mutation: Mutation) -> None:
        path = mutation.op.path
        if path.startswith(CLAIMS) and mutation.after is not None:
            claim = parsed(mutation.after)
            self.log.generations[claim["attempt"]] = claim["generation"]
        if path.startswith(LOG) and mutation.after is not None:
            before = self.log.top
            record = self.log.appended(int(path.removeprefix(LOG)), parsed(mutation.after))
            if record is not None and record["kind"] == "seal":
                self.recall.sealed(before, record)
            if record is not None and record["kind"] == "commit":
                self.commits.committed(record["live"][-1], self._objects)
        self.files.changed(mutation)


class LogOracle:
    """Follows the records as they appear."""

    def __init__(self) -> None:
        self.history: list[Any] = []
        self.generations: dict[str, int] = {}
        self.commits: list[Any] = []

    @property
    def top(self) -> Any:
        """The newest record, None at first."""
        return self.history[-1] if self.history else None

    def appended(self, sequence: int, record: Any) -> Any | None:
        """Judge a new record; None for one that took a pruned number, which its writer removes again."""
        top = self.top
        if top is None:
            self._require(sequence == 1 and record["kind"] == "claim", f"the log begins with {record}")
        else:
            if sequence <= top["sequence"] - 15:
                return None
            self._require(sequence == top["sequence"] + 1, f"record {sequence} follows {top['sequence']}")
            self._judge(top, record)
        self.history.append(record)
        if record["kind"] == "commit":
            self.commits.append(record["live"][-1])
        return record

    def _judge(self, top: Any, record: Any) -> None:
        claim = record["kind"] == "claim"
        expected = top["epoch"] + 1 if claim else top["epoch"]
        self._require(record["epoch"] == expected, f"epoch {record['epoch']} after {top['epoch']}: {record}")
        self._require(claim or record["owner"] == top["owner"], f"{record['owner']} appends under {top['owner']}")
        self._require(record["high_water"] >= top["high_water"], "the high water mark fell")
        if record["kind"] == "commit":
            self._judge_commit(top, record)
        elif record["kind"] == "seal":
            numbers = [(r["generation"] or {"number": 0, "round": 0}) for r in (top, record)]
            old, new = ((n["number"], n["round"]) for n in numbers)
            self._require(new in ((old[0] + 1, 1), (old[0], old[1] + 1)), f"generation {new} after {old}")
        else:
            self._require(newest(top) == newest(record), f"a {record['kind']} changed the newest: {record}")
        if record["kind"] == "abort" and int(record["attempt"][1:7]) == record["epoch"]:
            number = self.generations.get(record["attempt"])
            text = f"{record['attempt']} of generation {number} decided after the next was sealed"
            self._require(number in (None, record["generation"]["number"]), text)
        if record["kind"] not in ("commit", "delete"):
            self._require([c["prefix"] for c in top["live"]] == [c["prefix"] for c in record["live"]], "live changed")

    def _judge_commit(self, top: Any, record: Any) -> None:
        new = record["live"][-1]
        before = [c["prefix"] for c in top["live"]]
        self._require([c["prefix"] for c in record["live"][:-1]] == before, "a commit changed what was live")
        self._require(newest(record) == new, "a commit is not the newest")
        self._require(new["generation"] == top["generation"]["number"], f"{new} is of another generation")
        for old in self.commits:
            self._require(old["attempt"] != new["attempt"], f"attempt {new['attempt']} committed twice")
            self._require(old["prefix"] != new["prefix"], f"prefix {new['prefix']} committed twice")
            if old["generation"] == new["generation"]:
                self._require(old["step"] < new["step"], f"step {new['step']} committed after {old['step']}")

    @staticmethod
    def _require(holds: bool, text: str) -> None:
        if not holds:
            raise Violation("log", text)


class CommitOracle:
    """Knows who took which snapshot, and judges what a commit is made of."""

    def __init__(self) -> None:
        self._taken: dict[str, tuple[int, int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._names: dict[str, set[str]] = {}
        self._generations: dict[str, int | None] = {}

    def taken(self, trainer: Trainer, step: int, layout: Layout) -> str:
        """A rank takes a snapshot; the token stands for its bytes."""
        token = f"{trainer.name}@{step}"
        self._taken[token] = (trainer.start.number, step, trainer.rank)
        self._generations[token] = trainer.logic.generation
        self._sizes[trainer.start.number] = len(trainer.start.trainers)
        self._names[token] = {leaf.name for leaf in layout.leaves}
        return token

    def committed(self, checkpoint: Any, objects: dict[str, bytes]) -> None:
        """A commit record has appeared."""
        problem = damage_of(objects, checkpoint["prefix"])
        self._require(problem is None, f"{checkpoint['prefix']} committed, but {problem}")
        entries = parsed(objects[checkpoint["prefix"] + ".index"])["entries"]
        entries = [e for e in entries if e[0] != "_ray_ckpt"]
        size = self.judge((checkpoint["generation"], checkpoint["step"]), entries)
        self._require(size == checkpoint["world_size"], f"{checkpoint} is of {size} ranks")

    def judge(self, save: tuple[int, int], entries: Sequence[Any]) -> int:
        """These entries are all that one start took at one step, once; the number of its ranks."""
        tokens = {token for *_, token in entries}
        sources = {self._taken[token] for token in tokens}
        text = f"{save} is made of (start, step, rank) {sorted(sources)}"
        self._require(bool(sources), text)
        start, step, _ = next(iter(sources))
        self._require(sources == {(start, step, rank) for rank in range(self._sizes[start])}, text)
        self._require({(self._generations[token], step) for token in tokens} == {save}, text)
        expected = set().union(*(self._names[token] for token in tokens))
        pieces = [(name, tuple(offset), tuple(shape)) for name, offset, shape, _ in entries]
        self._require(len(pieces) == len(set(pieces)), f"pieces written twice: {sorted(pieces)}")
        self._require({name for name, *_ in pieces} == expected, f"tensors {sorted(p[0] for p in pieces)}")
        return self._sizes[start]

    @staticmethod
    def _require(holds: bool, text: str) -> None:
        if not holds:
            raise Violation("commits", text)


class FileOracle:
    """Looks at the disk after every mutation."""

    def __init__(self, world: World, log: LogOracle) -> None:
        self._world = world
        self._log = log
        self._written: dict[str, str] = {}
        self._deleted: set[str] = set()
        self.late: set[str] = set()
        self.readers: list[Reader] = []

    def changed(self, mutation: Mutation) -> None:
        """An object has changed."""
        path = mutation.op.path
        prefix = prefix_of(path)
        if prefix is not None:
            if mutation.after is None:
                self._on_delete(path, prefix)
            else:
                self._on_write(path, prefix, mutation.actor)
        if prefix is not None or path == STATE or path.startswith(LOG):
            self._look()

    def _on_write(self, path: str, prefix: str, actor: str) -> None:
        if path in self._written:
            raise Violation("files", f"{path} written by {self._written[path]}, then by {actor}")
        self._written[path] = actor
        claim = self._world.disk.objects.get(CLAIMS + prefix.replace("/", "%2F"))
        if prefix in self._deleted or claim is None or self._is_stale(parsed(claim)["epoch"]):
            self.late.add(path)

    def _is_stale(self, epoch: int) -> bool:
        """Whether what belongs to this epoch may be swept by now."""
        top = self._log.top
        taken_over = [r["time"] for r in self._log.history if r["kind"] == "claim" and r["epoch"] == epoch + 1]
        return bool(epoch < top["epoch"] and self._world.now > taken_over[0] + GRACE_S)

    def _on_delete(self, path: str, prefix: str) -> None:
        top = self._log.top
        if any(c["prefix"] == prefix for c in top["live"]):
            raise Violation("files", f"{path} deleted while the log lists it")
        dying = any(d["checkpoint"]["prefix"] == prefix for d in top["dying"])
        if any(c["prefix"] == prefix for c in self._log.commits) and not dying:
            raise Violation("files", f"{path} was committed and is deleted before the log says so")
        for reader in self.readers:
            if reader.holds and reader.prefix == prefix:
                raise Violation("files", f"{path} deleted while {reader.name} has pinned it")
        self._deleted.add(prefix)

    def _look(self) -> None:
        objects = self._world.disk.objects
        top = top_record(objects)
        for checkpoint in top["live"] if top else ():
            problem = damage_of(objects, checkpoint["prefix"])
            if problem:
                raise Violation("files", f"the log lists {checkpoint['prefix']}, but {problem}")
            if checkpoint["prefix"] in self._deleted:
                raise Violation("files", f"the log lists {checkpoint['prefix']}, which was being deleted")
        for prefix in named(objects):
            problem = damage_of(objects, prefix)
            if problem:
                raise Violation("tensorflow", f"`checkpoint` names {prefix}, but {problem}")


def named(objects: dict[str, bytes]) -> list[str]:
    """The prefixes in the `checkpoint` file, the newest first."""
    held = objects.get(STATE)
    return [match[2] for match in _NAMED.finditer(held.decode())] if held else []


class TrainingOracle:
    """Watches what workers read, hear and do."""

    def __init__(self, world: World, oracles: Oracles) -> None:
        self._world = world
        self._log = oracles.log
        self._commits = oracles.commits
        self._memory = oracles.memory
        self._reads: dict[tuple[int, int], tuple[str | None, tuple[int, int] | None]] = {}
        self._started: dict[int, tuple[tuple[int, int], Rows | None]] = {}
        self._told: set[tuple[str, int]] = set()

    def read(self, trainer: Trainer, decision: RestoreDecision, found: Read) -> None:
        """A rank reads what was decided; what it reads must be what all others read."""
        chosen = (decision.checkpoint.prefix if decision.checkpoint else None, decision.snapshot)
        result = found.damage or ("whole, from memory" if found.remembered else "whole")
        self._world.tell("%s reads %s for %s: %s", trainer.name, chosen, decision.key, result)
        other = self._reads.setdefault(decision.key, chosen)
        self._require(other == chosen, f"{trainer.name} reads {chosen} for {decision.key}, another rank {other}")
        current = self._log.top["generation"]["number"]
        stale = decision.generation != current or trainer.start.over
        excused = decision.snapshot is not None and RecallOracle.is_excused(self._world)
        self._require(not found.damage or stale or excused, f"{trainer.name} cannot read {chosen}: {found.damage}")
        if found.remembered and found.rows is not None:
            self._judge_remembered(decision, found.rows)

    def _judge_remembered(self, decision: RestoreDecision, rows: Rows) -> None:
        """What was read from memory is one whole save, and what the chosen checkpoint holds, if it is one."""
        checkpoint = decision.checkpoint
        save = decision.snapshot or ((checkpoint.generation, checkpoint.step) if checkpoint else (-1, -1))
        self._commits.judge(save, sorted(rows))
        index = self._world.disk.objects.get(f"{checkpoint.prefix}.index") if checkpoint else None
        if index is not None:
            stored = as_rows(e for e in parsed(index)["entries"] if e[0] != "_ray_ckpt")
            self._require(stored == rows, f"{checkpoint} holds {stored}, and {rows} was read from memory")

    def started(self, trainer: Trainer) -> None:
        """A rank begins to train."""
        restore = trainer.logic.restore
        assert restore is not None
        self._world.tell("%s trains from %s", trainer.name, trainer.logic.restored_step)
        self._memory.begun.add(restore.generation)
        mine = restore.key, trainer.origin.rows if trainer.origin else None
        other = self._started.setdefault(trainer.start.number, mine)
        self._require(other == mine, f"{trainer.name} starts from {mine}, another rank from {other}")
        self._require(mine[1] is not None, f"{trainer.name} trains, but has read nothing")
        waited = self._world.now - trainer.start.begun
        quick = RecallOracle.is_excused(self._world) or waited < _START_S
        self._require(quick, f"{trainer.name} has waited {waited:.1f} s for its start")
        self._check_choice(trainer, restore)

    def _check_choice(self, trainer: Trainer, restore: RestoreDecision) -> None:
        """The choice is what the log called the newest (or the step asked for) when it was made, before and after."""
        seals = [
            i
            for i, r in enumerate(self._log.history)
            if r["kind"] == "seal" and (r["generation"]["number"], r["generation"]["round"]) == restore.key
        ]
        self._require(len(seals) == 1, f"{restore.key} was sealed {len(seals)} times")
        before = self._log.history[seals[0] - 1]
        wish = trainer.scenario.wish(trainer.start.number)
        best = newest(before)
        if wish.kind == "step":
            best = [c for c in before["live"] if c["step"] == wish.step][-1]
        if restore.snapshot is not None:
            sealed = self._log.history[seals[0]]["generation"]["snapshot"]
            self._require(tuple(sealed) == restore.snapshot, f"{trainer.name} starts from {restore}, not {sealed}")
            self._require(wish.kind == "newest", f"{trainer.name} starts from {restore}, and asked for {wish}")
            return
        expected = best["prefix"] if best else None
        chosen = restore.checkpoint.prefix if restore.checkpoint else None
        self._require(chosen == expected, f"{trainer.name} starts from {chosen}, expected {expected}")

    def told(self, trainer: Trainer) -> None:
        """What a worker believes about its saves must be so in the log."""
        for step, outcome in trainer.logic.outcomes.items():
            if (trainer.name, step) in self._told:
                continue
            self._told.add((trainer.name, step))
            self._world.tell("%s hears: %s", trainer.name, outcome)
            key = (outcome.generation, step)
            committed = any((c["generation"], c["step"]) == key for c in self._log.commits)
            text = f"{trainer.name} is told {outcome}, the log says committed={committed}"
            forgotten = outcome.quiet and all((c["generation"], c["step"]) != key for c in self._log.top["live"])
            self._require(committed == (outcome.state == "committed") or forgotten, text)

    def closed(self, trainer: Trainer) -> None:
        """A training process has ended by itself."""
        steps = {t.name: t.stopped_at for t in trainer.start.trainers if t.ended_well}
        self._require(len(set(steps.values())) <= 1, f"workers stopped at different steps: {steps}")

    @staticmethod
    def _require(holds: bool, text: str) -> None:
        if not holds:
            raise Violation("training", text)
