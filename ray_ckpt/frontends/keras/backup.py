"""`BackupAndRestore`: a `fit` that was interrupted goes on at the batch it was saved at, as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import keras

from ray_ckpt.errors import UsageError
from ray_ckpt.frontends.keras import state
from ray_ckpt.frontends.keras.randomness import plain, random_state, set_random_state
from ray_ckpt.frontends.keras.runs import Run, as_url, check_frequency, check_settings, close_run, leave_run, open_run
from ray_ckpt.frontends.keras.skip import Skip, skipping
from ray_ckpt.leaves import PerWorker
from ray_ckpt.restore import StoredCheckpoint
from ray_ckpt.target import read_state
from ray_ckpt.tree import Named

_WORKER = "keras/worker"
"""Leaf of each worker: JSON with history, logs and random states."""


_BACKENDS = ("tensorflow", "jax")


@dataclass(slots=True)
class _Position:
    """Where the training is. ``step`` names checkpoints and never goes back; the others begin anew with a training.

    ``batch``: batches trained in epoch ``epoch``; ``batches``: in all epochs; ``since``: since the last save.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches: int = 0
    since: int = 0


@dataclass(slots=True)
class _Record:
    """What a worker has seen: the logs of each epoch, those of the last batch, random states.

    ``begin``: the random state at the begin of the epoch, from which its data may have been shuffled.
    """

    epochs: list[int] = field(default_factory=list)
    history: dict[str, list[Any]] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)
    begin: dict[str, Any] | None = None
    now: dict[str, Any] | None = None


def _check_backend(backend: str) -> None:
    """Raise `UsageError` for a backend whose random state cannot be restored."""
    if backend not in _BACKENDS:
        raise UsageError(
            f"BackupAndRestore resumes fit() of the backends {' and '.join(_BACKENDS)}, found {backend!r}, whose"
            " random state lies outside of Keras: use ModelCheckpoint, or ray_ckpt.Checkpointer in a loop"
        )


