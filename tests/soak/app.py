"""`make soak` from its options to its exit code."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tests.soak.hosts import Hosts, hosts, logs
from tests.soak.plan import RunPlan, StoreKind, plans
from tests.soak.run import Run, Stuck
from tests.soak.stores import Stores
from tests.soak.tally import Tally
from tests.soak.witness import Witness, witness
from tests.system.waiting import pause

_PIPE_WIDTH = 160
LEFT_S = 120.0
"""Agents and coordinator end themselves so long after the end of their run at the latest."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="how long things happen; start and end come on top")] = 10,
    seed: Annotated[int | None, typer.Option(help="of the plan of events; by default another one each time")] = None,
    store: Annotated[
        Literal["file", "gs", "both"], typer.Option(help="where runs save: on disk, in a bucket")
    ] = "both",
) -> None:
    """Kill everything that a job on four hosts consists of, again and again, while an oracle looks at its files."""
    chosen = random.randrange(2**16) if seed is None else seed
    # With its own file, it goes on writing there while Ray's reports of what was killed go elsewhere.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, log_path=False)
    console.print(f"soak of {minutes:g} minutes, seed {chosen}", highlight=False)
    tally = Tally(console, chosen)
    folder = Path(tempfile.mkdtemp(prefix="ray_ckpt-soak-"))
    ended = ""
    with (folder / "ray.log").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        try:
            _watched(tally, folder, ("file", "gs") if store == "both" else (store,), 60 * minutes)
        except KeyboardInterrupt:
            ended = "interrupted; everything that was started has been ended"
    console.print(tally.table(), ended)
    if tally.violations:
        console.print("\n".join(["the last events:", *tally.story]), markup=False, highlight=False)
        console.print("\n".join(["violations:", *tally.violations]), style="red", markup=False)
        console.print(f"journals, checkpoints and logs are in {folder}; again: make soak SEED={chosen}")
        raise typer.Exit(1)
    shutil.rmtree(folder)
    if ended:
        raise typer.Exit(130)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _watched(tally: Tally, folder: Path, kinds: Sequence[StoreKind], seconds_s: float) -> None:
    with witness(folder / "oracle.log") as oracle, hosts() as cluster, Stores(folder) as stores:
        # Ray has set its own, which ends this process at once and leaves all others.
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            play(cluster, oracle, tally, folder, stores, plans(tally.seed, kinds), seconds_s)
        finally:
            if tally.violations:
                shutil.copytree(logs(), folder / "ray-logs", ignore=shutil.ignore_patterns("*.sock"))


def play(
    cluster: Hosts,
    oracle: Witness,
    tally: Tally,
    folder: Path,
    stores: Stores,
    planned: Iterable[RunPlan],
    seconds_s: float,
) -> None:
    """Run after run until the time is over, then see to it that nothing is left of them."""
    tally.began = time.monotonic()
    until = tally.began + seconds_s
    played: list[Run] = []
    for plan in planned:
        run = Run(plan, stores.make(plan), cluster, oracle, tally, folder / f"told{plan.number}")
        try:
            run.play(until)
        except Stuck:
            run.abandon()
            break
        played.append(run)
        if time.monotonic() > until:
            break
    cluster.settle()
    cluster.welcome()
    _await_nothing(played, cluster, tally)


def _await_nothing(played: list[Run], cluster: Hosts, tally: Tally) -> None:
    end = time.monotonic() + LEFT_S
    left = [thing for run in played for thing in run.left(cluster)]
    while left and time.monotonic() < end:
        pause(1.0)
        left = [thing for run in played for thing in run.left(cluster)]
    for run in played:
        run.judge_end()
    for thing in left:
        tally.violated(f"{thing} is left {LEFT_S:.0f} s after the end")
