"""What a save holds is the state at its step, to the bit, whatever happens to the state afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ray_ckpt
from tests.system.job import Job
from tests.system.worker import Worker

pytestmark = pytest.mark.xdist_group("ray")


def mutate_after_step(worker: Worker) -> dict[str, Any]:
    """Save at steps 2, 4, 6 and overwrite the arrays as soon as `step` returns; what was saved last."""
    rng = np.random.default_rng(0)
    big = rng.random((700, 900))
    state = {
        "big": big,
        "turned": big.T,
        "strided": rng.random((50, 64))[:, ::3],
        "big_endian": np.arange(99, dtype=">i4"),
        "empty": np.empty((0, 7), np.float32),
        "nan": np.array([np.nan, -0.0, np.inf]),
        "scalar": np.float32(0.5),
        "words": np.array(["a", "", "long" * 99], object),
    }
    state["read_only"] = np.arange(5)
    state["read_only"].flags.writeable = False
    worker.ckpt.restore(state)
    saved = {}
    for step in range(1, 7):
        state["nan"] = np.array([np.nan, -0.0, step])
        if step % 2 == 0:
            saved = {k: np.array(v).astype(v.dtype.newbyteorder("="), order="C") for k, v in state.items()}
        worker.ckpt.step(step, state)
        big[:] = -step
        state["strided"][:] = -step
        state["big_endian"][:] = -step
        state["words"][:] = "overwritten"
    worker.ckpt.wait()
    return saved


def test_arrays_may_change_as_soon_as_step_returns(make_job: Callable[..., Job]) -> None:
    job = make_job(save_steps=2).start(1)
    saved = job.on(0, "do", mutate_after_step)
    for step in (2, 4, 6):
        assert job.on(0, "call", "all_steps").count(step) == 1
    loaded = ray_ckpt.load(job.url, 6)
    assert loaded.keys() == saved.keys()
    for name, expected in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (expected.dtype, expected.shape), name
        if name == "words":
            assert [w.decode() for w in loaded[name]] == expected.tolist()
        else:
            assert loaded[name].tobytes() == expected.tobytes(), name


def jax_state(worker: Worker) -> list[Any]:
    """Save a JAX state and restore it by an abstract target; types and values that came back."""
    import jax
    import jax.numpy as jnp

    state = {"w": jnp.arange(12.0, dtype=jnp.bfloat16).reshape(3, 4), "key": jax.random.PRNGKey(7), "n": 3}
    worker.ckpt.save(5, state)
    worker.ckpt.close()
    with ray_ckpt.Checkpointer(worker.ckpt.url, rank=0, world_size=1) as again:
        back = again.restore(jax.eval_shape(lambda: {**state, "n": jnp.int32(0)}) | {"n": 0})
        assert isinstance(back["w"], jax.Array)
        assert (back["w"].dtype, back["n"], again.restored_step) == (jnp.bfloat16, 3, 5)
        return [np.asarray(back["w"], np.float32).tolist(), np.asarray(back["key"]).tolist()]


@pytest.mark.slow
def test_a_jax_state(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    w, key = job.on(0, "do", jax_state)
    assert w == np.arange(12.0).reshape(3, 4).tolist()
    assert key == [0, 7]


def tensorflow_state(worker: Worker) -> list[Any]:
    """Save variables, change them, and restore into them."""
    import tensorflow as tf

    state = {"w": tf.Variable([[1.0, 2.0]]), "step": tf.Variable(5, dtype=tf.int64), "name": tf.constant("x")}
    worker.ckpt.save(5, state)
    state["w"].assign([[0.0, 0.0]])
    worker.ckpt.wait()
    worker.ckpt.close()
    with ray_ckpt.Checkpointer(worker.ckpt.url, rank=0, world_size=1) as again:
        back = again.restore(state)
        assert back["w"] is state["w"]
        return [state["w"].numpy().tolist(), int(state["step"].numpy()), back["name"].numpy()]


@pytest.mark.slow
def test_a_tensorflow_state(make_job: Callable[..., Job]) -> None:
    job = make_job().start(1)
    assert job.on(0, "do", tensorflow_state) == [[[1.0, 2.0]], 5, b"x"]
