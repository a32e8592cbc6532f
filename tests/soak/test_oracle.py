"""The oracle objects to what must never be, and to nothing else. The runs here are made by TensorFlow and by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.soak.model import Model, digest
from tests.soak.oracle import Oracle, judge_restores
from tests.soak.sources import FolderSource
from tests.soak.trainer import Restored

MODEL = Model(seed=7, columns=4)
WORLD = 2


class HandMade:
    """A run's directory. ``live``: the steps that its log lists."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.live: list[int] = []
        self._sequence = 0
        (root / "_ray_ckpt" / "log").mkdir(parents=True)

    def commit(self, step: int, **wrong: Any) -> None:
        """A checkpoint of the model at this step, but for the tensors that are given."""
        import tensorflow as tf

        tensors = {**MODEL.tensors(step, WORLD), **wrong}
        values = [tf.constant(v, tf.int64) if isinstance(v, int) else tf.constant(v) for v in tensors.values()]
        prefix = str(self.root / f"model.ckpt-{step}")
        tf.raw_ops.SaveV2(
            prefix=prefix, tensor_names=list(tensors), shape_and_slices=[""] * len(tensors), tensors=values
        )
        self.live.append(step)
        self.record("commit", step)

    def record(self, kind: str, step: int = -1) -> None:
        """The next record of the log, of what is live."""
        self._sequence += 1
        live = [
            {"step": s, "prefix": f"model.ckpt-{s}", "attempt": f"a{s}", "world_size": WORLD, "superseded": False}
            for s in self.live
        ]
        value = {"sequence": self._sequence, "kind": kind, "step": step, "live": live}
        self.log(self._sequence).write_text(json.dumps(value))

    def log(self, sequence: int) -> Path:
        """Where a record lies."""
        return self.root / "_ray_ckpt" / "log" / f"{sequence:020d}"

    def data(self, step: int) -> Path:
        """The only shard of a checkpoint."""
        return self.root / f"model.ckpt-{step}.data-00000-of-00001"


@pytest.fixture
def run(tmp_path: Path) -> HandMade:
    """A run with the checkpoints of two steps."""
    made = HandMade(tmp_path)
    made.commit(3)
    made.commit(6)
    return made


def oracle(run: HandMade) -> Oracle:
    """One that has not looked yet."""
    return Oracle(FolderSource(run.root), MODEL)


def test_it_has_nothing_to_say_about_a_sound_run(run: HandMade) -> None:
    looking = oracle(run)
    first = looking.look()
    assert (first.newest, first.committed, first.verified, first.violations) == (6, 2, 2, [])
    run.record("abort", 9)
    run.commit(12)
    second = looking.look()
    assert (second.newest, second.committed, second.abandoned, second.verified) == (12, 1, 1, 1)
    assert second.violations == []


def test_what_retention_deletes_is_not_missed(run: HandMade) -> None:
    looking = oracle(run)
    looking.look()
    run.live.remove(3)
    run.record("delete")
    for path in run.root.glob("model.ckpt-3.*"):
        path.unlink()
    assert looking.look().violations == []


