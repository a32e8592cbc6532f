"""A rank reads ahead while the coordinator chooses; what is built is only ever the chosen checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_ckpt.bundle import shard_name
from ray_ckpt.checkpointer.restoring import restore
from ray_ckpt.errors import DamagedError, MismatchError
from ray_ckpt.log import list_pins, put_claim
from ray_ckpt.protocol.messages import RestoreDecision, RestoreResult, RestoreWish
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.storage import Store
from ray_ckpt.target import read_state
from ray_ckpt.types import Checkpoint, Claim
from tests.restore.make import commit, flip

NEWEST = RestoreWish("newest")
LIKE = {"w": np.zeros(4, np.float32)}


class ScriptedLink:
    """A connection whose coordinator makes these choices, one after each report of damage, and notes what it saw."""

    def __init__(self, url: str, choices: Sequence[Checkpoint | None]) -> None:
        self.url = url
        self.rank = 0
        self.condition = threading.Condition()
        self.events: list[Any] = []
        self.courier = SimpleNamespace(nudge=lambda: None, call=lambda method, timeout_s: False)
        self.logic = SimpleNamespace(wish=self._wish, restore=None, restore_done=False, restore_read=self._told)
        self._choices = [RestoreDecision(1, i + 1, choice) for i, choice in enumerate(choices)]

    def _wish(self, wish: RestoreWish) -> None:
        self.events.append("wish")

    def _told(self, result: RestoreResult) -> None:
        self.events.append("damaged" if result.damage else "restored")
        if result.damage is None:
            self.logic.restore_done = True

    def wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        if not done():
            # The last rank takes its time.
            for thread in threading.enumerate():
                if thread.name == "ray-ckpt-ahead":
                    thread.join()
            self.logic.restore = self._choices.pop(0)
            self.events.append("choice")
        assert done()

    def read(self, stored: StoredCheckpoint) -> Callable[[], Any]:
        """As a `Checkpointer` reads, and noted."""
        step = stored.metadata.step if stored.metadata else None
        self.events.append(f"read {step}")
        build = read_state(stored, LIKE, rank=0, world_size=1)

        def noted() -> Any:
            self.events.append(f"build {step}")
            return build()

        return noted


def saved(store: Store, *steps: int) -> list[Checkpoint]:
    return [commit(store, step, {"w": np.full(4, step, np.float32)}) for step in steps]


class LateDamageLink(ScriptedLink):
    """Reading finds nothing wrong with step 2, which cannot be built all the same."""

    def read(self, stored: StoredCheckpoint) -> Callable[[], Any]:
        build = super().read(stored)

        def fail() -> Any:
            raise DamagedError(f"{stored.prefix} cannot be read")

        return fail if stored.prefix.endswith("-2") else build


def run(
    store: Store, choices: Sequence[Checkpoint | None], wish: RestoreWish = NEWEST
) -> tuple[list[Any], Any, ScriptedLink]:
    link = ScriptedLink(store.url, choices)
    found, state = restore(link, store, wish, link.read, 1.0)  # type: ignore[arg-type]
    assert (found is None) == (state is None)
    assert not list_pins(store, 0.0)
    return link.events, None if state is None else state["w"].tolist(), link


def test_the_newest_is_read_before_the_choice_and_built_after_it(store: Store) -> None:
    _, newest = saved(store, 1, 2)
    events, state, _ = run(store, [newest])
    assert events == ["wish", "read 2", "choice", "build 2", "restored"]
    assert state == [2] * 4


def test_another_choice_is_read_anew(store: Store) -> None:
    older, _ = saved(store, 1, 2)
    events, state, _ = run(store, [older])
    assert events == ["wish", "read 2", "choice", "read 1", "build 1", "restored"]
    assert state == [1] * 4


def test_the_step_that_is_wished_is_read_ahead(store: Store) -> None:
    older, _ = saved(store, 1, 2)
    events, state, _ = run(store, [older], RestoreWish("step", 1))
    assert events == ["wish", "read 1", "choice", "build 1", "restored"]
    assert state == [1] * 4


def test_nothing_is_built_where_nothing_is_chosen(store: Store) -> None:
    saved(store, 1)
    assert run(store, [None])[:2] == (["wish", "read 1", "choice", "restored"], None)


def test_nothing_is_read_where_there_is_nothing_or_nothing_is_wished(store: Store) -> None:
    assert run(store, [None])[0] == ["wish", "choice", "restored"]
    saved(store, 1)
    assert run(store, [None], RestoreWish("none"))[0] == ["wish", "choice", "restored"]


def test_nothing_is_read_while_a_newer_save_may_be_finishing(store: Store) -> None:
    older, newest = saved(store, 1, 2)
    put_claim(store, Claim("e1-9", 1, 1, 3, "model.ckpt-3", 2))
    assert run(store, [newest])[0] == ["wish", "choice", "read 2", "build 2", "restored"]
    assert run(store, [older], RestoreWish("step", 1))[0] == ["wish", "read 1", "choice", "build 1", "restored"]


def test_damage_is_reported_only_of_what_is_chosen(store: Store) -> None:
    older, newest = saved(store, 1, 2)
    flip(store, shard_name(newest.prefix, 0, 4), 0)
    events, state, _ = run(store, [newest, older])
    assert events == ["wish", "read 2", "choice", "read 2", "damaged", "choice", "read 1", "build 1", "restored"]
    assert state == [1] * 4
    assert "damaged" not in run(store, [older])[0]


def test_damage_that_only_building_finds_is_reported_too(store: Store) -> None:
    older, newest = saved(store, 1, 2)
    link = LateDamageLink(store.url, [newest, older])
    found, state = restore(link, store, NEWEST, link.read, 1.0)  # type: ignore[arg-type]
    assert (found, state["w"].tolist()) == (older, [1] * 4)
    assert link.events == ["wish", "read 2", "choice", "damaged", "choice", "read 1", "build 1", "restored"]


def test_a_mismatch_is_raised_once_its_checkpoint_is_chosen(store: Store) -> None:
    newest = commit(store, 3, {"v": np.zeros(4, np.float32)})
    with pytest.raises(MismatchError, match="missing"):
        run(store, [newest])
