"""Small training jobs in sessions, and what can be observed of their hooks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1

Event = tuple[Any, ...]


@dataclass
class Model:
    """Variables whose values tell the step: ``weights`` is ``10 * step``; ``train`` does ``stride`` steps."""

    weights: Any
    step: Any
    train: Any


def model(stride: int = 1) -> Model:
    """Build it in the default graph."""
    weights = tf1.get_variable("weights", initializer=tf.zeros([3]))
    step = tf1.train.get_or_create_global_step()
    moved = weights.assign_add(tf.fill([3], 10.0 * stride))
    with tf.control_dependencies([moved]):
        return Model(weights, step, step.assign_add(stride))


class Listener(tf1.train.CheckpointSaverListener):  # type: ignore[misc]
    """Notes in ``events`` what it is told: (name, what, step)."""

    def __init__(self, name: str, events: list[Event], stop_at: tuple[int, ...] = ()) -> None:
        self.name = name
        self.events = events
        self.stop_at = stop_at
        self.arguments: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        self.events.append((self.name, "begin"))

    def before_save(self, session: Any, global_step_value: Any) -> None:
        self._note("before", session, global_step_value)

    def after_save(self, session: Any, global_step_value: Any) -> bool:
        self._note("after", session, global_step_value)
        return int(global_step_value) in self.stop_at

    def end(self, session: Any, global_step_value: Any) -> None:
        self._note("end", session, global_step_value)

    def _note(self, what: str, session: Any, step: Any) -> None:
        self.arguments.append((session, step))
        self.events.append((self.name, what, int(step)))


class Silent(tf1.train.CheckpointSaverListener):  # type: ignore[misc]
    """One without an `after_save`: nobody waits for a commit because of it."""


@contextmanager
def session(*hooks: Any, folder: str | None = None, **options: Any) -> Iterator[Any]:
    """A `MonitoredTrainingSession` without hooks of its own."""
    options = {"save_checkpoint_secs": None, "save_summaries_steps": None, "save_summaries_secs": None, **options}
    with tf1.train.MonitoredTrainingSession(
        checkpoint_dir=folder, hooks=list(hooks), log_step_count_steps=None, **options
    ) as opened:
        yield opened


def train(hook: Any, runs: int, folder: str | None = None, stride: int = 1, **options: Any) -> int:
    """Run a fresh model for so many runs, or until it is told to stop; how often it ran."""
    done = 0
    with tf.Graph().as_default():
        made = model(stride)
        with session(hook, folder=folder, **options) as opened:
            while done < runs and not opened.should_stop():
                opened.run(made.train)
                done += 1
    return done


def steps(folder: str) -> list[int]:
    """Steps that the `checkpoint` file names, oldest first."""
    state = tf.train.get_checkpoint_state(folder)
    return [int(path.rpartition("-")[2]) for path in state.all_model_checkpoint_paths] if state else []


def present(folder: str, suffix: str = ".index") -> list[int]:
    """Steps that have a file of this suffix, wherever below the directory."""
    found = [name for _, _, names in os.walk(folder) for name in names if name.endswith(suffix)]
    return sorted({int(name.removesuffix(suffix).rpartition("-")[2]) for name in found})


def weights(folder: str, step: int | None = None) -> tuple[int, float]:
    """(global step, first weight) in the newest checkpoint, or in that of a step, as TensorFlow reads them."""
    paths = list(tf.train.get_checkpoint_state(folder).all_model_checkpoint_paths)
    path = paths[-1] if step is None else next(p for p in reversed(paths) if p.endswith(f"-{step}"))
    reader = tf.train.load_checkpoint(path)
    return int(reader.get_tensor("global_step")), float(reader.get_tensor("weights")[0])


def session_logs(folder: str) -> list[tuple[int, int, str]]:
    """(step, status, path) of all SessionLog events; those of writers that are still open too."""
    return [(e.step, e.session_log.status, e.session_log.checkpoint_path) for e in events(folder, "session_log")]


def events(folder: str, kind: str) -> list[Any]:
    """All events of a kind, in the order in which they were written."""
    cached = tf1.summary.FileWriterCache._cache
    for writer in cached.values():
        writer.flush()
    found = []
    for name in sorted(n for n in os.listdir(folder) if "tfevents" in n):
        found += [e for e in tf1.train.summary_iterator(os.path.join(folder, name)) if e.WhichOneof("what") == kind]
    return found


class Log(logging.Handler):
    """Collects the lines that TensorFlow logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that TensorFlow logs meanwhile."""
    log, logger = Log(), tf.get_logger()
    level = logger.level
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    try:
        yield log.lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(log)


@dataclass
class Runs(tf1.train.SessionRunHook):  # type: ignore[misc]
    """Counts how often the raw session runs between two calls of `after_run`: 1 for the training itself."""

    counts: list[int] = field(default_factory=list)

    def after_create_session(self, session: Any, coord: Any) -> None:
        run = session.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count += 1
            return run(*args, **kwargs)

        session.run = counted
        self._count = 0

    def before_run(self, run_context: Any) -> None:
        self._count = 0

    def after_run(self, run_context: Any, run_values: Any) -> None:
        self.counts.append(self._count)

    __hash__ = object.__hash__


class Do(tf1.train.SessionRunHook):  # type: ignore[misc]
    """Calls a function before or after the runs of these numbers, from 1."""

    def __init__(
        self, what: Callable[[Any], Any], *, before: tuple[int, ...] = (), after: tuple[int, ...] = ()
    ) -> None:
        self.what = what
        self.before = before
        self.after = after
        self.runs = 0

    def before_run(self, run_context: Any) -> None:
        self.runs += 1
        if self.runs in self.before:
            self.what(run_context)

    def after_run(self, run_context: Any, run_values: Any) -> None:
        if self.runs in self.after:
            self.what(run_context)


class Clock:
    """Stands for the module `time` in TensorFlow's timer."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now


class Driver:
    """Calls a hook as a `MonitoredSession` does, one call at a time."""

    def __init__(self, hook: Any, raw: Any, made: Model) -> None:
        self.hook = hook
        self.raw = raw
        self.made = made

    def run(self, times: int = 1, *, behind: int = 0) -> bool:
        """Train, with a step read in the same run that is so many steps behind; whether a stop was asked for."""
        stop = False
        for _ in range(times):
            step = self.raw.run(self.made.train)
            context = tf1.train.SessionRunContext(None, self.raw)
            self.hook.after_run(context, tf1.train.SessionRunValues(np.int64(step - behind), None, None))
            stop = stop or context.stop_requested
        return stop

    def set_step(self, step: int) -> None:
        """Set the global step, without a run of the hook."""
        self.made.step.load(step, self.raw)


@contextmanager
def driven(hook: Any, made: Model | None = None) -> Iterator[Driver]:
    """A hook in a raw session of a fresh model, or of the one given, from `begin` to `end`, in the default graph."""
    made = made or model()
    if not tf1.get_collection(tf1.GraphKeys.SAVERS):
        tf1.add_to_collection(tf1.GraphKeys.SAVERS, tf1.train.Saver())
    hook.begin()
    with tf1.Session() as raw:
        raw.run(tf1.global_variables_initializer())
        hook.after_create_session(raw, None)
        yield Driver(hook, raw, made)
        hook.end(raw)
