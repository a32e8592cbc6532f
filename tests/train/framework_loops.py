"""Training functions of JaxTrainer, TensorflowTrainer and TorchTrainer."""

from __future__ import annotations

from typing import Any

import numpy as np

import ray_ckpt
from tests.train.loops import Config, note

SHAPE = (8, 4)


def jax_loop(config: Config) -> None:
    """A state that is sharded over the devices of all processes, and a replicated one; a step adds one to both."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("data",))
    shardings = {"w": NamedSharding(mesh, PartitionSpec("data")), "b": NamedSharding(mesh, PartitionSpec())}

    def init() -> dict[str, Any]:
        return {"w": jnp.arange(32, dtype=jnp.bfloat16).reshape(SHAPE), "b": jnp.zeros(3, jnp.int32)}

    train_step = jax.jit(lambda state: {name: value + 1 for name, value in state.items()}, donate_argnums=0)
    with ray_ckpt.Checkpointer(save_steps=2) as ckpt:
        state = ckpt.restore(jax.jit(init, out_shardings=shardings))
        note(config, ckpt, processes=jax.process_count(), devices=jax.device_count())
        for step in range((ckpt.restored_step or 0) + 1, config["steps"] + 1):
            state = train_step(state)
            ckpt.step(step, state)
        ckpt.report({"step": step})


def tensorflow_loop(config: Config) -> None:
    """A `tf.train.Checkpoint` of mirrored variables; a step adds one."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        variable = tf.Variable(np.arange(32, dtype=np.float32).reshape(SHAPE))
        step = tf.Variable(0, dtype=tf.int64)
    with ray_ckpt.Checkpointer(save_steps=2) as ckpt:
        state = ckpt.restore(tf.train.Checkpoint(variable=variable, step=step))
        note(config, ckpt, replicas=strategy.num_replicas_in_sync, found=int(step.numpy()))
        while int(step.numpy()) < config["steps"]:
            strategy.run(lambda: (variable.assign_add(tf.ones(SHAPE)), step.assign_add(1)))
            ckpt.step(int(step.numpy()), state)
        ckpt.report({"step": int(step.numpy())})


def torch_loop(config: Config) -> None:
    """A model in DistributedDataParallel with its optimizer."""
    import ray.train.torch
    import torch

    torch.manual_seed(0)
    model = ray.train.torch.prepare_model(torch.nn.Linear(*SHAPE))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def state(step: int) -> dict[str, Any]:
        return {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}

    def train_step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, SHAPE[0])).square().sum().backward()
        optimizer.step()

    with ray_ckpt.Checkpointer(save_steps=2) as ckpt:
        train_step()
        found = ckpt.restore(lambda: state(0), partial=False)
        if ckpt.restored_step:
            model.module.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
        note(config, ckpt, sum=float(model.module.weight.detach().double().sum()))
        for step in range((ckpt.restored_step or 0) + 1, config["steps"] + 1):
            train_step()
            ckpt.step(step, lambda step=step: state(step))
        note(config, ckpt, sum=float(model.module.weight.detach().double().sum()))
        ckpt.report({"step": step})
