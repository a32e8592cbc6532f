"""What the coordinator costs at 64 to 10,000 hosts and 10^4 to 10^6 index entries.

    python -m benchmarks.scale [--quick] [--out FILE]

The real coordinator actor runs in a process of its own (`benchmarks.scale_coordinator`), on a local directory; this
one simulates the hosts (`benchmarks.scale_hosts`), which join, restore, train and save. Nothing is scaled in time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.ray_call import measure as measure_call
from benchmarks.report import publish
from benchmarks.scale_coordinator import Frames
from benchmarks.scale_hosts import SAVE_STEPS, SimulatedHost, Wire, layouts
from ray_ckpt.protocol.messages import JobConfig

FULL = ((64, 10**4), (512, 10**5), (4096, 10**6), (10_000, 10**5), (10_000, 10**6))
QUICK = ((64, 10**4), (512, 10**5))
RESULT = Path(__file__).parent / "results" / "scale.md"
STEPS_A_SECOND = 20
SAVES = 3
LIMIT_S = 600.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration. CPU is the coordinator process's, without Ray's share of a call.

    ``*_cpu_s`` of the start (join, restore, plan) and of a save (mean), ``calls`` and ``nbytes`` to and from the
    coordinator a save, ``commit_s`` and ``told_s`` from the last shard's report to the commit and until every host
    knows of it (worst), ``idle_cpu`` and ``idle_calls`` a second while all hosts train.
    """

    hosts: int
    entries: int
    start_s: float
    start_cpu_s: float
    save_cpu_s: float
    calls: float
    nbytes: float
    commit_s: float
    told_s: float
    idle_cpu: float
    idle_calls: float
    peak_nbytes: float


class Run:
    """Hosts, their clock and the connection to the coordinator."""

    def __init__(self, hosts: int, entries: int) -> None:
        self.frames = Frames(self._on_answer)
        self.step = 0
        self._asked: dict[int, SimulatedHost | asyncio.Future[Any]] = {}
        self._calls = 0
        config = JobConfig(world_size=hosts, save_steps=SAVE_STEPS)
        wire = Wire(self._send, lambda s, f: asyncio.get_running_loop().call_later(s, f), random.Random(0))
        described = layouts(hosts, entries)
        self.hosts = [SimulatedHost(rank, config, layout, wire) for rank, layout in enumerate(described)]

    def _send(self, host: SimulatedHost, report: Any, seen: tuple[int, int], wait_s: float) -> None:
        self._call(host, "exchange", report, seen, wait_s)

    def _call(self, who: SimulatedHost | asyncio.Future[Any], method: str, *arguments: Any) -> None:
        self._calls += 1
        self._asked[self._calls] = who
        self.frames.send(pickle.dumps((self._calls, method, arguments)))

    def _on_answer(self, frame: bytes) -> None:
        call, result = pickle.loads(frame)
        who = self._asked.pop(call)
        if isinstance(who, SimulatedHost):
            who.on_answer(result)
        else:
            who.set_result(result)

    async def cost(self) -> dict[str, float]:
        """What the coordinator's process has used so far."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._call(answer, "cost")
        found: dict[str, float] = await answer
        return found

    async def until(self, what: str, done: Callable[[SimulatedHost], bool]) -> None:
        """Until it is true of every host. Raises `TimeoutError`."""
        end = time.monotonic() + LIMIT_S
        left = self.hosts
        while left := [host for host in left if not done(host)]:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(left)} of {len(self.hosts)} hosts still wait for {what}")
            await asyncio.sleep(0.02)

    async def train(self) -> None:
        """All loops complete their steps, for ever; a rank that is about to seal waits, as a real one is held up."""
        while True:
            await asyncio.sleep(1 / STEPS_A_SECOND)
            self.step += 1
            for host in self.hosts:
                host.arrive(self.step)


async def _start(run: Run) -> None:
    for host in run.hosts:
        host.join()
    await run.until("the plan", lambda host: host.worker.plan_ready is not None and host.worker.restore_done)


async def _save(run: Run) -> tuple[float, float]:
    """One save, begun by a jump of all loops; (seconds from the last shard to the commit, until all know of it)."""
    step = run.step = (run.step // SAVE_STEPS + 1) * SAVE_STEPS
    shards: list[float] = []
    for host in run.hosts:
        host.written = lambda _: shards.append(time.monotonic())
        host.arrive(step)
    committed = asyncio.create_task(_first(run, step))
    await run.until(f"the commit of step {step}", lambda host: step in host.worker.outcomes)
    told = time.monotonic()
    return await committed - shards[-1], told - shards[-1]


async def _first(run: Run, step: int) -> float:
    """When the first host hears of the commit."""
    while not any(step in host.worker.outcomes for host in run.hosts):
        await asyncio.sleep(0.02)
    at = time.monotonic()
    outcome = next(host.worker.outcomes[step] for host in run.hosts if step in host.worker.outcomes)
    if outcome.state != "committed":
        raise RuntimeError(f"the save of step {step} failed: {outcome.error}")
    return at


async def measure(hosts: int, entries: int, idle_s: float) -> Row:
    """One configuration against a fresh coordinator process."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as url:
        command = [sys.executable, "-m", "benchmarks.scale_coordinator", url, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, stderr=subprocess.DEVNULL) as child:
            theirs.close()
            try:
                return await _measure(hosts, entries, idle_s, ours)
            finally:
                child.kill()


