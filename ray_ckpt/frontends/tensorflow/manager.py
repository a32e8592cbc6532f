"""`CheckpointManager`: TensorFlow's class of that name, with saves that training does not wait for.

Behaviour and texts of errors are those of tensorflow/python/checkpoint/checkpoint_management.py.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any

from ray_ckpt import log
from ray_ckpt.checkpointer import Checkpointer, retry_until_agreed
from ray_ckpt.errors import RayCkptError, SaveError, UsageError
from ray_ckpt.storage import open_store
from ray_ckpt.trackable import check_kind
from ray_ckpt.types import PRIVATE_DIR, Checkpoint

logger = logging.getLogger(__name__)

_SINCE = f"{PRIVATE_DIR}/kept_since"
"""The file that says from when on a directory's managers keep a checkpoint every so many hours."""


class CheckpointManager:
    """Saves a `tf.train.Checkpoint` under rising numbers, keeps some, and restores the newest, as TensorFlow's does.

    A save returns once the values are copied; `sync` waits for the files. `checkpoints` and `latest_checkpoint` name
    committed ones only. With several workers each makes one and calls the same methods at the same steps.

    Args:
        checkpoint: the `tf.train.Checkpoint`.
        directory: a path or any URL that `ray_ckpt.storage` knows.
        max_to_keep: how many checkpoints to keep, None for all; the oldest goes first.
        keep_checkpoint_every_n_hours: what would be deleted and is that much younger than the last one kept so is
            kept for good. The first time counts from the first manager with this option in the directory, whatever
            restarts there were.
        checkpoint_name: checkpoints are ``<directory>/<checkpoint_name>-<number>``.
        step_counter, checkpoint_interval: save only if the counter, a `tf.Variable`, has risen by the interval.
        init_fn: called by `restore_or_initialize` where there is no checkpoint.
        last_checkpoint_step: the counter at the last save, to count the interval from.
        blocking: `save` returns once the checkpoint is committed.
        storage_options, single_coordinator: as of `Checkpointer`.
        options: all other settings of `Checkpointer`: ``rank``, ``world_size``, ``timeouts`` and so on.

    Raises:
        UsageError: not a `tf.train.Checkpoint`, or ``max_to_keep`` is not positive, or an interval without a counter
            (a ValueError, as TensorFlow's).
    """

    def __init__(
        self,
        checkpoint: Any,
        directory: str | os.PathLike[str],
        max_to_keep: int | None,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], Any] | None = None,
        last_checkpoint_step: int | None = None,
        *,
        blocking: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        single_coordinator: bool = False,
        **options: Any,
    ) -> None:
        check_kind(checkpoint)
        if max_to_keep is not None and max_to_keep <= 0:
            raise UsageError(f"Expected a positive integer or `None` for `max_to_keep`, got {max_to_keep}.")
        if checkpoint_interval is not None and step_counter is None:
            raise UsageError("`step_counter` should be passed if `checkpoint_interval` is not None.")
        self.checkpoint = checkpoint
        self._directory = os.fspath(directory)
        self._interval = checkpoint_interval
        self._step_counter = step_counter
        self._last_step = last_checkpoint_step
        self._init_fn = init_fn
        self._blocking = blocking
        self._hours = keep_checkpoint_every_n_hours
        self._store = open_store(
            self._directory, storage_options=storage_options, single_coordinator=single_coordinator
        )
        self._options = {
            **options,
            "storage_options": storage_options,
            "single_coordinator": single_coordinator,
            "basename": checkpoint_name,
            "max_to_keep": max_to_keep,
            "keep_every_hours": keep_checkpoint_every_n_hours or None,
            "fresh": True,
        }
        self._job: Checkpointer | None = None
        self._last_number = -1
        self._taken_numbers = -1
        self._untold: deque[tuple[int, list[Callable[[str], Any]]]] = deque()

    # -- looking ------------------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        """Where the checkpoints are, as it was given."""
        return self._directory

    @property
    def checkpoint_interval(self) -> int | None:
        """The least number of steps between two saves."""
        return self._interval

    @property
    def latest_checkpoint(self) -> str | None:
        """The path of the newest committed checkpoint, for `tf.train.Checkpoint.restore`; None if there is none."""
        found = self._live()
        return self._path(found[-1].prefix) if found else None

    @property
    def checkpoints(self) -> list[str]:
        """The paths of the committed checkpoints, newest last, without those kept by hours."""
        found = self._live()
        return [self._path(c.prefix) for c in found if not c.preserved or c is found[-1]]

    def _live(self) -> list[Checkpoint]:
        return [c for c in log.live_checkpoints(self._store) if not c.superseded]

    def _path(self, prefix: str) -> str:
        return os.path.join(self._directory, prefix)

    # -- saving -------------------------------------------------------------------------------------------

    def save(self, checkpoint_number: Any = None, check_interval: bool = True, options: Any = None) -> str | None:
        """Snapshot the objects now and save them in the background; the path, or None if nothing was to be saved.

        What is committed, and where, `latest_checkpoint` says: the path is where this save goes if all goes well.

        Args:
            checkpoint_number: an int, variable or tensor; by default the checkpoint's ``save_counter``, which is
                incremented in any case. With a number that is not higher than the last one, be it that of a save that
                failed, a new start begins: what was committed from this number on is superseded, never the default
                again, and the first to be deleted.
            check_interval: if False, save although the interval is not over, unless this very step was saved.
            options: of `tf.train.CheckpointOptions` only ``experimental_write_callbacks`` has a meaning here: called
                with the path by the first call of a method after the commit.

        Raises:
            StateError: an object cannot be saved; names it.
            SaveError: the save failed, where it is waited for: with ``blocking``, or where the path depends on it.
            RayCkptError: the job cannot go on.
        """
        if not self._is_due(check_interval):
            return None
        counter = self.checkpoint.save_counter
        counter.assign_add(1)
        number = int(counter if checkpoint_number is None else checkpoint_number)
        job = self._job_for(number)
        # First, so that after an error the same number can be saved by a new start: this one has given it up.
        self._last_number = number
        job.save(number, self.checkpoint, force=True)
        callbacks = getattr(options, "experimental_write_callbacks", None)
        if callbacks:
            self._untold.append((number, list(callbacks)))
        # Where a number has been in use before, the folder of the attempt becomes part of the path.
        if self._blocking or number <= self._taken_numbers:
            self.sync()
            outcome = job.outcome(number)
            assert outcome is not None
            if outcome.state != "committed":
                raise SaveError(f"{self._directory}: number {number} was not saved: {outcome.error}; save it again")
            return self._path(outcome.prefix)
        self._tell()
        return self._path(f"{self._options['basename']}-{number}")

    def _is_due(self, check_interval: bool) -> bool:
        if self._interval is None:
            return True
        step, last = int(self._step_counter), self._last_step
        if last is not None and (step == last or (check_interval and step < last + self._interval)):
            return False
        self._last_step = step
        return True

    def sync(self) -> None:
        """Wait until all saves are committed, and named in the `checkpoint` file; soon after, if `single_coordinator`.

        Raises:
            SaveError: one has failed; says why.
            UnavailableError: not in time; names who is late.
        """
        if self._job is not None:
            try:
                self._job.wait()
                self._publish(self._job)
            finally:
                self._tell()

    wait = sync

    def _publish(self, job: Checkpointer) -> None:
        """Have `tf.train.latest_checkpoint` find the last commit, in case the coordinator has not come to it yet.

        Where the store cannot keep two writers apart, that is left to the coordinator.
        """
        if job.rank == 0 and not self._options["single_coordinator"]:
            log.repair_state_file(self._store)

    def _tell(self) -> None:
        """Call the callbacks of committed saves."""
        while self._untold and self._job is not None:
            outcome = self._job.outcome(self._untold[0][0])
            if outcome is None:
                return
            _, callbacks = self._untold.popleft()
            if outcome.state == "committed":
                for callback in callbacks:
                    callback(self._path(outcome.prefix))

    # -- restoring ----------------------------------------------------------------------------------------

    def restore_or_initialize(self) -> str | None:
        """Restore the newest checkpoint, and give its path; where there is none, call ``init_fn``, and give None.

        All workers get the same one. Its bytes are verified before; if it is damaged, an older one is taken, with a
        warning. Objects that it lacks keep their values, with a warning.

        Raises:
            MismatchError: a variable has another shape or dtype than in the checkpoint.
            CheckpointError: all checkpoints are damaged.
            UnavailableError: not all workers came; names who is late.
        """
        self.close()
        with self._starting() as job:
            job.restore(self.checkpoint, partial=True)
        step = job.restored_step
        self._last_number = -1 if step is None else step - 1
        if step is None:
            if self._init_fn is not None:
                self._init_fn()
                logger.info("Customized initialization is done through the passed `init_fn`.")
            return None
        if self._interval is not None:
            self._last_step = int(self._step_counter)
        return self._path(next(c.prefix for c in reversed(self._live()) if c.step == step))

    # -- the job ------------------------------------------------------------------------------------------

    def _job_for(self, number: int) -> Checkpointer:
        """The job that may save under this number: a new one at first, and after one that is not lower."""
        if self._job is None or number <= self._last_number:
            self._give_up()
            self._job = self._adopt(number)
        return self._job

    @retry_until_agreed
    def _adopt(self, number: int) -> Checkpointer:
        """A new job, for objects that TensorFlow itself has restored, if at all: the number tells from where."""
        with self._starting() as job:
            job.adopt(max((step for step in job.all_steps() if step < number), default=None))
        return job

    @contextmanager
    def _starting(self) -> Iterator[Checkpointer]:
        """A new job, which becomes this manager's once all workers have come together in it, and else is left."""
        since = None if not self._hours else self._kept_since()
        with ExitStack() as undo:
            # It has no loop that could stop, so SIGTERM ends the process as it would without this.
            options = {"handle_sigterm": False, **self._options}
            job = undo.enter_context(Checkpointer(self._directory, **options, keep_hours_from=since))
            yield job
            self._taken_numbers = self._numbers_in_use(job)
            undo.pop_all()
        self._job = job
        self._untold.clear()
        # Scripts for TensorFlow's class never close it; their last save is not to be lost with a Ray of their own.
        atexit.register(self._close_at_exit)

    def _numbers_in_use(self, job: Checkpointer) -> int:
        """The highest number that was in use before this start; its log, which is ours now, stays true."""
        # The claims first: what is swept before the log is read has raised its mark by then.
        claimed = (claim.step for claim in log.list_claims(self._store) if claim.generation != job.generation)
        highest = max(claimed, default=-1)
        head = log.read_head(self._store)
        return highest if head is None else max(highest, head.high_water)

    def _kept_since(self) -> float:
        """When the first manager that keeps some by hours came to this directory, in seconds since the epoch."""
        now = time.time()
        if self._store.put_if_absent(_SINCE, json.dumps({"since": now}).encode()):
            return now
        return float(json.loads(self._store.read(_SINCE))["since"])

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except RayCkptError as error:
            logger.warning("%s: %s", self._directory, error)

    def close(self) -> None:
        """Wait for all saves, and leave the job. A later `save` joins it again.

        Raises:
            SaveError: the last save failed.
        """
        if self._job is not None:
            try:
                try:
                    self._job.close()
                finally:
                    # A run that was preempted is over with an error, too.
                    self._publish(self._job)
            finally:
                self._forget()

    def _give_up(self) -> None:
        """Leave the job for another one: a save that failed was warned about, and is to be made again."""
        if self._job is not None:
            try:
                with suppress(SaveError):
                    self._job.wait()
            finally:
                self._job.leave()
                self._forget()

    def _forget(self) -> None:
        atexit.unregister(self._close_at_exit)
        self._tell()
        self._job = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
