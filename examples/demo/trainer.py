"""One host's training process: a plain Ray actor that trains its part of the model and saves as it goes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.journal import Finished, Journal, Restored, Step

# Below those that the kernel gives to outgoing connections: it must still be free when JAX has been imported.
_PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class Job:
    """One start of the job. ``hosts``: the number of the host of each rank.

    ``steps`` or ``seconds``: how long it trains; neither: until it is killed.
    """

    start: int
    url: str
    hosts: tuple[int, ...]
    save_secs: float
    memory: str
    journals: Path
    steps: int | None = None
    seconds: float | None = None

    def journal(self, rank: int) -> Path:
        """Where a rank's journal lies."""
        return self.journals / f"start{self.start}-rank{rank}.jsonl"


class Trainer:
    """The actor. Its methods are called in this order."""

    def free_address(self) -> str:
        """Where rank 0 can have JAX's coordination service listen."""
        for port in random.sample(_PORTS, len(_PORTS)):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return f"127.0.0.1:{port}"
        raise OSError(f"no port from {_PORTS[0]} to {_PORTS[-1]} is free for JAX's coordination service")

    def pid(self) -> int:
        """The process to kill."""
        return os.getpid()

    def train(self, job: Job, rank: int, address: str) -> None:
        """Join the other ranks and train to the end of the job."""
        began = time.time()
        import jax

        bind_to = address if rank == 0 else None
        jax.distributed.initialize(address, len(job.hosts), rank, coordinator_bind_address=bind_to)
        _train(job, rank, Journal(job.journal(rank)), began)
        jax.distributed.shutdown()


def _train(job: Job, rank: int, journal: Journal, set_up: float) -> None:
    import ray_ckpt
    from examples.demo.model import Model, Sizes, host_mesh
    from examples.demo.text import python_help

    sizes, corpus = Sizes(), python_help()
    model = Model(host_mesh(), sizes)
    eval_batch = model.place(corpus.eval_batch(sizes.sequences // 2, sizes.length))
    with ray_ckpt.Checkpointer(
        job.url, save_secs=job.save_secs, max_to_keep=None, memory_dir=job.memory, writers_per_host=1
    ) as ckpt:
        began = time.time()
        state = ckpt.restore(model.init)
        seconds = time.time() - began
        journal.write(Restored(ckpt.restored_step, set_up, seconds, float(model.evaluate(state, eval_batch))))
        first = (ckpt.restored_step or 0) + 1
        for step in range(first, first + (job.steps or 1_000_000)):
            began, stalled_before = time.time(), ckpt.stall_s
            state, loss = model.train(state, model.place(corpus.batch(step, sizes.sequences, sizes.length)))
            losses = float(loss), float(model.evaluate(state, eval_batch))
            trained = time.time()
            if step == first:
                begun = trained
            ckpt.step(step, state)
            journal.write(Step(step, began, trained, time.time(), *losses, ckpt.stall_s - stalled_before))
            if ckpt.should_stop:
                break
            if rank == 0 and job.seconds is not None and trained - begun > job.seconds:
                ckpt.request_stop("the demo has trained long enough")
        gathered = model.gather(state)
    digests = _digests(gathered) if rank == 0 else {}
    journal.write(Finished(step, ckpt.stall_s, digests))


def _digests(params: Any) -> dict[str, str]:
    """SHA-256 of the bytes of each parameter, under its name in the checkpoint."""
    import jax
    import numpy as np

    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        "/".join(["params", *(key.key for key in path)]): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves
    }
