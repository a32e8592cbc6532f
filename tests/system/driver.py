"""A rank of a job in a process of its own, whose main thread trains: ``driver.py ADDRESS URL RANK WORLD``."""

from __future__ import annotations

import json
import sys

import ray

import ray_ckpt
from tests.system import states
from tests.system.job import QUICK
from tests.system.waiting import pause


def main() -> None:
    """Train until all stop; say when the first steps are done, and how it ended."""
    address, url, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    with ray_ckpt.Checkpointer(url, rank=rank, world_size=world, timeouts=QUICK) as ckpt:
        ckpt.restore(states.zeros_like(states.small(rank, world, 0)))
        step = 0
        while not ckpt.should_stop:
            step += 1
            ckpt.step(step, states.small(rank, world, step))
            if step == 5:
                print("training", flush=True)
            pause(0.01)
    print(json.dumps({"step": step, "preempted": ckpt.preempted, "reason": ckpt.stop_reason}), flush=True)


if __name__ == "__main__":
    main()
