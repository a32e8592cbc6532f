"""``python -m benchmarks.hooks``: what a save costs a TensorFlow training loop, with TensorFlow's hooks and with ours.

A MonitoredSession over 1 GiB of variables (24 big, 500 small), in a fresh process for each subject, in turns:

- *lost a save*: a loop of steps with one save every so many, from the step that saves until just before the next one
  would, less as many steps of the same loop without a hook, timed before and after in the same process. Each step
  updates one big variable and multiplies for some milliseconds; the window is longer than a save takes.
- *a run that saves nothing*: runs of a tiny graph, less the same runs without a hook, interleaved. TensorFlow's hook by
  default asks the session for the step a second time after each run that may have reached the next save.

TensorFlow's asynchronous mode works in TensorFlow 2 only: there the loop is a `tf.function` over the same variables.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer

import ray_ckpt
from benchmarks import machine
from benchmarks.cases import CASES
from benchmarks.report import publish
from benchmarks.rows import ROOT

SUBJECTS = {
    "hook": "ray_ckpt.CheckpointSaverHook",
    "async-hook": "ray_ckpt.AsyncCheckpointSaverHook",
    "tf-hook": "TensorFlow's CheckpointSaverHook",
    "checkpoint": "ray_ckpt.Checkpointer of a tf.train.Checkpoint (TensorFlow 2)",
    "tf-checkpoint": "tf.train.CheckpointManager (TensorFlow 2)",
    "tf-async": "tf.train.CheckpointManager, enable_async (TensorFlow 2)",
}
STEPS = 300
SAVES = 5
MATMULS = 24
SIZE = 256
RUNS = 2000
ROUNDS = 9
OVERHEAD = "overhead"
NEVER = 10**9
FAR = 10**5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def load() -> Any:
    """TensorFlow, quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tf = importlib.import_module("tensorflow")
    tf.get_logger().setLevel("ERROR")
    return tf


# -- sessions ---------------------------------------------------------------------------------------------


class SessionJob:
    """A graph with the variables of a case; its training ops update one big variable each."""

    def __init__(self, case: str) -> None:
        self.tf = load()
        v1 = self.tf.compat.v1
        self.graph = self.tf.Graph()
        with self.graph.as_default():
            step = v1.train.get_or_create_global_step()
            variables = [
                v1.Variable(self.tf.random.uniform(shape, seed=1), name=name, use_resource=True)
                for name, shape in CASES[case].shapes
            ]
            big = [v for v in variables if v.shape.num_elements() >= 1 << 18]
            local = {"use_resource": True, "collections": [v1.GraphKeys.LOCAL_VARIABLES]}
            holder = v1.Variable(self.tf.ones(big[0].shape), **local)
            work = v1.Variable(self.tf.fill((SIZE, SIZE), 1.0 / SIZE), **local).read_value()
            for _ in range(MATMULS):
                work = self.tf.matmul(work, work)
            self.train = []
            for variable in big:
                update = variable.assign_add(holder.read_value(), read_value=False)
                # As a control input alone, the graph's optimizer would drop the product.
                one = 1 + self.tf.cast(work[0, 0] > 2.0, self.tf.int64)
                with self.tf.control_dependencies([update]):
                    self.train.append(step.assign_add(one, read_value=False))
            self.init = v1.global_variables_initializer()
            self.saver = v1.train.Saver(max_to_keep=2)

    @contextmanager
    def session(self, hooks: list[Any]) -> Iterator[Callable[[], None]]:
        """A step of training in a MonitoredSession with these hooks."""
        v1 = self.tf.compat.v1
        with self.graph.as_default():
            scaffold = v1.train.Scaffold(init_op=self.init, saver=self.saver)
            count = 0
            with v1.train.MonitoredSession(v1.train.ChiefSessionCreator(scaffold), hooks=hooks) as session:

                def step() -> None:
                    nonlocal count
                    session.run(self.train[count % len(self.train)])
                    count += 1

                yield step

    def hook(self, kind: str, folder: str, save_steps: int) -> Any:
        """One of the hooks, as its documentation shows it."""
        made = {
            "hook": ray_ckpt.CheckpointSaverHook,
            "async-hook": ray_ckpt.AsyncCheckpointSaverHook,
            "tf-hook": self.tf.compat.v1.train.CheckpointSaverHook,
        }[kind]
        return made(folder, save_steps=save_steps, saver=self.saver)


