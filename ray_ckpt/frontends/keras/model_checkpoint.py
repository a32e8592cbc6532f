"""`ModelCheckpoint`: saves variables of model and optimizer at the end of epochs or every so many batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import keras
import numpy as np

from ray_ckpt.catalog import checkpoints
from ray_ckpt.frontends.keras import state
from ray_ckpt.frontends.keras.runs import Run, as_url, check_frequency, check_settings, finish_run, leave_run, open_run
from ray_ckpt.frontends.keras.skip import skipping
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.tree import Named


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Saves the variables of model and optimizer during `fit`, asynchronously.

    A `keras.callbacks.ModelCheckpoint` that saves checkpoints of `ray_ckpt.Checkpointer` into a directory, of which
    the last ``max_to_keep`` stay. When to save, what is better, and all messages and warnings are Keras's own.
    `ray_ckpt.frontends.keras.state.load_variables` gives them back to a model; it is `BackupAndRestore` that
    resumes a training.

    The best checkpoint stays whatever ``max_to_keep`` is: with ``save_best_only`` it is the newest one; otherwise,
    where ``monitor`` is among the logs, it is saved to ``<directory_url>/best`` as well (`best_url`). The
    best value so far is stored in each checkpoint, and known again after a restart.

    Checkpoints are named after the optimizer's iterations; where those have gone back since the last save, after
    numbers that go on from there.

    Args:
        directory_url: directory or bucket of this callback's own; any URL of `ray_ckpt.Checkpointer`.
        monitor, verbose, save_best_only, mode, initial_value_threshold: as Keras has them.
        save_freq: "epoch", or a number of batches, counted over epochs and, by the optimizer's iterations, restarts.
        max_to_keep: checkpoints that stay; None keeps all.
        keep_best: False: nothing is saved to ``<directory_url>/best``.
        **settings: of the `ray_ckpt.Checkpointer`: rank, world_size, on_error, timeouts, storage_options, ... With
            several workers all must see the same value of the monitored metric.

    Raises:
        UsageError: wrong arguments; in `fit`: the directory is another callback's.
        ValueError: in `fit`, from Keras: ``mode="auto"`` and the direction of the metric is unknown.
        SaveError, FencedError, StorageError: in `fit`, as `ray_ckpt.Checkpointer`.
    """

    best: Any
    monitor_op: Any
    _last_batch_seen: int | None

    def __init__(
        self,
        directory_url: Any,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        mode: Literal["auto", "min", "max"] = "auto",
        save_freq: Literal["epoch"] | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        max_to_keep: int | None = 5,
        keep_best: bool = True,
        **settings: Any,
    ) -> None:
        check_frequency(save_freq)
        check_settings("ModelCheckpoint", settings, ("save_steps", "save_secs", "fresh"))
        self.directory_url = as_url(directory_url)
        super().__init__(
            # Keras insists on the ending of a file.
            filepath=f"{self.directory_url}/model.weights.h5",
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=True,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
        )
        self.filepath = self.directory_url
        self._keeps_best = keep_best and not save_best_only
        self._max_to_keep = max_to_keep
        # `BackupAndRestore` ends the training on SIGTERM; without it the process ends as it would without this.
        self._settings = {"handle_sigterm": False, **settings}
        self._threshold = initial_value_threshold
        self._ckpt: Run | None = None
        self._best_ckpt: Run | None = None
        self._step = 0
        self._last_best: tuple[Run, int, Any, int | None] | None = None
        self.best_step: int | None = None

    @property
    def best_url(self) -> str:
        """The directory whose newest checkpoint is the best one."""
        return f"{self.directory_url.rstrip('/')}/best" if self._keeps_best else self.directory_url

    # -- Keras's events -----------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Leave what a `fit` that failed has left open."""
        super().on_train_begin(logs)
        for run in filter(None, (self._ckpt, self._best_ckpt)):
            leave_run(run)
        self._ckpt = self._best_ckpt = self._last_best = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """In the first epoch, when other callbacks have restored what they restore: open the directory."""
        super().on_epoch_begin(epoch, logs)
        if self._ckpt is None:
            self._open()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save if that is due."""
        if skipping(self._model):
            self._last_batch_seen = batch
            return
        super().on_train_batch_end(batch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Wait for all saves."""
        super().on_train_end(logs)
        with ExitStack() as stack:
            if self._best_ckpt is not None:
                stack.callback(finish_run, self._best_ckpt, self.best_step or 0)
            if self._ckpt is not None:
                stack.callback(finish_run, self._ckpt, self._step)
            self._ckpt = self._best_ckpt = None

    def _save_model(self, epoch: int, batch: int | None, logs: Any) -> None:
        """Keras's own, with its decision and its messages, and another way to save."""
        logs, ckpt = logs or {}, self._ckpt
        assert ckpt is not None
        self._review_best()
        if self.monitor_op is None and (self.save_best_only or self._is_best_wanted(logs)):
            self._set_monitor_op()
        step, before = max(self._iterations(), self._step + 1), (self.best, self.best_step)
        if not self._should_save_model(epoch, batch, logs, f"{self.directory_url}, step {step}"):
            return
        if self._is_best_wanted(logs) and self._is_better(logs[self.monitor]):
            self.best = logs[self.monitor]
        improved = self.best is not before[0]
        self._step, self.best_step = step, step if improved else self.best_step
        ckpt.save(step, self._state)
        if improved:
            if self._keeps_best:
                if self._best_ckpt is None:
                    self._best_ckpt, _ = self._open_run(self.best_url, max_to_keep=1)
                ckpt = self._best_ckpt
                ckpt.save(step, self._state)
            self._last_best = ckpt, step, *before

    def _is_best_wanted(self, logs: Mapping[str, Any]) -> bool:
        current = logs.get(self.monitor)
        return self._keeps_best and current is not None and np.ndim(current) == 0

    def _is_better(self, current: Any) -> bool:
        # Nothing is better than NaN, and NaN is better than nothing: it would stay the best for ever.
        return not math.isnan(current) and (self.best is None or bool(self.monitor_op(current, self.best)))

    def _review_best(self) -> None:
        """If the save of the best failed, what was best before is so again."""
        if self._last_best is None:
            return
        ckpt, step, best, best_step = self._last_best
        outcome = ckpt.outcome(step)
        if outcome is not None:
            self._last_best = None
            if outcome.state == "failed":
                self.best, self.best_step = best, best_step

    # -- the directories ----------------------------------------------------------------------------------

    def _open(self) -> None:
        self._last_batch_seen = None
        self.best, self.best_step = self._threshold, None
        self._ckpt, found = self._open_run(self.directory_url, self._max_to_keep)
        saved = found
        if self._keeps_best and found is not None and found["best"] is not None:
            # It was saved after the checkpoint that tells of it, and may never have been committed.
            self._best_ckpt, saved = self._open_run(self.best_url, 1)
        self._step = max(
            [0, *(info.step for info in checkpoints(self.best_url, storage_options=self._storage_options))]
        )
        if self.save_freq != "epoch":
            # Else a job that is interrupted sooner than it saves never would.
            self._batches_seen_since_last_saving = self._iterations() % self.save_freq
        if found is not None:
            self._step = max(self._step, found["step"])
        if saved is None or saved["monitor"] != self.monitor or saved["best_step"] is None:
            return
        if not math.isnan(saved["best"]):
            self.best, self.best_step = saved["best"], saved["best_step"]

    def _open_run(self, url: str, max_to_keep: int | None) -> tuple[Run, dict[str, Any] | None]:
        """A start that goes on from the newest checkpoint of the directory, and what that says of the best."""
        run = open_run(url, self, max_to_keep=max_to_keep, **self._settings)
        try:
            return run, run.restore_by(self._read)
        except BaseException:
            leave_run(run)
            raise

    @staticmethod
    def _read(stored: StoredCheckpoint) -> Callable[[], Any]:
        found = state.described(stored, state.MONITOR)
        return lambda: found

    @property
    def _storage_options(self) -> Mapping[str, Any] | None:
        options: Mapping[str, Any] | None = self._settings.get("storage_options")
        return options

    def _iterations(self) -> int:
        # Not `_model`: within an epoch JAX's variables have no values until the property brings them.
        optimizer = self.model.optimizer
        return 0 if optimizer is None else int(optimizer.iterations)

    def _state(self) -> Named:
        named = state.variables(self.model)
        assert self._ckpt is not None
        own = state.own_names(named, self._ckpt.world_size)
        monitor = {
            "step": self._step,
            "monitor": self.monitor,
            "best": self.best if self.best is None else float(self.best),
            "best_step": self.best_step,
            "variables": list(named),
            "own": own,
        }
        leaves = state.values(named)
        state.mark(leaves, own)
        leaves[state.MONITOR] = json.dumps(monitor)
        return leaves