async def _measure(hosts: int, entries: int, idle_s: float, ours: socket.socket) -> Row:
    run = Run(hosts, entries)
    await asyncio.get_running_loop().create_connection(lambda: run.frames, sock=ours)
    zero, began = await run.cost(), time.monotonic()
    await _start(run)
    start_s, started = time.monotonic() - began, await run.cost()
    training = asyncio.create_task(run.train())
    saves = []
    saved = dict.fromkeys(started, 0.0)
    for _ in range(SAVES):
        await asyncio.sleep(1.0)
        before = await run.cost()
        saves.append(await _save(run))
        after = await run.cost()
        saved = {name: saved[name] + (after[name] - before[name]) / SAVES for name in after}
    await asyncio.sleep(2.0)
    before = await run.cost()
    await asyncio.sleep(idle_s)
    after = await run.cost()
    training.cancel()
    return Row(
        hosts=hosts,
        entries=entries,
        start_s=start_s,
        start_cpu_s=started["cpu_s"] - zero["cpu_s"],
        save_cpu_s=saved["cpu_s"],
        calls=saved["calls"],
        nbytes=saved["nbytes_in"] + saved["nbytes_out"],
        commit_s=max(commit for commit, _ in saves),
        told_s=max(told for _, told in saves),
        idle_cpu=(after["cpu_s"] - before["cpu_s"]) / idle_s,
        idle_calls=(after["calls"] - before["calls"]) / idle_s,
        peak_nbytes=after["peak_nbytes"],
    )


def _fresh(hosts: int, entries: int, idle_s: float) -> Row:
    """The row of one configuration, simulated in a process of its own too."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", str(hosts), str(entries), "--idle", str(idle_s)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return Row(**json.loads(found.stdout.splitlines()[-1]))


def table(rows: list[Row], call_s: float, command: str) -> str:
    """Markdown, with all that is needed to trace the numbers."""
    heads = ("hosts", "entries", "start s", "start CPU s", "CPU s a save", "calls a save", "MB a save",
             "CPU s a save with Ray", "commit after last shard s", "all told s", "idle calls/s", "idle CPU %",
             "idle CPU % with Ray", "peak MiB")  # fmt: skip
    lines = ["# The coordinator at scale", "", f"`{command}`, {datetime.now(timezone.utc):%Y-%m-%d}", ""]
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray_ckpt", "ray", "numpy"))
    lines += [f"Python {platform.python_version()}, {packages}; {_machine()}.", ""]
    lines += [
        "One worker a host, 20 steps/s; another process on the same machine simulates the hosts. CPU and memory are",
        'those of the coordinator\'s process, which runs the real actor without Ray; "with Ray" adds',
        f"{1e6 * call_s:.0f} us a call, what an async actor of this Ray takes here for an empty one. Seconds are wall",
        f"time, the worst of {SAVES} saves.",
        "",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for r in rows:
        cells = (
            f"{r.hosts:,}", f"{r.entries:,}", f"{r.start_s:.1f}", f"{r.start_cpu_s:.1f}", f"{r.save_cpu_s:.2f}",
            f"{r.calls:,.0f}", f"{r.nbytes / 1e6:.1f}", f"{r.save_cpu_s + r.calls * call_s:.2f}", f"{r.commit_s:.2f}",
            f"{r.told_s:.2f}", f"{r.idle_calls:.0f}", f"{100 * r.idle_cpu:.1f}",
            f"{100 * (r.idle_cpu + r.idle_calls * call_s):.1f}", f"{r.peak_nbytes / 2**20:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _machine() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return (
        f"{len(models)} x {models[0] if models else platform.machine()}, {memory:.0f} GiB, Linux {platform.release()}"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small configurations, nothing is written")
    parser.add_argument("--out", type=Path, default=None, help=f"where the table goes (default: {RESULT.name})")
    parser.add_argument("--one", type=int, nargs=2, metavar=("HOSTS", "ENTRIES"), help="one configuration, as JSON")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds of training without a save")
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(asdict(asyncio.run(measure(*args.one, args.idle)))) + "\n")
        return
    rows = []
    for hosts, entries in QUICK if args.quick else FULL:
        rows.append(_fresh(hosts, entries, 3.0 if args.quick else args.idle))
        sys.stderr.write(f"{rows[-1]}\n")
    text = table(rows, measure_call(), " ".join(["python -m benchmarks.scale", *sys.argv[1:]]))
    publish(text, args.out or (None if args.quick else RESULT))


if __name__ == "__main__":
    main()
