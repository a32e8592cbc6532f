"""A small character-level transformer in JAX, its optimizer, and how both are laid out over the hosts.

Parameters and Adam's moments are sharded over the mesh axis "hosts" as in ZeRO-3: each host keeps one part,
gathers the rest for a step, and updates its own part. Sizes are multiples of 12, so 1, 2, 3 and 4 hosts fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "hosts"
State = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The model's dimensions, and those of a batch."""

    vocab: int = 108
    width: int = 96
    layers: int = 3
    heads: int = 4
    length: int = 48
    sequences: int = 24


def _shapes(sizes: Sizes) -> dict[str, dict[str, tuple[tuple[int, ...], float]]]:
    """Shape and scale of each parameter's initial noise; scale 0: all ones. Blocks are stacked along axis 0."""
    vocab, width, layers = sizes.vocab, sizes.width, sizes.layers
    return {
        "embed": {
            "char": ((vocab, width), 0.05),
            "pair": ((vocab * vocab, width), 0.05),
            "position": ((sizes.length, width), 0.05),
        },
        "blocks": {
            "norm": ((layers, 2, width), 0.0),
            "qkv": ((layers, width, 3 * width), width**-0.5),
            "out": ((layers, width, width), (2 * layers * width) ** -0.5),
            "up": ((layers, width, 4 * width), width**-0.5),
            "down": ((layers, 4 * width, width), (8 * layers * width) ** -0.5),
        },
        "head": {"norm": ((width,), 0.0), "kernel": ((width, vocab), width**-0.5)},
    }


def _init_params(sizes: Sizes, seed: int) -> dict[str, dict[str, Any]]:
    """All of it is cut from one array of noise: one random call compiles much faster than one for each."""
    shapes = _shapes(sizes)
    total = sum(math.prod(shape) for group in shapes.values() for shape, _ in group.values())
    noise = jax.random.normal(jax.random.key(seed, impl="rbg"), (total,), jnp.float32)
    begin = 0
    params: dict[str, dict[str, Any]] = {}
    for name, group in shapes.items():
        params[name] = {}
        for leaf, (shape, scale) in group.items():
            end = begin + math.prod(shape)
            params[name][leaf] = scale * noise[begin:end].reshape(shape) if scale else jnp.ones(shape)
            begin = end
    return params


def _normed(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _attention(sizes: Sizes, x: Any, qkv: Any) -> Any:
    batch, length, width = x.shape
    parts = (x @ qkv).reshape(batch, length, 3, sizes.heads, width // sizes.heads)
    query, key, value = (parts[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // sizes.heads)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


def loss(sizes: Sizes, params: Any, batch: Any) -> Any:
    """Mean cross entropy in nats of each next character of ``batch``, int32 ``[sequences, length + 1]``."""
    chars, targets = batch[:, :-1], batch[:, 1:]
    pairs = chars + sizes.vocab * jnp.pad(chars[:, :-1], ((0, 0), (1, 0)))
    embed = params["embed"]
    x = embed["char"][chars] + embed["pair"][pairs] + embed["position"]

    def block(x: Any, weights: Any) -> tuple[Any, None]:
        x = x + _attention(sizes, _normed(x, weights["norm"][0]), weights["qkv"]) @ weights["out"]
        x = x + jax.nn.gelu(_normed(x, weights["norm"][1]) @ weights["up"]) @ weights["down"]
        return x, None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    logits = _normed(x, params["head"]["norm"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def host_mesh() -> Mesh:
    """One axis, all devices of the job along it, in the order of their processes."""
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    return Mesh(np.array(devices), (AXIS,))


def spec_of(shape: tuple[int, ...], hosts: int) -> PartitionSpec:
    """The longest dimension that divides by the number of hosts is sharded; what is small is replicated."""
    fitting = [axis for axis, size in enumerate(shape) if size % hosts == 0]
    if math.prod(shape) < 4096 or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[AXIS if i == axis else None for i in range(len(shape))])


class Model:
    """The jitted functions of training on one mesh."""

    def __init__(self, mesh: Mesh, sizes: Sizes, seed: int = 0) -> None:
        self.sizes = sizes
        self._mesh = mesh
        self._adam = optax.adamw(optax.warmup_constant_schedule(0.0, 4e-3, 20), mu_dtype=jnp.bfloat16)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        shapes = jax.eval_shape(lambda: self._init(seed))
        self._layout = jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf.shape, mesh.size)), shapes)
        self.init = jax.jit(lambda: self._init(seed), out_shardings=self._layout)
        self.train = jax.jit(self._train, donate_argnums=0, out_shardings=(self._layout, self._everywhere))
        self.evaluate = jax.jit(self._evaluate, out_shardings=self._everywhere)
        self.gather = jax.jit(lambda state: state["params"], out_shardings=self._everywhere)

    def place(self, batch: np.ndarray[Any, Any]) -> Any:
        """A batch that every host has whole, as a global array of which each host keeps its sequences."""
        return jax.make_array_from_callback(batch.shape, self._split, lambda index: batch[index])

    def _init(self, seed: int) -> State:
        params = _init_params(self.sizes, seed)
        return {"params": params, "optimizer": self._adam.init(params)}

    def _loss(self, params: Any, batch: Any) -> Any:
        gathered = jax.lax.with_sharding_constraint(params, self._everywhere)
        return loss(self.sizes, gathered, batch)

    def _evaluate(self, state: State, batch: Any) -> Any:
        return self._loss(state["params"], batch)

    def _train(self, state: State, batch: Any) -> tuple[State, Any]:
        """The state after one step, and its loss on the batch before that."""
        params = state["params"]
        found, gradient = jax.value_and_grad(self._loss)(params, batch)
        update, optimizer = self._adam.update(gradient, state["optimizer"], params)
        return {"params": optax.apply_updates(params, update), "optimizer": optimizer}, found
