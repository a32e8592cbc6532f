"""What ray_ckpt costs while nothing is to be saved: coordinator, agent, the worker's own process, and `step()`.

    python -m benchmarks.idle [--quick] [--out FILE]

A Ray of its own on this machine; a loop of 20 steps a second, first without and then with a `Checkpointer`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.report import publish
from ray_ckpt import Checkpointer
from ray_ckpt.agent.find import agent_name
from ray_ckpt.coordinator import NAMESPACE, find

STEPS_A_SECOND = 20
RESULT = Path(__file__).parent / "results" / "idle.md"
CALLS = 20_000


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, of all its threads (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Empty:
    """An async actor that does nothing."""

    async def pid(self) -> int:
        """Its process."""
        return os.getpid()


def watch(pids: dict[str, int], seconds: float, step: Any) -> dict[str, float]:
    """Share of a core that each process takes while a loop calls ``step(number)``."""
    before, began = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
    for number in range(1, int(seconds * STEPS_A_SECOND) + 1):
        step(number)
        time.sleep(1 / STEPS_A_SECOND)
    took = time.monotonic() - began
    return {name: (cpu_s(pid) - before[name]) / took for name, pid in pids.items()}


def measure(seconds: float, folder: str) -> list[tuple[str, float]]:
    """(what, number) pairs; shares in percent of a core, times in microseconds."""
    actor: Any = ray.remote(Empty).options(num_cpus=0, max_concurrency=10_000).remote()
    pids = {"empty actor": ray.get(actor.pid.remote()), "worker without": os.getpid()}
    time.sleep(2.0)
    shares = watch(pids, seconds, lambda _: None)
    with Checkpointer(folder, save_steps=10**9) as ckpt:
        state = {"w": np.zeros(1000, np.float32)}
        ckpt.step(0, state)
        agent = ray.get_actor(agent_name(folder, ray.get_runtime_context().get_node_id()), namespace=NAMESPACE)
        pids = {"empty actor": pids["empty actor"], "worker": os.getpid()}
        pids |= {"agent": ray.get(agent.pid.remote()), "coordinator": ray.get(find(folder).pid.remote())}
        # The pool has been warmed up and the memory made by then.
        time.sleep(8.0)
        times: list[int] = []

        def step(number: int) -> None:
            began = time.perf_counter_ns()
            ckpt.step(number, state)
            times.append(time.perf_counter_ns() - began)

        shares |= watch(pids, seconds, step)
        paced = statistics.median(times)
        times.clear()
        for number in range(10**6, 10**6 + CALLS):
            step(number)
        close = statistics.median(times)
    empty = shares["empty actor"]
    return [
        ("an empty async actor, % of a core", 100 * empty),
        ("coordinator above it, % of a core", 100 * (shares["coordinator"] - empty)),
        ("agent above it, % of a core", 100 * (shares["agent"] - empty)),
        ("worker above the same loop without a Checkpointer, % of a core",
         100 * (shares["worker"] - shares["worker without"])),
        ("step(), nothing due, median us, 20 steps a second", paced / 1e3),
        ("step(), nothing due, median us, one after the other", close / 1e3),
    ]  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 s instead of 30 s; nothing is written")
    parser.add_argument("--out", type=Path, default=None, help=f"where the table goes (default: {RESULT.name})")
    args = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(5.0 if args.quick else 30.0, folder)
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray_ckpt", "ray"))
    command = " ".join(["python -m benchmarks.idle", *sys.argv[1:]])
    lines = ["# At idle", "", f"`{command}`, {datetime.now(timezone.utc):%Y-%m-%d}", ""]
    lines += [
        f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores, Linux {platform.release()}.",
        "",
    ]
    lines += ["| what | measured |", "|---|---:|", *(f"| {what} | {number:.2f} |" for what, number in rows)]
    text = "\n".join(lines) + "\n"
    publish(text, args.out or (None if args.quick else RESULT))


if __name__ == "__main__":
    main()