class BackupAndRestore(keras.callbacks.Callback):  # type: ignore[misc]
    """Saves a training, and resumes it at the epoch and batch of its newest checkpoint when `fit` is called again.

    As `keras.callbacks.BackupAndRestore`, but saves are asynchronous, and a resumed training gives the same weights,
    losses and history, bit for bit, as one that was never interrupted: weights, optimizer, running metrics, history
    and random states (layers' seed generators, Keras's global one, numpy's and Python's) are restored, and the
    batches of the epoch that were trained on before are taken from the data without training. Callbacks hear of
    those with the logs of the last one.

    That needs data in an order that a new process finds again: arrays (shuffled or not, after
    `keras.utils.set_random_seed`), or a dataset whose order is the same in each epoch. The state of other callbacks
    (`EarlyStopping`, ...) is not saved, nor is TensorFlow's own random state. With a `tf.distribute` strategy the
    sums of running metrics are divided among replicas anew, which may change the last bit of the resumed epoch's.
    Several workers without such a strategy keep metrics, seed generators and random states of their own; all other
    variables are the same on all of them.

    Args:
        directory_url: directory or bucket of this callback's own; any URL of `ray_ckpt.Checkpointer`.
        save_freq: "epoch", or a number of batches, counted over epochs.
        double_checkpoint: keep two checkpoints, so that the older one is restored if the newer one is damaged.
        delete_checkpoint: give the state up when the training ends. A small last checkpoint takes its place, which
            says so: `fit` starts afresh then. False: `fit` with more epochs goes on.
        stream: `fit` does not begin the data anew with each epoch (``steps_per_epoch`` of endless data): all batches
            trained on before are taken from it, not only those of the resumed epoch.
        **settings: of the `ray_ckpt.Checkpointer`: rank, world_size, on_error, timeouts, storage_options, ...

    Checkpoints are also taken on `ray-ckpt save`; on `request_stop` the training ends after one, not given up.

    Raises:
        UsageError: wrong arguments; in `fit`: the model is not built, the directory is another callback's, or the
            backup is of epoch 0 and `initial_epoch` is not.
        MismatchError: in `fit`: the model is not the one that was saved.
        SaveError, FencedError, StorageError: in `fit`, as `ray_ckpt.Checkpointer`.
    """

    def __init__(
        self,
        directory_url: Any,
        save_freq: Literal["epoch"] | int = "epoch",
        *,
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        stream: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        _check_backend(keras.backend.backend())
        check_frequency(save_freq)
        check_settings("BackupAndRestore", settings, ("save_steps", "save_secs", "fresh", "max_to_keep"))
        self.directory_url = as_url(directory_url)
        self.save_freq = save_freq
        self.delete_checkpoint = delete_checkpoint
        self.stream = stream
        self._keep = 2 if double_checkpoint else 1
        self._settings = settings
        self._ckpt: Run | None = None
        self._at = _Position()
        self._record = _Record()
        self._metrics: dict[str, Any] = {}
        self._resume = False
        self._stopped = False
        self._skip: Skip | None = None

    # -- the beginning ------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002 (Keras's)
        """Restore the newest checkpoint, if there is one."""
        self._at, self._record, self._metrics = _Position(), _Record(), {}
        self._resume = self._stopped = False
        model = self.model
        state.check_built(model)
        self._ckpt = open_run(self.directory_url, self, max_to_keep=self._keep, **self._settings)
        try:
            self._restore(model)
        except BaseException:
            leave_run(self._ckpt)
            raise

    def _restore(self, model: Any) -> None:
        found = self._running.restore_by(lambda stored: self._read(model, stored))
        if found is None:
            return
        training, restored = found
        self._at = _Position(**training["at"])
        if training["finished"]:
            return
        state.assign(state.variables(model), restored)
        self._record = _Record(**json.loads(restored[_WORKER].value))
        self._metrics = {name: state.bare(restored[name]) for name, _, _ in training["metrics"]}
        self._resume = True
        model._initial_epoch = self._at.epoch

    def _read(self, model: Any, stored: StoredCheckpoint) -> Callable[[], Any]:
        training = state.described(stored, state.TRAINING)
        if training["finished"]:
            return lambda: (training, None)
        named = state.variables(model)
        # The metrics have no variables yet.
        rename = state.renamed(list(named), training["variables"])
        like = {**state.values(named), **state.blanks(training["metrics"])}
        state.mark(like, [name for name in like if rename.get(name, name) in training["own"]])
        like |= {state.TRAINING: "", _WORKER: PerWorker("", on_resize="first")}
        rank, world_size = self._running.rank, self._running.world_size
        build = read_state(stored, Named(like), rank=rank, world_size=world_size, rename=rename or None)
        return lambda: (training, build())

    @property
    def _running(self) -> Run:
        if self._ckpt is None:
            raise UsageError("BackupAndRestore works within fit() only")
        return self._ckpt

    # -- epochs and batches -------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 (Keras's)
        """Remember the epoch's random state; in the resumed epoch, take up where it was left."""
        resumed, self._resume = self._resume, False
        if resumed:
            self._check_epoch(epoch)
            self._take_up()
        else:
            self._at.batch = 0
        self._at.epoch = epoch
        if not self._at.batch:
            self._record.begin = random_state()
        if resumed and (self._at.batch or (self.stream and self._at.batches)):
            self._skip_batches()

    def _check_epoch(self, epoch: int) -> None:
        """Keras takes the user's ``initial_epoch`` where ours is 0."""
        at = self._at
        if epoch != at.epoch:
            raise UsageError(
                f"{self.directory_url} holds a training saved in epoch {at.epoch} after {at.batch} batches, but fit()"
                f" begins with epoch {epoch}: call it with initial_epoch={at.epoch}, or name another directory"
            )

    def _take_up(self) -> None:
        """What `fit` and its History have reset since the restore."""
        # Else every later fit() of this model would begin at this epoch.
        self._model._initial_epoch = None
        history = self._model.history
        history.epoch = list(self._record.epochs)
        history.history = {key: list(found) for key, found in self._record.history.items()}
        state_now = self._record.begin if self._at.batch else self._record.now
        assert state_now is not None
        set_random_state(state_now)

    def _skip_batches(self) -> None:
        assert self._record.now is not None
        now, in_epoch = self._record.now, self._at.batch > 0
        if in_epoch and self._are_metrics_built():
            self._set_metrics()
        self._skip = Skip(
            self._model,
            batches=self._at.batch,
            ahead=self._at.batches - self._at.batch if self.stream else 0,
            logs=self._record.logs,
            first=self._build_metrics if in_epoch else None,
            last=lambda: set_random_state(now),
        )

    def _are_metrics_built(self) -> bool:
        return len(self._model.metrics_variables) == len(self._metrics)

    def _build_metrics(self, batch: Any) -> None:
        """Metrics have no variables before a first batch; `fit` itself builds them so with other backends."""
        if not self._are_metrics_built():
            self._model._symbolic_build(data_batch=batch)
            self._set_metrics()

    def _set_metrics(self) -> None:
        found = self._model.metrics_variables
        if [list(v.shape) for v in found] != [list(value.shape) for value in self._metrics.values()]:
            raise UsageError(
                f"the model's metrics {[v.path for v in found]} are not those of the checkpoint {list(self._metrics)}:"
                " compile the model with the same ones"
            )
        for variable, value in zip(found, self._metrics.values(), strict=True):
            variable.assign(value)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save if that is due."""
        if skipping(self._model):
            return
        at, ckpt = self._at, self._running
        trained = batch + 1 - at.batch
        at.batch += trained
        at.batches += trained
        at.since += trained
        at.step += trained
        self._record.logs = logs or {}
        if self.save_freq != "epoch" and at.since >= self.save_freq:
            at.since = 0
            ckpt.save(at.step, self._state)
        else:
            ckpt.step(at.step, self._state)
        if ckpt.should_stop:
            self._stopped = self._model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save if that is due; the training goes on with the next epoch from here."""
        if self._skip is not None:
            self._skip.end()
            self._skip = None
        if self._stopped:
            # In the middle of the epoch, where it is to be resumed.
            return
        at, record = self._at, self._record
        at.epoch, at.batch = epoch + 1, 0
        record.epochs.append(epoch)
        for key, value in (logs or {}).items():
            record.history.setdefault(key, []).append(plain(value))
        record.logs = {}
        if self.save_freq == "epoch":
            at.since = 0
            self._running.save(at.step, self._state)

    def _state(self) -> Named:
        model = self.model
        named, metrics = state.variables(model), state.metrics(model)
        own = state.own_names({**named, **metrics}, self._running.world_size)
        at, record = self._at, self._record
        training = {
            "finished": False,
            "at": {name: getattr(at, name) for name in _Position.__slots__},
            "variables": list(named),
            "metrics": state.forms(metrics),
            "own": own,
        }
        worker = {
            "epochs": record.epochs,
            "history": record.history,
            "logs": plain(record.logs),
            "begin": record.begin if at.batch else None,
            "now": random_state(),
        }
        leaves = state.values({**named, **metrics})
        state.mark(leaves, own)
        leaves[state.TRAINING] = json.dumps(training)
        leaves[_WORKER] = PerWorker(json.dumps(worker), on_resize="first")
        return leaves

    # -- the end ------------------------------------------------------------------------------------------

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002 (Keras's)
        """Wait for all saves; give the state up if it is not wanted any more."""
        ckpt = self._running
        if self._resume:
            # No epoch was left to train.
            self._take_up()
            self._resume = False
        try:
            if self.delete_checkpoint and not self._stopped:
                for _ in range(self._keep):
                    self._at.step += 1
                    ckpt.save(self._at.step, self._finished())
            # May take the last state.
            close_run(ckpt)
        finally:
            self._ckpt = None
            leave_run(ckpt)

    def _finished(self) -> Named:
        """A checkpoint that says that there is nothing to resume; retention removes those before it."""
        at = {"step": self._at.step}
        nothing: dict[str, Any] = {"variables": [], "metrics": [], "own": []}
        return Named({state.TRAINING: json.dumps({"finished": True, "at": at, **nothing})})
