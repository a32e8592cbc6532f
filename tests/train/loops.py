"""Training functions for Ray Train: what a user would write, with notes of what they saw and mishaps on demand."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective

import ray_ckpt
from ray_ckpt.coordinator import find
from ray_ckpt.train import hand_over
from tests.system.states import mixed, plain, zeros_like
from tests.system.waiting import pause

Config = dict[str, Any]


def train(config: Config) -> None:
    """Steps up to ``config["steps"]`` of `mixed`; ``settings`` for the Checkpointer; see `after_step` for the rest."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with ray_ckpt.Checkpointer(*config.get("url", []), **config.get("settings", {})) as ckpt:
        state = ckpt.restore(zeros_like(mixed(rank, world, 0)))
        restored = ckpt.restored_step or 0
        note(config, ckpt, good=same(state, mixed(rank, world, restored)) if restored else None)
        for step in range(restored + 1, config["steps"] + 1):
            state = mixed(rank, world, step)
            ckpt.step(step, state)
            after_step(config, ckpt, step)


def same(found: Any, expected: Any) -> bool:
    """Bit for bit, but for what each worker has of its own, which a resize changes."""
    return all(plain(found[name]) == plain(expected[name]) for name in expected if name != "rng")


def note(config: Config, ckpt: ray_ckpt.Checkpointer, **more: Any) -> None:
    """Leave for the test what this start found; one file for each start and rank."""
    registered = ray.train.get_checkpoint()
    found = {
        "restored": ckpt.restored_step,
        "world": ckpt.world_size,
        "registered": None if registered is None else ray_ckpt.from_train(registered).step,
        **more,
    }
    Path(config["notes"], f"{ckpt.generation}-{ckpt.rank}.json").write_text(json.dumps(found))


def after_step(config: Config, ckpt: ray_ckpt.Checkpointer, step: int) -> None:
    """``wait_at``: wait for the commit; ``report_at``: report; ``die_at``: {rank: step}, once in all attempts."""
    if step in config.get("wait_at", ()):
        ckpt.wait()
    if step in config.get("report_at", ()):
        ckpt.report({"step": step})
    if config.get("die_at", {}).get(ckpt.rank) == step and first_time(config, "died"):
        os.kill(os.getpid(), signal.SIGKILL)


def first_time(config: Config, what: str) -> bool:
    """Whether nobody has asked this before, in any attempt."""
    try:
        Path(config["notes"], what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def without_coordinator(config: Config) -> None:
    """Step 2 is snapshotted and reported thrice while the coordinator is stopped: no report waits for the save."""
    rank, world = (getattr(ray.train.get_context(), f"get_world_{what}")() for what in ("rank", "size"))
    with ray_ckpt.Checkpointer(save_steps=1) as ckpt:
        ckpt.restore(zeros_like(mixed(rank, world, 0)))
        ckpt.step(1, mixed(rank, world, 1))
        ckpt.wait()
        ray.train.collective.barrier()
        pid = ray.get(find(ckpt.url).__ray_call__.remote(lambda _: os.getpid()))
        ray.train.collective.barrier()
        if rank == 0:
            os.kill(pid, signal.SIGSTOP)
        ray.train.collective.barrier()
        ckpt.step(2, mixed(rank, world, 2))
        seen = [_attached(ckpt, i) for i in range(3)]
        note(config, ckpt, seen=seen, decided=ckpt.outcome(2) is not None)
        ray.train.collective.barrier()
        if rank == 0:
            os.kill(pid, signal.SIGCONT)


def preempted(config: Config) -> None:
    """The first start stops at ``config["stop_at"]`` and hands over to Ray Train, as `close` does after a drain."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with ray_ckpt.Checkpointer(**config["settings"]) as ckpt:
        ckpt.restore(zeros_like(mixed(rank, world, 0)))
        note(config, ckpt)
        last = config["stop_at"] if ckpt.restored_step is None else config["steps"]
        for step in range((ckpt.restored_step or 0) + 1, last + 1):
            ckpt.step(step, mixed(rank, world, step))
            ckpt.report({"step": step})
    if last == config["stop_at"]:
        hand_over(ckpt.url, last, "a host is drained")


def failing(config: Config) -> None:
    """`train` whose last step fails."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with ray_ckpt.Checkpointer(**config["settings"]) as ckpt:
        for step in range(1, config["steps"] + 1):
            ckpt.step(step, mixed(rank, world, step))
            after_step(config, ckpt, step)
        raise ValueError("the user's own")


def _attached(ckpt: ray_ckpt.Checkpointer, index: int) -> int | None:
    ckpt.report({"index": index})
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else ray_ckpt.from_train(checkpoint).step


def disagreeing(config: Config) -> None:
    """`train` with a cadence of each rank's own."""
    rank = ray.train.get_context().get_world_rank()
    train({**config, "settings": {"save_steps": rank + 1}})


def until_start(config: Config) -> None:
    """Train without an end, saving every other step; start number ``config["last"]`` does four steps."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with ray_ckpt.Checkpointer(save_steps=2, max_to_keep=None) as ckpt:
        state = ckpt.restore(zeros_like(mixed(rank, world, 0)))
        step = restored = ckpt.restored_step or 0
        note(config, ckpt, good=same(state, mixed(rank, world, restored)) if restored else None)
        while ckpt.generation < config["last"] or step < restored + 4:
            step += 1
            ckpt.step(step, mixed(rank, world, step))
            pause(0.2)
        ckpt.report({"step": step})
