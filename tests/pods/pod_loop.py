"""Training in JAX on the hosts of slices, with notes for the test of what each rank saw."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import ray
import ray.train

import ray_ckpt
from ray_ckpt.coordinator import run_id
from tests.pods.slices import actors_of

SAVE_STEPS = 20


def train(config: dict[str, Any]) -> None:
    """Until ``config["last"]`` steps after the start, or for ever in a first attempt that is to be killed."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("chips",))
    layout = {"kernel": NamedSharding(mesh, PartitionSpec("chips")), "bias": NamedSharding(mesh, PartitionSpec())}
    init = jax.jit(lambda: {"kernel": jnp.arange(4096.0).reshape(64, 64), "bias": jnp.zeros(64)}, out_shardings=layout)
    # The mean is a collective over all hosts: none goes on without the others.
    advance = jax.jit(
        lambda s: {"kernel": s["kernel"] + 1, "bias": s["bias"] * 0 + s["kernel"].mean()}, donate_argnums=0
    )
    with ray_ckpt.Checkpointer(save_steps=SAVE_STEPS) as ckpt:
        state = ckpt.restore(init)
        restored = ckpt.restored_step or 0
        shards = state["kernel"].addressable_shards
        good = all((np.asarray(s.data) == np.arange(4096.0).reshape(64, 64)[s.index] + restored).all() for s in shards)
        note(config, ckpt, restored=ckpt.restored_step, good=bool(good), **place())
        last = 10**9 if config["endless"] and not restored else restored + config["last"]
        for step in range(restored + 1, last + 1):
            state = advance(state)
            ckpt.step(step, state)
            if step == SAVE_STEPS:
                ckpt.wait()
                note(config, ckpt, "saved", actors=actors_of(run_id(ckpt.url)), free=ray.available_resources())
            if ckpt.should_stop:
                note(config, ckpt, "stopped", step=step)
                break
            if step > SAVE_STEPS:
                # At the pace of a real step: gloo's collectives are not to fill this machine.
                threading.Event().wait(0.02)
        ckpt.report({"step": step})


def place() -> dict[str, Any]:
    """Where this process is, as it sees it."""
    import jax

    megascale = {k: v for k, v in os.environ.items() if k.startswith("MEGASCALE_") and "ADDRESS" not in k}
    return {
        "node": ray.get_runtime_context().get_node_id(),
        "chips": [jax.local_device_count(), jax.device_count()],
        "megascale": megascale,
    }


def note(config: dict[str, Any], ckpt: ray_ckpt.Checkpointer, what: str = "began", **found: Any) -> None:
    """One file for each start and rank."""
    path = Path(config["notes"], f"{what}-{ckpt.generation}-{ckpt.rank}.json")
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)


def noted(folder: Path, what: str, start: int) -> list[dict[str, Any]]:
    """What the ranks of a start noted, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{what}-{start}-*.json"))]
