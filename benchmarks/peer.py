"""``python -m benchmarks.peer``: a restore from a peer's memory, and from a bucket on loopback.

Two hosts (raylets on this machine). A job on one of them saves and is killed; its next start runs on the other one,
which has nothing in memory: it restores from the first host's memory, through both hosts' Ray. Then the same state is
saved to a GCS server (fake-gcs-server, objects in memory) on loopback and restored from there. Timed is
`Checkpointer.restore` into memory that was not touched before, in a fresh process each time, with the choice of the
checkpoint.
"""

from __future__ import annotations

import os
import shutil
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
from benchmarks.cases import CASES
from benchmarks.report import publish
from benchmarks.rows import ROOT
from ray_ckpt import Checkpointer
from ray_ckpt.coordinator import find_agent, run_id
from ray_ckpt.snapshot import default_folder
from ray_ckpt.testing.servers import gcs_server

_STORE_NBYTES = 200_000_000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Trainer:
    """One process of the job."""

    def save(self, url: str, case: str, options: dict[str, Any]) -> int:
        """Save step 1 and wait for its commit; this process's number. Nothing is given back."""
        state = {name: CASES[case].array(i, 0) for i, (name, _) in enumerate(CASES[case].shapes)}
        self._ckpt = Checkpointer(url, rank=0, world_size=1, storage_options=options)
        self._ckpt.restore(lambda: state)
        self._ckpt.save(1, state)
        self._ckpt.wait()
        return os.getpid()

    def restore(self, url: str, case: str, options: dict[str, Any]) -> float:
        """Seconds of one restore; a wrong value is an error."""
        target = {name: np.empty(shape, np.float32) for name, shape in CASES[case].shapes}
        ckpt = Checkpointer(url, rank=0, world_size=1, storage_options=options)
        began = time.monotonic()
        restored = ckpt.restore(target)
        took = time.monotonic() - began
        for i, (name, _) in enumerate(CASES[case].shapes):
            if restored[name].tobytes() != CASES[case].array(i, 0).tobytes():
                raise RuntimeError(f"{name} is not what was saved")
        ckpt.leave()
        return took


def _on(node: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Trainer).options(num_cpus=0, scheduling_strategy=where).remote()


def _times(node: str, repeats: int, *arguments: Any) -> list[float]:
    """Restores in processes of their own."""
    found = []
    for _ in range(repeats):
        trainer = _on(node)
        found.append(ray.get(trainer.restore.remote(*arguments)))
        ray.kill(trainer)
    return found


def _forget(url: str, host: str) -> None:
    """Nothing of the run is left in the memory of the host."""
    ray.kill(find_agent(url, host))
    run = run_id(url)
    for folder in default_folder(run).parent.glob(f"{run}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _measure(case: str, repeats: int, disk: Path) -> dict[str, list[float]]:
    here, there = (node["NodeID"] for node in ray.nodes())
    with tempfile.TemporaryDirectory(dir=disk) as folder, gcs_server() as server:
        saver = _on(there)
        ray.get(saver.save.remote(folder, case, {}))
        ray.kill(saver)
        for path in Path(folder).glob("model.ckpt-1.data*"):
            # A byte read from the store instead would be an error.
            path.write_bytes(b"")
        times = {"a peer's memory": _times(here, repeats, folder, case, {})}
        _forget(folder, there)
        url = f"{server.make_bucket('bench')}/run"
        saver = _on(there)
        ray.get(saver.save.remote(url, case, server.storage_options))
        ray.kill(saver)
        _forget(url, there)
        times["a GCS server on loopback"] = _times(here, repeats, url, case, server.storage_options)
    return times


@app.command()
def peer(
    case: Annotated[str, typer.Option(help="big (1 GiB) or quick (256 MiB)")] = "quick",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    out: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "benchmarks/results/peer.md",
) -> None:
    """Restore from a peer's memory and from a bucket, and write how long each took."""
    disk.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    node = {"num_cpus": 2, "object_store_memory": _STORE_NBYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        times = _measure(case, repeats, disk)
    finally:
        ray.shutdown()
        cluster.shutdown()
    lines = [f"# Restore of {CASES[case].title} from another host's memory and from a bucket", ""]
    lines += ["| from | median, s | all, s |", "|---|---:|---|"]
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        lines.append(f"| {name} | {medians[name]:.2f} | {', '.join(f'{t:.2f}' for t in found)} |")
    first, second = medians.values()
    meta = machine.describe({"disk": str(disk)}, "benchmarks.peer")
    lines += ["", f"The peer's memory takes {first / second:.2f} of the bucket's time.", ""]
    publish("\n".join([*lines, *(f"- {name}: {value}" for name, value in meta.items()), ""]), out)


if __name__ == "__main__":
    app()
