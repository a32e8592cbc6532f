"""`make demo` from its options to its exit code."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import ray_ckpt
from examples.demo import checks
from examples.demo.checks import Check
from examples.demo.cluster import ROOT, pod
from examples.demo.display import make_console
from examples.demo.drill import Drill, DrillError, Outcome
from examples.demo.fleet import FleetError
from examples.demo.picture import draw
from examples.demo.trainer import Job
from ray_ckpt.timeline import Timeline, timelines

OUTPUT = ROOT / "demo-output"
_TENSORFLOW_S = 120.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    hosts: Annotated[int, typer.Option(min=2, max=4, help="hosts of the first start; the second has one less")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps of each start, instead of --seconds")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="seconds of training in each start")] = 25.0,
    save_secs: Annotated[float, typer.Option(min=0.5, help="seconds between saves")] = 4.0,
    directory: Annotated[str | None, typer.Option("--dir", help="where to save: a new folder, or any URL")] = None,
    output: Annotated[Path, typer.Option(help="folder for the picture and the journals")] = OUTPUT,
    tensorflow: Annotated[bool, typer.Option("--tf/--no-tf", help="read the result with TensorFlow")] = True,
) -> None:
    """Train on simulated TPU hosts, lose a process in the middle of a save, go on with a host less."""
    console, began = make_console(), time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    url = _clear(output, directory)
    try:
        with (output / "ray.log").open("w") as said, redirect_stdout(said), redirect_stderr(said):
            outcome = _train(console, url, output / "journals", hosts, save_secs, steps, seconds)
        results = _judge(console, outcome, url, output, tensorflow)
    except (DrillError, FleetError) as error:
        console.print(f"[red]the demo failed[/]: {error}\nits processes' logs are in {output / 'ray-logs'}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        raise typer.Exit(130) from None
    console.print(f"took {time.monotonic() - began:.0f} s")
    if not all(check.ok for check in results):
        raise typer.Exit(1)


def _clear(output: Path, directory: str | None) -> str:
    """Remove what an earlier demo has left in its own folder; the URL to save to."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("journals", "checkpoints", "ray-logs"):
        shutil.rmtree(output / name, ignore_errors=True)
    if directory is None:
        return str(output / "checkpoints")
    if ray_ckpt.checkpoints(directory):
        raise typer.BadParameter(f"{directory} holds checkpoints already: give a new folder", param_hint="--dir")
    return directory


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _train(
    console: Console, url: str, journals: Path, hosts: int, save_secs: float, steps: int | None, seconds: float
) -> Outcome:
    """The part that needs the cluster, which is gone when this returns."""
    console.print(f"starting {hosts} simulated TPU hosts on this machine, checkpoints go to {url}")
    began = time.monotonic()
    with pod(hosts) as running:
        console.print(f"  {hosts} raylets run after {time.monotonic() - began:.0f} s; training begins")
        job = Job(1, url, tuple(range(hosts)), save_secs, str(running.memory), journals)
        try:
            outcome = Drill(console, job, steps, seconds).run()
        except (DrillError, FleetError):
            shutil.copytree(running.logs, journals.parent / "ray-logs")
            raise
        console.print("  training is done; ending the cluster")
    return outcome


def _judge(console: Console, outcome: Outcome, url: str, output: Path, tensorflow: bool) -> list[Check]:
    """Everything that is checked and drawn afterwards; prints the summary."""
    saves = timelines(url)
    finished = outcome.after[0].finished
    digests = finished.digests if finished else {}
    reader = _start_reader(url, sorted(digests)) if tensorflow else None
    picture = draw(outcome, saves, output / "saves.png")
    killed = next((save for save in saves if save.step == outcome.killed_step), None)
    results = [
        checks.save_survived(killed, outcome.killed_step, outcome.killed_at),
        checks.same_restore(outcome.after, outcome.newest),
        checks.same_eval_loss(outcome.before, outcome.after),
        checks.loss_goes_on(outcome.before, outcome.after),
    ]
    if reader is not None:
        results.append(checks.same_digests(digests, _finish_reader(console, reader)))
    _summarise(console, outcome, saves, results)
    console.print(f"picture of the saves: {picture}")
    return results


def _start_reader(url: str, names: list[str]) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("read_with_tensorflow.py")
    # -I: neither this package nor ray_ckpt's sources are on its path by way of the current directory.
    command = [sys.executable, "-I", str(script), url.removeprefix("file://"), *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish_reader(console: Console, reader: subprocess.Popen[str]) -> dict[str, str]:
    """Print what TensorFlow found; its digests."""
    console.print("reading the result with plain TensorFlow in another process")
    try:
        out, err = reader.communicate(timeout=_TENSORFLOW_S)
    finally:
        reader.kill()
        reader.wait()
    if reader.returncode != 0:
        console.print(f"[red]TensorFlow could not read it[/]:\n{err[-2000:]}")
        return {}
    found = json.loads(out.splitlines()[-1])
    console.print(f"  TensorFlow {found['tensorflow']}: {found['prefix']} holds {found['tensors']} tensors")
    for sample in found["samples"]:
        form = f"{sample['dtype']} {sample['shape']}"
        console.print(f"  {sample['name']:22} {form:20} {sample['first']} ...", markup=False)
    digests: dict[str, str] = found["digests"]
    return digests


def _summarise(console: Console, outcome: Outcome, saves: list[Timeline], results: list[Check]) -> None:
    console.print()
    for check in results:
        mark = "[green]ok    [/]" if check.ok else "[red]FAILED[/]"
        console.print(f"{mark} {check.claim}: {check.detail}")
    console.print()
    stalls = [step.stalled_s for story in [*outcome.before, *outcome.after] for step in story.steps if step.saved]
    restored = max((story.restored.seconds_s for story in outcome.after if story.restored), default=0.0)
    nbytes = sum(shard.nbytes for save in saves for shard in save.shards)
    abandoned = f" (steps {', '.join(map(str, sorted(outcome.abandoned)))})" if outcome.abandoned else ""
    console.print(f"saves        {len(outcome.committed)} committed, {len(outcome.abandoned)} abandoned{abandoned}")
    mean, worst = sum(stalls) / max(len(stalls), 1) * 1e3, max(stalls, default=0.0) * 1e3
    console.print(f"training     lost {mean:.1f} ms a save and process in step(), {worst:.1f} ms at most")
    console.print(f"restore      {restored:.2f} s until all {len(outcome.after)} processes had their state")
    console.print(f"written      {nbytes / 1e6:.1f} MB, {nbytes / max(len(saves), 1) / 1e6:.1f} MB a save")
