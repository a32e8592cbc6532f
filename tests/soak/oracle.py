"""The oracle: a process outside of the job that judges a run by its files alone.

It shares no code with the package: the commit log is read as the JSON that `docs/design/0001-spine.md` describes,
tensors are read by TensorFlow, and what they must be is computed by `Model` from the step.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.soak.model import Model, digest
from tests.soak.sources import Source
from tests.soak.trainer import Restored

_LOG = "_ray_ckpt/log/"


@dataclass
class Finding:
    """What one look has found. ``newest``: the step of the newest commit, -1: none; ``violations``: what must not be.

    ``committed``, ``abandoned``: saves whose decision was new; ``verified``: checkpoints read whole for the first time.
    """

    newest: int = -1
    committed: int = 0
    abandoned: int = 0
    verified: int = 0
    violations: list[str] = field(default_factory=list)


class Oracle:
    """Looks at one run again and again; remembers what it has seen."""

    def __init__(self, source: Source, model: Model) -> None:
        self._source = source
        self._model = model
        self._sequence = 0
        self._newest = -1
        self._files: dict[tuple[str, str], dict[str, int]] = {}

    def look(self) -> Finding:
        """Judge everything that has come since the last look, and what is still listed."""
        finding = Finding(newest=self._newest)
        records = self._new_records(finding)
        for record in records:
            self._judge_record(record, finding)
        head = records[-1] if records else self._head()
        if head is not None:
            self._judge_listed(head, finding)
        finding.newest = self._newest
        return finding

    def end(self, last: int) -> Finding:
        """Some time after a clean end at step ``last``: it is the newest, and TensorFlow finds it by itself."""
        import tensorflow as tf

        finding = self.look()
        if finding.newest != last:
            finding.violations.append(
                f"all ranks ended at step {last}, but the newest commit is of step {finding.newest}"
            )
        with tempfile.TemporaryDirectory(prefix="rcs") as folder:
            (Path(folder) / "checkpoint").write_bytes(self._source.read("checkpoint"))
            named = tf.train.get_checkpoint_state(folder)
        name = None if named is None else Path(named.model_checkpoint_path).name
        if name != f"model.ckpt-{last}":
            finding.violations.append(f"after the end at step {last} the file `checkpoint` names {name}")
        return finding

    # -- the log --------------------------------------------------------------------------------------------

    def _new_records(self, finding: Finding) -> list[dict[str, Any]]:
        numbers = sorted(int(path.rpartition("/")[2]) for path in self._source.sizes(_LOG))
        if self._sequence and (not numbers or numbers[-1] < self._sequence):
            finding.violations.append(f"the log ended with record {self._sequence}, now it has {numbers[-3:]}")
            self._sequence = 0
        # Old ones are pruned; between those that are there none may be missing.
        holes = [a + 1 for a, b in itertools.pairwise(numbers) if b != a + 1]
        finding.violations += [f"the log of {numbers[0]} to {numbers[-1]} lacks record {number}" for number in holes]
        found = []
        for number in numbers:
            if number > self._sequence:
                try:
                    found.append(json.loads(self._source.read(f"{_LOG}{number:020d}")))
                except FileNotFoundError:
                    # Pruned since: newer ones tell the same.
                    continue
        return found

    def _head(self) -> dict[str, Any] | None:
        if not self._sequence:
            return None
        head: dict[str, Any] = json.loads(self._source.read(f"{_LOG}{self._sequence:020d}"))
        return head

    def _judge_record(self, record: dict[str, Any], finding: Finding) -> None:
        self._sequence = record["sequence"]
        finding.committed += record["kind"] == "commit"
        finding.abandoned += record["kind"] == "abort"
        steps = [c["step"] for c in record["live"] if not c["superseded"]]
        newest = steps[-1] if steps else -1
        if newest < self._newest:
            finding.violations.append(
                f"the newest commit went back from step {self._newest} to {newest} with record {self._sequence} "
                f"({record['kind']} of step {record['step']})"
            )
        self._newest = newest

    # -- the checkpoints ------------------------------------------------------------------------------------

    def _judge_listed(self, head: dict[str, Any], finding: Finding) -> None:
        for entry in head["live"]:
            key = entry["prefix"], entry["attempt"]
            known = self._files.get(key)
            try:
                wrong = self._read_whole(entry) if known is None else self._missing(entry, known)
            except (OSError, ValueError, RuntimeError) as error:
                wrong = [f"cannot be read: {type(error).__name__}: {error}"]
            if wrong and self._is_listed(key):
                finding.violations += [f"step {entry['step']} ({entry['prefix']}): {text}" for text in wrong]
            elif known is None and not wrong:
                finding.verified += 1
                self._files[key] = self._source.sizes(f"{entry['prefix']}.")

    def _is_listed(self, key: tuple[str, str]) -> bool:
        """Retention may have deleted it while it was read."""
        newest = max(self._source.sizes(_LOG))
        return key in {(c["prefix"], c["attempt"]) for c in json.loads(self._source.read(newest))["live"]}

    def _missing(self, entry: dict[str, Any], known: dict[str, int]) -> list[str]:
        found = self._source.sizes(f"{entry['prefix']}.")
        return [
            f"{path} has {found.get(path, 'no')} bytes, it had {size}"
            for path, size in known.items()
            if found.get(path) != size and not path.endswith(".meta")
        ]

    def _read_whole(self, entry: dict[str, Any]) -> list[str]:
        import tensorflow as tf

        with self._source.local(entry["prefix"]) as prefix:
            try:
                reader = tf.train.load_checkpoint(prefix)
                names = set(reader.get_variable_to_shape_map()) - {"_ray_ckpt"}
                tensors = {name: reader.get_tensor(name) for name in names}
            except tf.errors.OpError as error:
                raise RuntimeError(str(error)) from None
        return differences(tensors, self._model.tensors(entry["step"], entry["world_size"]))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Where tensors are not bit for bit what they must be."""
    wrong = [f"tensor {name} is not in it" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"tensor {name} should not be in it" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        want, have = np.asarray(expected[name]), np.asarray(found[name])
        if have.shape != want.shape or (want.dtype.kind != "S" and have.dtype != want.dtype):
            wrong.append(f"tensor {name} is {have.dtype}{have.shape}, expected {want.dtype}{want.shape}")
        elif have.tobytes() != want.astype(have.dtype).tobytes():
            unequal = np.flatnonzero(np.ravel(have != want))
            wrong.append(f"tensor {name} has {len(unequal)} wrong values of {want.size}, the first at {unequal[:1]}")
    return wrong


def judge_restores(told: Sequence[Restored], newest_before: int, model: Model) -> list[str]:
    """A start whose ranks told this, and before which a commit of this step (-1: none) was there: what is wrong."""
    steps = {r.step for r in told}
    wrong = []
    if len(steps) > 1:
        wrong.append("ranks restored different steps: " + ", ".join(f"{r.rank}: {r.step}" for r in told))
    if told and min(steps) < newest_before:
        wrong.append(f"step {min(steps)} was restored, but step {newest_before} had been committed before")
    for one in told:
        expected = digest(model.state(one.rank, one.world, max(one.step, 0)))
        if one.digest != expected:
            wrong.append(f"rank {one.rank} of {one.world} restored other bytes for step {one.step} than were trained")
        # A job of another size takes what rank 0 had.
        if one.own not in ([int(n) for n in model.rng(rank, max(one.step, 0))] for rank in (one.rank, 0)):
            wrong.append(f"rank {one.rank} of {one.world} restored {one.own} for step {one.step} as its own")
    return wrong