def flip(run: HandMade) -> None:
    """One byte of a shard is another."""
    data = bytearray(run.data(6).read_bytes())
    data[len(data) // 2] ^= 1
    run.data(6).write_bytes(data)


def lose_a_step(run: HandMade) -> None:
    """The sums are those of step 9, but they came by other steps than 1 to 9."""
    run.commit(9, history=MODEL.tensors(8, WORLD)["history"])


def tear(run: HandMade) -> None:
    """Half of the array was copied after the next step."""
    table = MODEL.table(9)
    table[100:] = MODEL.table(10)[100:]
    run.commit(9, **{"model/table": table})


def go_back(run: HandMade) -> None:
    """The newest commit is gone from the log."""
    run.live.remove(6)
    run.record("delete")


def add_a_tensor(run: HandMade) -> None:
    """Something of another run."""
    run.commit(9, other=np.zeros(3))


def lose_a_record(run: HandMade) -> None:
    """One in the middle."""
    run.commit(9)
    run.log(2).unlink()


Plant = Callable[[HandMade], Any]
UNREAD: dict[str, tuple[Plant, str]] = {
    "a flipped byte": (flip, r"step 6 .*cannot be read"),
    "a missing shard": (lambda run: run.data(6).unlink(), r"step 6 .*cannot be read"),
    "a missing index": (lambda run: (run.root / "model.ckpt-6.index").unlink(), r"step 6 .*cannot be read"),
    "a lost step": (lose_a_step, r"step 9 .*tensor history has \d+ wrong values"),
    "a torn array": (tear, r"step 9 .*tensor model/table has 2960 wrong values of 3360, the first at \[400\]"),
    "a foreign tensor": (add_a_tensor, r"step 9 .*tensor other should not be in it"),
    "a hole in the log": (lose_a_record, r"lacks record 2"),
}
SEEN: dict[str, tuple[Plant, str]] = {
    "a shard that is gone": (lambda run: run.data(6).unlink(), r"step 6 .*00000-of-00001 has no bytes, it had \d+"),
    "a shard cut short": (
        lambda run: run.data(3).write_bytes(b"short"),
        r"step 3 .*of-00001 has 5 bytes, it had",
    ),
    "a step that goes back": (go_back, r"went back from step 6 to 3 with record 3 \(delete"),
    "a log that ends earlier": (lambda run: run.log(2).unlink(), r"the log ended with record 2, now"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_planted_violation_is_found_at_first_sight(run: HandMade, name: str) -> None:
    plant, text = UNREAD[name]
    plant(run)
    (found,) = oracle(run).look().violations
    assert re.search(text, found), found


@pytest.mark.parametrize("name", SEEN)
def test_a_planted_violation_is_found_later(run: HandMade, name: str) -> None:
    plant, text = SEEN[name]
    looking = oracle(run)
    assert looking.look().violations == []
    plant(run)
    found = looking.look().violations
    assert any(re.search(text, one) for one in found), found


def test_the_end_is_the_last_step_and_named(run: HandMade) -> None:
    (run.root / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-6"\n')
    looking = oracle(run)
    assert looking.end(6).violations == []
    assert "all ranks ended at step 8, but the newest commit is of step 6" in looking.end(8).violations[0]
    (run.root / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-3"\n')
    assert looking.end(6).violations == ["after the end at step 6 the file `checkpoint` names model.ckpt-3"]


def told(step: int, of: int | None = None) -> list[Restored]:
    """Ranks that restored ``step``, with the bytes of step ``of``."""
    states = [MODEL.state(rank, WORLD, step if of is None else of) for rank in range(WORLD)]
    return [
        Restored(rank, WORLD, step, digest(state), state["rng"].value.tolist(), 0.0, "")
        for rank, state in enumerate(states)
    ]


def test_restores_are_judged() -> None:
    assert judge_restores(told(6), 6, MODEL) == []
    assert judge_restores(told(8), 6, MODEL) == []
    assert judge_restores([Restored(0, 1, -1, digest(MODEL.state(0, 1, 0)), [0, 0, 7], 0.0, "")], -1, MODEL) == []
    assert judge_restores(told(5), 6, MODEL) == ["step 5 was restored, but step 6 had been committed before"]
    (other,) = judge_restores([told(6)[0], told(7)[1]], 6, MODEL)
    assert "different steps" in other
    other_bytes = [replace(a, digest=b.digest) for a, b in zip(told(6), told(7), strict=True)]
    assert ["other bytes" in text for text in judge_restores(other_bytes, 6, MODEL)] == [True, True]
    (own,) = judge_restores([told(6)[0], replace(told(6)[1], own=[1, 5, 7])], 6, MODEL)
    assert own == "rank 1 of 2 restored [1, 5, 7] for step 6 as its own"


def test_training_in_place_is_what_the_outsider_computes() -> None:
    for world in (1, 2, 3):
        for rank in range(world):
            state = MODEL.state(rank, world, 4)
            for _ in range(3):
                MODEL.advance(state, rank)
            assert digest(state) == digest(MODEL.state(rank, world, 7))
            assert digest(state) != digest(MODEL.state(rank, world, 8))