def measure_sessions(kind: str, folder: str) -> dict[str, float]:
    """Seconds of the loop without and with the hook."""
    job = SessionJob("big")
    with job.session([]) as step:
        without = _loop(step)
    gc.collect()
    with job.session([job.hook(kind, folder, STEPS)]) as step:
        # The saves at creation and after the first period make memory, processes and plans.
        for _ in range(2 * STEPS - 1):
            step()
        took = _time(step, SAVES * STEPS)
    gc.collect()
    with job.session([]) as step:
        # The machine may have become faster or slower meanwhile.
        return _lost([*without, *_loop(step)], took)


# -- TensorFlow 2 -----------------------------------------------------------------------------------------


def measure_eager(kind: str, folder: str) -> dict[str, float]:
    """The same for a loop around a `tf.function`."""
    tf = load()
    variables = {name: tf.Variable(tf.random.uniform(shape, seed=1)) for name, shape in CASES["big"].shapes}
    big = [v for v in variables.values() if v.shape.num_elements() >= 1 << 18]
    ones, factor = tf.ones(big[0].shape), tf.Variable(tf.fill((SIZE, SIZE), 1.0 / SIZE))
    checkpoint = tf.train.Checkpoint(**variables)

    def train(variable: Any) -> Callable[[], None]:
        @tf.function
        def run() -> None:
            variable.assign_add(ones)
            work = factor.read_value()
            for _ in range(MATMULS):
                work = tf.matmul(work, work)
            # Without a use, the graph's optimizer drops the product.
            tf.debugging.assert_greater(work[0, 0], 0.0)

        return run

    ops = [train(variable) for variable in big]
    count = 0

    def step() -> None:
        nonlocal count
        ops[count % len(ops)]()
        count += 1

    without = _loop(step)
    with _saver(tf, kind, folder, checkpoint) as save:

        def saving_step() -> None:
            step()
            save(count)

        count = 0
        for _ in range(2 * STEPS - 1):
            saving_step()
        took = _time(saving_step, SAVES * STEPS)
    return _lost([*without, *_loop(step)], took)


@contextmanager
def _saver(tf: Any, kind: str, folder: str, checkpoint: Any) -> Iterator[Callable[[int], None]]:
    if kind == "checkpoint":
        with ray_ckpt.Checkpointer(folder, save_steps=STEPS, max_to_keep=2) as ckpt:
            yield lambda step: ckpt.step(step, checkpoint)
        return
    manager = tf.train.CheckpointManager(checkpoint, folder, max_to_keep=2)
    options = tf.train.CheckpointOptions(enable_async=kind == "tf-async")

    def save(step: int) -> None:
        if step % STEPS == 0:
            manager.save(step, options=options)

    yield save
    manager.sync()


def _loop(step: Callable[[], None]) -> list[float]:
    """Seconds that a step takes without a save, a few times."""
    for _ in range(STEPS):
        step()
    return [_time(step, STEPS) / STEPS for _ in range(SAVES)]


def _time(step: Callable[[], None], count: int) -> float:
    began = time.monotonic()
    for _ in range(count):
        step()
    return time.monotonic() - began


def _lost(without: list[float], took_s: float) -> dict[str, float]:
    step_s = statistics.median(without)
    return {"step_s": step_s, "lost_s": (took_s - SAVES * STEPS * step_s) / SAVES}


# -- steps that save nothing ------------------------------------------------------------------------------


