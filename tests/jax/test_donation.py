"""A training step may take over the arrays as soon as `step` returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import jax_leaf
from ray_ckpt.types import Box
from tests.cluster import RUNS
from tests.target.saving import restore, save

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.xdist_group("ray")
jnp = jax.numpy
P = jax.sharding.PartitionSpec


def make_state() -> dict[str, Any]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    values = np.arange(1 << 18, dtype=np.float32).reshape(512, 512)
    specs = {"grid": P("a", "b"), "partly": P("b"), "whole": P()}
    state = {name: jax.device_put(values, jax.sharding.NamedSharding(mesh, spec)) for name, spec in specs.items()}
    # Copies: several devices may share numpy's memory, which is not theirs to give away.
    return jax.tree.map(jnp.copy, state | {"one": jnp.arange(1 << 18), "key": jax.random.key(0)})


def addresses(state: Any) -> set[int]:
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array) and isinstance(x.dtype, np.dtype)]
    return {shard.data.unsafe_buffer_pointer() for x in arrays for shard in x.addressable_shards}


def test_donated_right_after_step_returns(ray_cluster: Any, tmp_path: Path) -> None:
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    state = make_state()
    keys = [np.asarray(jax.random.key_data(state["key"]))]
    with ray_ckpt.Checkpointer(str(tmp_path), rank=0, world_size=1, save_steps=1) as ckpt:
        RUNS.add(run_id(ckpt.url))
        ckpt.restore(state)
        for step in range(1, 4):
            ckpt.step(step, state)
            before, key = addresses(state), state.pop("key")
            old, state = state, update(state)
            assert all(x.is_deleted() for x in jax.tree.leaves(old))
            # The new values lie where the saved ones were: nothing of ours still holds them.
            assert before <= addresses(state)
            state["key"] = jax.random.split(key)[0]
            keys.append(np.asarray(jax.random.key_data(state["key"])))
            ckpt.wait()
    for step in range(1, 4):
        loaded = ray_ckpt.load(str(tmp_path), step)
        assert np.array_equal(jax.random.key_data(loaded.pop("key")), keys[step - 1])
        for name, values in loaded.items():
            first = np.arange(1 << 18).reshape(values.shape)
            assert np.array_equal(values, first * 2 ** (step - 1) + 2 ** (step - 1) - 1), (step, name)


def test_what_was_donated_before_is_an_error_that_says_so() -> None:
    state = make_state()
    jax.jit(lambda s: s + 1, donate_argnums=0)(state["grid"])
    with pytest.raises(StateError, match=r"grid: the jax.Array is deleted, probably donated"):
        save([state])


def test_all_copies_from_devices_begin_before_the_first_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    real = jax_leaf.parts

    def started(value: Any, box: Box) -> None:
        calls.append(("start", id(value)))

    def waited(value: Any, box: Box) -> Any:
        calls.append(("wait", id(value)))
        return real(value, box)

    monkeypatch.setattr(jax_leaf, "start_transfer", started)
    monkeypatch.setattr(jax_leaf, "parts", waited)
    state = make_state()
    stored = save([state])
    kinds = [kind for kind, _ in calls]
    first = kinds.index("wait")
    assert {name for _, name in calls[:first]} == {id(value) for value in state.values()}
    assert "start" not in kinds[first:]
    assert np.array_equal(restore(stored, None)["one"], np.arange(1 << 18))
