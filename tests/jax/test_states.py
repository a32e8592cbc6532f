"""States of flax, equinox and optax: saved in the midst of training, restored on another mesh, trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import MismatchError, StateError
from ray_ckpt.target import is_abstract
from ray_ckpt.tree import named_leaves
from tests.target.saving import restore, save

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
P = jax.sharding.PartitionSpec


def placed(state: Any, shape: tuple[int, int]) -> Any:
    """The state on a mesh: kernels cut along both axes as far as they can be, all else on every device."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(leaf: Any) -> Any:
        fits = len(getattr(leaf, "shape", ())) == 2 and all(n % m == 0 for n, m in zip(leaf.shape, shape, strict=True))
        return jax.sharding.NamedSharding(mesh, P("data", "model") if fits else P())

    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)) if isinstance(x, jax.Array) else x, state)


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, state
    )


def bits(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return (np.asarray(leaf).dtype.name, np.asarray(leaf).tobytes()) if isinstance(leaf, jax.Array) else leaf


def same(a: Any, b: Any) -> None:
    """Equal structures, and equal bits in each leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert {k: bits(v) for k, v in named_leaves(a).items()} == {k: bits(v) for k, v in named_leaves(b).items()}


def linen_state() -> tuple[Any, Callable[[Any], Any]]:
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Dense(8, kernel_init=linen.with_partitioning(linen.initializers.ones, ("a", "b")))(x)
            return linen.Dense(4, param_dtype=jnp.bfloat16)(linen.LayerNorm()(x))

    class State(TrainState):
        dropout: Any

    net = Net()
    params = net.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    state = State.create(apply_fn=net.apply, params=params, tx=TX, dropout=jax.random.key(3))

    def step(state: Any) -> Any:
        key, state = jax.random.split(state.dropout)[0], state.replace(dropout=jax.random.split(state.dropout)[1])
        x = jax.random.normal(key, (2, 4))
        grads = jax.grad(lambda p: (state.apply_fn({"params": p}, x) ** 2).sum().astype(jnp.float32))(state.params)
        return state.apply_gradients(grads=grads)

    return state, step


def nnx_state() -> tuple[Any, Callable[[Any], Any]]:
    nnx = pytest.importorskip("flax.nnx")
    if not hasattr(nnx, "List"):
        pytest.skip("flax is older than 0.12")

    class Net(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.layers[1](self.drop(self.norm(self.layers[0](x))))

    net = Net(nnx.Rngs(0))
    graph, state = nnx.split((net, nnx.Optimizer(net, TX, wrt=nnx.Param)))

    def step(state: Any) -> Any:
        net, optimizer = nnx.merge(graph, state)
        grads = nnx.grad(lambda net: (net(jnp.ones((2, 4))) ** 2).sum())(net)
        optimizer.update(net, grads)
        return nnx.state((net, optimizer))

    return state, step


def equinox_state() -> tuple[Any, Callable[[Any], Any]]:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(4, 4, 8, 2, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)

    def step(state: Any) -> Any:
        params, opt = state
        grads = jax.grad(lambda p: (equinox.combine(p, static)(jnp.ones(4)) ** 2).sum())(params)
        updates, opt = TX.update(grads, opt, params)
        return equinox.apply_updates(params, updates), opt

    return (params, TX.init(params)), step


def optax_state() -> tuple[Any, Callable[[Any], Any]]:
    """Every kind of container that optax nests: chains, masks, labels, hyperparameters, accumulation."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4), "frozen": jnp.ones((4, 4))}
    labels = {"w": "adam", "b": "sgd", "frozen": "none"}
    parts = {"adam": optax.adamw(1e-2, mu_dtype=jnp.bfloat16), "sgd": optax.sgd(1e-2), "none": optax.set_to_zero()}
    scheduled = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9)
    tx = optax.MultiSteps(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.multi_transform(parts, labels),
            optax.masked(optax.trace(0.9), {"w": True, "b": False, "frozen": False}),
            scheduled,
            optax.apply_if_finite(optax.scale_by_adam(), 3),
        ),
        every_k_schedule=2,
    )

    def step(state: Any) -> Any:
        params, opt = state
        updates, opt = tx.update(jax.tree.map(jnp.sin, params), opt, params)
        return optax.apply_updates(params, updates), opt

    return (params, tx.init(params)), step


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 10)))
MAKERS = {"linen": linen_state, "nnx": nnx_state, "equinox": equinox_state, "optax": optax_state}


