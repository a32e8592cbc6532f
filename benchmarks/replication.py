"""``python -m benchmarks.replication``: what copies on a peer cost the training loop.

Two hosts (raylets on this machine), one rank each, half of the state each, a snapshot for memory every 50 steps.
Rank 0's loop is timed: the steps of `benchmarks.loop` (one big tensor updated, then small matrices multiplied by one
thread). It has a core to itself, as where cores are to spare; all else shares the others: both hosts' agents, all of
Ray, and rank 1, whose loop sleeps for about as long as a step takes and snapshots the same: it is a machine of its own
in a real job.

Runs without copies and with them take turns, each in fresh processes; a run's time is that of all its steps, the
snapshots included. What copies cost is the median of the rounds' ratios.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks import machine
from benchmarks.loop import MATMULS
from benchmarks.report import publish
from benchmarks.rows import ENVIRONMENT, ROOT
from ray_ckpt import Checkpointer, Slice
from ray_ckpt.coordinator import find

MIB = 1 << 20
EVERY = 50
LIMIT = 1.05
_STORE_NBYTES = 80_000_000
_TENSORS = 8
_SLEEP_S = 0.01

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _cores() -> list[int]:
    """The machine's, whatever this process has left itself."""
    return list(range(os.cpu_count() or 1))


class Trainer:
    """One rank with its half of the state."""

    def open(self, url: str, rank: int, nbytes: int, settings: dict[str, Any]) -> None:
        """Make the state and the Checkpointer, and wait until all memory is there."""
        columns = nbytes // 4 // _TENSORS
        self._arrays = [np.full((1, columns), rank, np.float32) for _ in range(_TENSORS)]
        self._state = {f"w{i}": Slice(a, (2, columns), (rank, 0)) for i, a in enumerate(self._arrays)}
        self._a = np.full((160, 160), 1 / 160, np.float32)
        self._b = np.empty_like(self._a)
        self._rank = rank
        self._ckpt = Checkpointer(url, rank=rank, world_size=2, **settings)
        self._ckpt.restore(lambda: self._state)
        self._ckpt.save(1, self._state)
        self._ckpt.wait()
        if rank == 0:
            # This thread alone: those that the process has by now, the Checkpointer's too, stay where all else is.
            os.sched_setaffinity(0, {_cores()[0]})

    def train(self, first: int, last: int) -> float:
        """Seconds of these steps."""
        began = time.monotonic()
        for step in range(first, last + 1):
            if self._rank == 0:
                array = self._arrays[step % _TENSORS]
                np.add(array, 1, out=array)
                for _ in range(MATMULS):
                    np.matmul(self._a, self._a, out=self._b)
            else:
                time.sleep(_SLEEP_S)
            self._ckpt.step(step, self._state)
        return time.monotonic() - began

    def leave(self) -> None:
        """End without a save."""
        self._ckpt.leave()


def _run(nodes: list[str], url: str, nbytes: int, steps: int, settings: dict[str, Any]) -> tuple[float, int]:
    """(seconds of rank 0's loop, snapshots of which both halves had their copy in the end or on the way)."""
    trainers = []
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": where, "runtime_env": {"env_vars": dict(ENVIRONMENT)}}
        trainers.append(ray.remote(Trainer).options(**options).remote())
    ray.get([t.open.remote(url, rank, nbytes // 2, settings) for rank, t in enumerate(trainers)])
    first, copied = 2, set()
    ray.get([t.train.remote(first, first + EVERY) for t in trainers])
    first += EVERY + 1
    refs = [t.train.remote(first, first + steps - 1) for t in trainers]
    coordinator = find(url)
    while len(ray.wait(refs[:1], timeout=0.2)[0]) == 0:
        copied.add(ray.get(coordinator.status.remote()).replicated_step)
    took = ray.get(refs)[0]
    ray.get([t.leave.remote() for t in trainers])
    for trainer in trainers:
        ray.kill(trainer)
    return took, len(copied - {None})


@app.command()
def replication(
    mib: Annotated[int, typer.Option(help="size of the state")] = 256,
    steps: Annotated[int, typer.Option(help="a run, after the first snapshots")] = 500,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    mib_per_s: Annotated[float, typer.Option(help="bound of a host's copying; 0: none")] = 0.0,
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    out: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "benchmarks/results/replication.md",
) -> None:
    """Time a loop with snapshots for memory, without and with copies of them."""
    disk.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    node = {"num_cpus": 2, "object_store_memory": _STORE_NBYTES}
    rate = {"replica_bytes_per_s": mib_per_s * MIB} if mib_per_s else {}
    ways: dict[str, dict[str, Any]] = {
        "no snapshots": {},
        "a snapshot every 50 steps": {"memory_steps": EVERY},
        "the same, each copied to the peer": {"memory_steps": EVERY, "replicas": 1, "snapshots": 3, **rate},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    copied = 0
    # What is started from here on inherits it.
    os.sched_setaffinity(0, set(_cores()[1:]))
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = [n["NodeID"] for n in ray.nodes()]
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            for number in range(rounds):
                for way, (name, settings) in enumerate(ways.items()):
                    took, copied = _run(nodes, f"{folder}/run-{number}-{way}", mib * MIB, steps, settings)
                    times[name].append(took)
    finally:
        ray.shutdown()
        cluster.shutdown()
    publish(_page(mib, steps, mib_per_s, times, copied, disk), out)


def _page(mib: int, steps: int, mib_per_s: float, times: dict[str, list[float]], copied: int, disk: Path) -> str:
    none, without, with_copies = times.values()
    lines = [f"# Snapshots of {mib} MiB over 2 hosts every {EVERY} steps, and copies of them", ""]
    lines += ["| | ms a step, median | all |", "|---|---:|---|"]
    for name, found in times.items():
        each = ", ".join(f"{1000 * t / steps:.2f}" for t in found)
        lines.append(f"| {name} | {1000 * statistics.median(found) / steps:.2f} | {each} |")
    ratios = sorted(b / a for a, b in zip(without, with_copies, strict=True))
    ratio = statistics.median(ratios)
    verdict = "within" if ratio <= LIMIT else "above"
    bound = f", copying at {mib_per_s:.0f} MiB/s at most" if mib_per_s else ""
    cost = 100 * (ratio - 1)
    alone = 100 * (statistics.median(b / a for a, b in zip(none, without, strict=True)) - 1)
    told = (
        f"Copies cost {cost:.1f} % of the step time{bound}: {verdict} the limit of 5 % (of {len(ratios)} rounds "
        f"{100 * (ratios[0] - 1):.1f} to {100 * (ratios[-1] - 1):.1f} %). "
        f"Snapshots alone cost {alone:.1f} %. "
        f"Of the last run's {steps // EVERY} snapshots at least {copied} were seen to have their copies."
    )
    lines += ["", told, ""]
    meta = machine.describe({"disk": str(disk)}, "benchmarks.replication")
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in meta.items()), ""])


if __name__ == "__main__":
    app()
