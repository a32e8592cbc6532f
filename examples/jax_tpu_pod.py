"""A small transformer in JAX on all hosts of TPU pod slices, or on this machine: only the config differs.

    ray job submit --working-dir . -- python examples/jax_tpu_pod.py --config examples/configs/jax_local.yaml

State is sharded over all chips. Kill a host, or the job, and submit it again: it goes on at the newest commit.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ray.train
from ray.train.v2.jax import JaxConfig, JaxTrainer

import ray_ckpt
from examples.config import from_command
from examples.job import join, log_steps


@dataclass(frozen=True)
class Hosts:
    """One worker is one host. On TPUs Ray takes whole slices of this form: "4x4" of "TPU-V6E" has four hosts."""

    workers: int
    topology: str | None = None
    accelerator: str | None = None


@dataclass(frozen=True)
class Network:
    """The transformer. ``width`` and ``sequences`` must divide by the number of chips, ``width`` by ``heads``."""

    width: int = 96
    layers: int = 3
    heads: int = 4
    length: int = 48
    sequences: int = 24


@dataclass(frozen=True)
class Config:
    """One run. Runs of one name in one storage go on where the last one ended."""

    name: str
    storage: str
    hosts: Hosts
    model: Network
    steps: int
    save_steps: int
    report_steps: int
    max_to_keep: int = 3
    max_failures: int = 3


def train_loop(config: Config) -> None:
    """On every host."""
    import jax

    from examples.demo.model import Model, Sizes, host_mesh
    from examples.demo.text import python_help

    log, first = log_steps(), ray.train.get_context().get_world_rank() == 0
    sizes, corpus = replace(Sizes(), **vars(config.model)), python_help()
    model = Model(host_mesh(), sizes)
    with ray_ckpt.Checkpointer(save_steps=config.save_steps, max_to_keep=config.max_to_keep) as ckpt:
        state = ckpt.restore(model.init)
        if first:
            log.info("%d chips of %d hosts", jax.device_count(), jax.process_count())
        began, stalled = time.monotonic(), ckpt.stall_s
        for step in range((ckpt.restored_step or 0) + 1, config.steps + 1):
            state, loss = model.train(state, model.place(corpus.batch(step, sizes.sequences, sizes.length)))
            ckpt.step(step, state)
            if first and ckpt.stall_s > stalled:
                log.info("step %d: a copy is taken and being saved", step)
            stalled = ckpt.stall_s
            if step % config.report_steps == 0 or step == config.steps:
                metrics = {"step": step, "loss": float(loss), "seconds": time.monotonic() - began}
                if first:
                    log.info("step %d: loss %.3f, after %.1f s", *metrics.values())
                ckpt.report(metrics)
            if ckpt.should_stop:
                break


def trainer(config: Config) -> JaxTrainer:
    """The job, for TPUs where a topology is named, else for CPUs."""
    hosts = config.hosts
    on_tpu = hosts.topology is not None
    scaling: dict[str, Any] = {"num_workers": hosts.workers}
    if on_tpu:
        scaling.update(use_tpu=True, topology=hosts.topology, accelerator_type=hosts.accelerator)
    # "use_tpu" of JaxConfig is what makes the hosts one JAX, with chips or without.
    environment = {} if on_tpu else {"env_vars": {"JAX_PLATFORMS": "cpu"}}
    return JaxTrainer(
        lambda: train_loop(config),
        jax_config=JaxConfig(use_tpu=True),
        scaling_config=ray.train.ScalingConfig(**scaling),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            worker_runtime_env=environment,
        ),
    )


def main() -> None:
    """The job's driver: starts the hosts' training and says how it ended."""
    config = from_command(Config, __doc__.split("\n", 1)[0])
    log = log_steps()
    join()
    result = trainer(config).fit()
    log.info("ended with %s; newest checkpoint: %s", result.metrics, ray_ckpt.from_train(result.checkpoint).path)


if __name__ == "__main__":
    main()