@pytest.mark.parametrize("maker", MAKERS)
def test_training_goes_on_bit_for_bit(maker: str) -> None:
    fresh, step = MAKERS[maker]()
    step = jax.jit(step)
    trained = step(step(placed(fresh, (4, 2))))
    stored = save([trained], cut_nbytes=64)
    same(step(restore(stored, abstract(trained))), step(trained))
    # A state that was just made: TrainState.step is Python's 0 there, and an array after the first jitted step.
    same(jax.tree.map(jnp.asarray, restore(stored, placed(fresh, (4, 2)))), trained)
    on_others = placed(trained, (2, 4))
    got = restore(stored, abstract(on_others))
    same(got, on_others)
    assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (got, on_others)), strict=True))
    assert is_abstract(abstract(on_others))


def test_a_jitted_maker_gives_the_state_on_its_shardings() -> None:
    pytest.importorskip("flax")
    fresh, step = linen_state()
    trained = jax.jit(step)(placed(fresh, (2, 4)))
    out = jax.tree.map(lambda x: x.sharding, trained)
    same(restore(save([trained]), jax.jit(lambda: fresh, out_shardings=out)), trained)


def test_the_state_of_an_nnx_module_goes_back_into_the_module() -> None:
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
    stored = save([{"net": nnx.state(net), "n": 3}])
    assert {"net/kernel/value", "net/bias/value", "n"} <= set(stored.names)
    other = nnx.eval_shape(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(2)))
    nnx.update(other, restore(stored, {"net": nnx.state(other), "n": 0})["net"])
    assert np.array_equal(other(jnp.ones((1, 4))), net(jnp.ones((1, 4))))
    # The module itself is a state too; a new one comes back.
    like = nnx.Linear(4, 4, rngs=nnx.Rngs(2))
    got = restore(save([net]), like)
    assert (type(got), got is like) == (nnx.Linear, False)
    assert np.array_equal(got(jnp.ones((1, 4))), net(jnp.ones((1, 4))))


def test_a_whole_equinox_module_holds_functions_which_are_no_leaves() -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
    with pytest.raises(StateError, match=r"activation: cannot save a .*leave it out"):
        save([model])
    arrays, static = equinox.partition(model, equinox.is_array)
    got = equinox.combine(restore(save([arrays]), jax.eval_shape(lambda: arrays)), static)
    assert np.array_equal(got(jnp.ones(4)), model(jnp.ones(4)))


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (np.int32(5), 0),
        (5, jax.eval_shape(lambda: 0)),
        (np.float32(0.1), 0.0),
        (5, jax.jit(lambda: 0 + 1)()),
    ],
)
def test_a_number_that_jit_has_made_an_array_is_the_same_number(saved: Any, like: Any) -> None:
    got = restore(save([{"step": saved}]), {"step": like})["step"]
    assert got == saved
    assert type(got) is type(like) or isinstance(got, jax.Array)


@pytest.mark.parametrize(
    ("saved", "like", "text"),
    [
        (2**40, jax.eval_shape(lambda: 0), "step: 1099511627776 has no value in int32"),
        (0.1, jax.eval_shape(lambda: 0.0), r"step: expected float32\[\], found float64\[\] \(another dtype\)"),
        (np.float32(1), 0, r"step: expected int64\[\], found float32"),
        (5, np.int32(0), r"step: expected int32\[\], found int64"),
    ],
)
def test_another_number_is_a_difference(saved: Any, like: Any, text: str) -> None:
    with pytest.raises(MismatchError, match=text):
        restore(save([{"step": saved}]), {"step": like})
