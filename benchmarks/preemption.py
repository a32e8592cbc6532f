"""``python -m benchmarks.preemption``: how much of a notice does the emergency save take?

Two hosts (raylets on this machine) train with half of the state each; one of them is drained by Ray with a notice of so
many seconds. Measured from the drain's call until both loops have stopped, and until all is committed with fsync. Every
repetition has a run and a drained host of its own, and made a usual save before.
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
from benchmarks.report import publish
from benchmarks.rows import ROOT
from ray_ckpt import Checkpointer, Slice, checkpoints
from ray_ckpt.agent.notices import Notice, drain

MIB = 1 << 20
LIMIT = 0.5
"""Share of the notice within which all is to be committed."""
_STORE_NBYTES = 80_000_000
_STEP_S = 0.02

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Trainer:
    """One rank with its half of the state."""

    def train(self, url: str, rank: int, nbytes: int) -> tuple[int, float, float]:
        """Save once, train until told to stop; (step, when the loop ended, when all was committed)."""
        columns = nbytes // 4
        array = np.full((1, columns), rank, np.float32)
        state = {"w": Slice(array, (2, columns), (rank, 0))}
        with Checkpointer(url, rank=rank, world_size=2) as ckpt:
            ckpt.restore(lambda: state)
            ckpt.step(1, state)
            ckpt.save(2, state)
            ckpt.wait()
            Path(f"{url}.ready-{rank}").touch()
            step = 2
            while not ckpt.should_stop:
                step += 1
                array[0, :1000] = step
                time.sleep(_STEP_S)
                ckpt.step(step, state)
            stopped = time.time()
        return step, stopped, time.time()


def _once(cluster: Cluster, stays: str, url: str, nbytes: int, notice_s: float) -> tuple[float, float]:
    """Seconds from the drain until both loops have ended, and until all is committed."""
    before = {node["NodeID"] for node in ray.nodes()}
    added = cluster.add_node(num_cpus=2, object_store_memory=_STORE_NBYTES)
    (leaves,) = {node["NodeID"] for node in ray.nodes()} - before
    running = []
    for rank, node in enumerate((stays, leaves)):
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        trainer: Any = ray.remote(Trainer).options(num_cpus=0, scheduling_strategy=where).remote()
        running.append(trainer.train.remote(url, rank, nbytes // 2))
    while not all(os.path.exists(f"{url}.ready-{rank}") for rank in range(2)):
        time.sleep(0.1)
    time.sleep(2.0)
    began = time.time()
    drain(leaves, Notice("the benchmark takes the host away", notice_s))
    ends = ray.get(running)
    steps = {step for step, _, _ in ends}
    found = checkpoints(url)[-1]
    if steps != {found.step}:
        raise RuntimeError(f"the ranks stopped at steps {steps}, and {found.step} is committed")
    cluster.remove_node(added)
    return max(stopped for _, stopped, _ in ends) - began, max(committed for *_, committed in ends) - began


@app.command()
def preemption(
    mib: Annotated[int, typer.Option(help="size of the state")] = 1024,
    notice_s: Annotated[float, typer.Option(help="seconds from the drain until the host goes")] = 25.0,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    out: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "benchmarks/results/preemption.md",
) -> None:
    """Drain a host of a training job, and write when its state was safe."""
    disk.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": _STORE_NBYTES, "include_dashboard": False},
    )
    times = []
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        stays = ray.get_runtime_context().get_node_id()
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            for number in range(repeats):
                times.append(_once(cluster, stays, f"{folder}/run-{number}", mib * MIB, notice_s))
    finally:
        ray.shutdown()
        cluster.shutdown()
    committed = statistics.median(committed for _, committed in times)
    verdict = "within" if committed <= LIMIT * notice_s else "above"
    lines = [f"# An emergency save of {mib} MiB over 2 hosts, {notice_s:.0f} s before one goes", ""]
    lines += ["| both loops stopped after, s | committed after, s | share of the notice |", "|---:|---:|---:|"]
    lines += [f"| {stopped:.2f} | {done:.2f} | {done / notice_s:.0%} |" for stopped, done in times]
    lines += ["", f"Median {committed:.2f} s, {committed / notice_s:.0%} of the notice: {verdict} {LIMIT:.0%}.", ""]
    meta = machine.describe({"disk": str(disk)}, "benchmarks.preemption")
    publish("\n".join([*lines, *(f"- {name}: {value}" for name, value in meta.items()), ""]), out)


if __name__ == "__main__":
    app()