def measure_overhead(folder: str) -> dict[str, float]:
    """Seconds that each hook adds to a run."""
    tf = load()
    v1 = tf.compat.v1
    kinds = {
        "none": None,
        "TensorFlow's, next save out of its sight": (v1.train.CheckpointSaverHook, NEVER),
        "TensorFlow's, as it comes": (v1.train.CheckpointSaverHook, FAR),
        "ray_ckpt.CheckpointSaverHook": (ray_ckpt.CheckpointSaverHook, FAR),
        "ray_ckpt.AsyncCheckpointSaverHook": (ray_ckpt.AsyncCheckpointSaverHook, FAR),
    }
    runs: dict[str, Callable[[], Any]] = {}
    sessions: list[tuple[Any, Any]] = []
    for number, (name, made) in enumerate(kinds.items()):
        with tf.Graph().as_default() as graph:
            train = v1.train.get_or_create_global_step().assign_add(1, read_value=False)
            saver = v1.train.Saver()
            hooks = [] if made is None else [made[0](f"{folder}/{number}", save_steps=made[1], saver=saver)]
            session = v1.train.MonitoredSession(hooks=hooks)
        sessions.append((graph, session))
        runs[name] = lambda session=session, train=train: session.run(train)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(_time(run, RUNS) / RUNS)
    for graph, session in sessions:
        with graph.as_default():
            session.close()
    base = statistics.median(times["none"])
    return {name: statistics.median(taken) - base for name, taken in times.items() if name != "none"}


# -- the command ------------------------------------------------------------------------------------------


@app.command()
def hooks(
    repeats: Annotated[int, typer.Option(min=1, help="fresh processes for each subject")] = 3,
    subjects: Annotated[str, typer.Option(help=f"of {','.join(SUBJECTS)}")] = ",".join(SUBJECTS),
    disk: Annotated[Path, typer.Option(help="folder on a disk, made if it is not there")] = ROOT / "bench-data",
    out: Annotated[Path, typer.Option(help="where the table goes")] = ROOT / "benchmarks" / "results" / "hooks.md",
    resume: Annotated[bool, typer.Option(help="keep what the last run has measured")] = False,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure all, and write a table; what is measured goes to a JSON file beside it at once."""
    if one:
        _one(one, disk)
        return
    notes = out.with_suffix(".json")
    known = json.loads(notes.read_text()) if resume else {}
    meta = known.get("meta") or machine.describe({"disk": str(disk)}, "benchmarks.hooks")
    found: dict[str, list[dict[str, float]]] = {name: known.get(name, []) for name in (*subjects.split(","), OVERHEAD)}
    for number in range(repeats):
        for name, values in found.items():
            if len(values) <= number:
                values.append(_in_fresh_process(name, disk))
                typer.echo(f"{name}: {values[-1]}", err=True)
                notes.write_text(json.dumps({"meta": meta, **found}, indent=1) + "\n")
    publish(_page(found, meta), out)


def _one(name: str, disk: Path) -> None:
    disk.mkdir(parents=True, exist_ok=True)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        if name == OVERHEAD:
            found = measure_overhead(folder)
        elif "hook" in name:
            found = measure_sessions(name, folder)
        else:
            found = measure_eager(name, folder)
    ray.shutdown()
    print(json.dumps(found))


def _in_fresh_process(name: str, disk: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.hooks", "--one", name, "--disk", str(disk)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    os.sync()
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _page(found: dict[str, list[dict[str, float]]], meta: dict[str, str]) -> str:
    overheads = found.pop(OVERHEAD)
    overhead = {name: statistics.median(each[name] for each in overheads) for name in overheads[0]}
    lost = {name: statistics.median(v["lost_s"] for v in values) for name, values in found.items()}
    lines = ["# Saves in a TensorFlow loop, 1 GiB of variables", ""]
    lines += ["| | lost a save, s | each process | a step, ms | TensorFlow's hook loses |", "|---|---:|---|---:|---:|"]
    for name, values in found.items():
        each = ", ".join(f"{v['lost_s']:.3f}" for v in values)
        ratio = f"{lost['tf-hook'] / lost[name]:.1f} x" if "tf-hook" in lost and lost[name] > 0 else "-"
        step_ms = 1e3 * float(np.median([v["step_s"] for v in values]))
        lines.append(f"| {SUBJECTS[name]} | {lost[name]:.3f} | {each} | {step_ms:.2f} | {ratio} |")
    base = overhead["TensorFlow's, next save out of its sight"]
    lines += ["", "# A run that saves nothing, above one without a hook", ""]
    lines += ["| | us | x TensorFlow's lesser |", "|---|---:|---:|"]
    lines += [f"| {name} | {1e6 * value:.1f} | {value / base:.2f} |" for name, value in overhead.items()]
    lines += [
        "",
        f"Medians of {len(next(iter(found.values())))} processes with {SAVES} saves, one every {STEPS} steps.",
    ]
    lines += ["", *(f"- {name}: {value}" for name, value in meta.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
