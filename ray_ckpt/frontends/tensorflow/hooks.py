"""`CheckpointSaverHook` and `AsyncCheckpointSaverHook`: TensorFlow's hooks over this package's saves.

What they do and when is TensorFlow's (r1.13 to 2.21, tensorflow/python/training/basic_session_run_hooks.py, and
tensorflow/contrib/tpu/python/tpu/async_checkpoint.py of r1.13).
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import ray
import tensorflow as tf
from tensorflow.python.training import training_util

from ray_ckpt.checkpointer.settings import DEFAULT_TIMEOUTS, Timeouts, check_local, check_positive, who_am_i
from ray_ckpt.errors import RayCkptError, SaveError, UsageError
from ray_ckpt.frontends.tensorflow.restore import restore_session
from ray_ckpt.frontends.tensorflow.saver_list import SaverList, first_told, tell
from ray_ckpt.frontends.tensorflow.session_saves import Place, SessionSaves, Taken
from ray_ckpt.frontends.tensorflow.side_files import SideFiles, check_folder, opened_by_tensorflow
from ray_ckpt.protocol.messages import SaveOutcome
from ray_ckpt.storage import open_store

if TYPE_CHECKING:
    from typing_extensions import Unpack

logging = tf.compat.v1.logging

_STORE_OPTIONS = ("storage_options", "single_coordinator")


class HookSettings(TypedDict, total=False):
    """What the hooks take beyond TensorFlow's arguments, by keyword; those not told here are `Checkpointer`'s.

    ``blocking``: whether `after_run` waits for the commit. None, the default: `CheckpointSaverHook` does if
    a listener has an `after_save`, `AsyncCheckpointSaverHook` never does.

    ``on_error``: "raise" (default): a save that failed is raised from the next run; "warn": it is logged, and training
    goes on, up to three in a row.

    ``before_snapshot``: called with the session after the listeners' `before_save`, just before the values are read: to
    pull embedding tables into the host's variables, for one.
    """

    blocking: bool | None
    on_error: Literal["raise", "warn"]
    before_snapshot: Callable[[Any], None] | None
    rank: int | None
    world_size: int | None
    writers_per_host: int
    memory_dir: str | os.PathLike[str] | None
    timeouts: Timeouts
    delete_grace_s: float
    storage_options: Mapping[str, Any] | None
    single_coordinator: bool


class CheckpointSaverHook(tf.compat.v1.train.CheckpointSaverHook):  # type: ignore[misc]
    """Saves a session's variables every N steps or seconds, as `tf.compat.v1.train.CheckpointSaverHook` does.

    A due save copies the values in `after_run`; Ray tasks write them, and one commit makes the checkpoint visible.
    After it, in the training thread (at the next run, or before `after_run` returns, see ``blocking``), come
    `.meta`, the event and the listeners' `after_save`. At most two snapshots are in memory: a third due save waits. If
    Ray does not run in this process, a local one is started.

    Args:
        checkpoint_dir: a path or URL. Where TensorFlow has no file system for it, the hook itself restores a session at
            step 0 from the newest checkpoint there, and writes no event file.
        save_secs, save_steps: the cadence, exactly one of them.
        saver: the `Saver` that says what is saved, under which names, and which checkpoints are kept.
        checkpoint_basename: checkpoints are ``<checkpoint_basename>-<step>``; may have a folder before the name.
        scaffold: whose saver is used, if ``saver`` is not given; with neither the only one of the SAVERS collection.
        listeners: `CheckpointSaverListener` objects.
        steps_per_run: how many training steps one `session.run` takes.
        save_graph_def: whether to write `graph.pbtxt` and `.meta` files.
        settings: see `HookSettings`.

    Raises:
        ValueError: saver and scaffold, or not exactly one of save_secs and save_steps; TensorFlow's messages.
        UsageError: settings that cannot work. On use: the hook serves two sessions, or a forked process; no
            variables to save; ``checkpoint_dir`` is a file.
        SaveError: on use: a save failed, and ``on_error`` is "raise".
        FencedError: on use: another job or a newer start saves to this directory.
    """

    _never_waits = False

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        save_secs: float | None = None,
        save_steps: int | None = None,
        saver: Any = None,
        checkpoint_basename: str = "model.ckpt",
        scaffold: Any = None,
        listeners: list[Any] | None = None,
        steps_per_run: int = 1,
        save_graph_def: bool = True,
        **settings: Unpack[HookSettings],
    ) -> None:
        super().__init__(
            os.fspath(checkpoint_dir),
            save_secs=save_secs,
            save_steps=save_steps,
            saver=saver,
            checkpoint_basename=checkpoint_basename,
            scaffold=scaffold,
            listeners=listeners,
            save_graph_def=save_graph_def,
        )
        check_positive("steps_per_run", steps_per_run, whole=True)
        self._set_steps_per_run(steps_per_run)
        _check(type(self).__name__, settings)
        options: dict[str, Any] = {"on_error": "raise", **settings}
        self._blocking: bool | None = options.pop("blocking", None)
        self._before_snapshot: Callable[[Any], None] | None = options.pop("before_snapshot", None)
        self._options = options
        self._by_secs = save_secs is not None
        self._pid = os.getpid()
        self._saves: SessionSaves | None = None
        self._files: SideFiles | None = None
        self._kept: SaverList | None = None
        self._stop = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What was pickled may be used in the process that it was sent to.
        self.__dict__.update(state, _pid=os.getpid())

    # -- a session's life -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the folder and its event file, and the tensor that reads the global step; once a `MonitoredSession`."""
        self._check_process()
        self._pid = os.getpid()
        self._settle_unended()
        self._stop = False
        check_folder(self._checkpoint_dir)
        self._rank, self._world_size = who_am_i(self._options.get("rank"), self._options.get("world_size"))
        # One worker raises by itself; several are stopped by the `Checkpointer`, all at one step.
        options = {**self._options, "on_error": "warn"} if self._world_size == 1 else self._options
        self._place = Place(os.path.dirname(self._save_path) or ".", os.path.basename(self._save_path), options)
        self._files = self._side_files() if self._rank == 0 else None
        self._summary_writer = self._files and self._files.events
        self._global_step_tensor = training_util._get_or_create_global_step_read()
        if self._global_step_tensor is None:
            raise RuntimeError("Global step should be created to use CheckpointSaverHook.")
        for listener in self._listeners:
            listener.begin()

    def _side_files(self) -> SideFiles:
        options: dict[str, Any] = {k: v for k, v in self._options.items() if k in _STORE_OPTIONS}
        store = open_store(self._place.url, **options)
        return SideFiles(self._checkpoint_dir, store, self._save_path, graphs=self._save_graph_def, options=options)

    def after_create_session(self, session: Any, coord: Any) -> None:  # noqa: ARG002 (TensorFlow's interface)
        """Write the graph, and save the session as it is: fresh, restored, or restored after it was lost."""
        self._check_process()
        lost, self._saves = self._saves, None
        if lost is not None:
            self._settle(lost, session)
        with session.graph.as_default():
            self._restore(session)
            step = session.run(self._global_step_tensor)
            if self._files is not None:
                self._files.write_graph(session.graph)
            saver = self._get_saver()
            if self._files is not None:
                self._files.log_graph(session.graph, saver)
            saves = self._open(session, saver)
            try:
                self._save(session, step, first=True)
            except BaseException:
                # There will be no session, so nobody would ever end this.
                self._let_go(saves)
                raise
        self._timer.update_last_triggered_step(step)

    def _restore(self, session: Any) -> None:
        """Where TensorFlow cannot open the directory, `MonitoredTrainingSession` could not restore from it."""
        if not opened_by_tensorflow(self._checkpoint_dir) and session.run(self._global_step_tensor) == 0:
            options = self._options.get("storage_options")
            saver = self._get_saver()
            if restore_session(session, self._place.url, saver, storage_options=options) is not None:
                tell(saver, self._place.url, options)

    def _open(self, session: Any, saver: Any) -> SessionSaves:
        if self._kept is None or self._kept.saver is not saver:
            # The first rank's counts.
            told = first_told(saver, self._place.url, self._options.get("storage_options")) if self._rank == 0 else 0
            self._kept = SaverList(saver, told)
        self._kept.begin_session()
        saves = SessionSaves(session, self._global_step_tensor, saver, self._place, self._kept.keep_before)
        self._kept.keep_before = saves.keep_before
        self._saves = saves
        _USED.add(self)
        self._leaving = weakref.finalize(self, saves.leave)
        self._leaving.atexit = False
        return saves

    def _let_go(self, saves: SessionSaves) -> None:
        self._saves = None
        self._leaving.detach()
        saves.leave()

    def after_run(self, run_context: Any, run_values: Any) -> None:
        """Save if that is due, and tell of saves that have been committed since the last run."""
        session = run_context.session
        saves = self._of(session)
        if saves.is_pending:
            self._tell(session, raises=self._world_size == 1)
        # Python's own numbers: numpy's take several times as long to add and to compare.
        known_step = int(run_values.results)
        agreed = saves.reached(known_step, self._steps_per_run)
        if agreed or self._timer.should_trigger_for_step(known_step + self._steps_per_run):
            # The real step, after the train op.
            self._look(session, session.run(self._global_step_tensor), agreed)
        if self._stop:
            self._stop = False
            if self._world_size == 1:
                run_context.request_stop()
            else:
                # One that stops alone leaves the others in their collectives, and saves a last step that they do not.
                saves.job.request_stop("a CheckpointSaverListener asks for it")
        if saves.job.should_stop:
            run_context.request_stop()

    def _look(self, session: Any, step: Any, agreed: bool) -> None:
        saves = self._of(session)
        taken = agreed and saves.offer(step, lambda: self._before(session, step))
        due = self._timer.should_trigger_for_step(step)
        # Some workers may refuse a step that others have accepted, and by steps all timers have to be alike.
        if due or (taken and (self._by_secs or self._world_size == 1)):
            self._timer.update_last_triggered_step(step)
        if taken:
            self._taken(session)
        elif due and self._by_secs and self._world_size > 1:
            # Clocks differ: the first rank's asks, and all workers save at a step that they agree on.
            if self._rank == 0:
                saves.job.request_save("save_secs")
        elif due:
            self._save(session, step)

    def end(self, session: Any) -> None:
        """Save the last step if it is not saved yet, wait for all saves, and let go of everything.

        Whatever fails of the earlier saves does not cost the last one, and is raised after it, the first of it. A
        last step whose save has failed is not tried again.
        """
        saves = self._of(session)
        failures: list[Exception] = []
        try:
            last_step = session.run(self._global_step_tensor)
            self._finish(session, failures)
            # Once more if workers did not agree on the step: now all are at their last.
            for _ in range(2):
                if last_step != saves.last_step:
                    with _collected(failures):
                        self._save(session, last_step)
                    self._finish(session, failures)
            if failures:
                raise failures[0]
            for listener in self._listeners:
                listener.end(session, last_step)
            try:
                saves.close()
            finally:  # a run that was preempted is over with an error, too
                self._name_newest()
        finally:
            self._let_go(saves)

    def _name_newest(self) -> None:
        try:
            if self._files is not None:
                self._files.name_newest()
        except RayCkptError as error:
            _complain(error, self._options["on_error"] == "raise")

    def _finish(self, session: Any, failures: list[Exception]) -> None:
        """Wait for the saves under way and tell of each one, whatever fails."""
        saves = self._of(session)
        with _collected(failures):
            saves.wait()
        for taken, outcome in saves.decided():
            with _collected(failures):
                self._tell_of(session, taken, outcome, raises=True)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until no save of this hook is under way, and tell listeners of those that were committed.

        Raises:
            SaveError: one failed, and ``on_error`` is "raise".
            UnavailableError: not in time; names who is late.
        """
        if self._saves is not None:
            session = self._saves.session
            self._of(session).wait(timeout_s)
            self._tell(session, raises=True)

    # -- saves ------------------------------------------------------------------------------------------------

    def _save(self, session: Any, step: Any, *, first: bool = False) -> None:
        self._before(session, step)
        self._of(session).take(step, first=first)
        self._taken(session)

    def _before(self, session: Any, step: Any) -> None:
        logging.info("Calling checkpoint listeners before saving checkpoint %d...", step)
        for listener in self._listeners:
            listener.before_save(session, step)
        logging.info("Saving checkpoints for %d into %s.", step, self._save_path)
        if self._before_snapshot is not None:
            self._before_snapshot(session)

    def _taken(self, session: Any) -> None:
        if self._waits:
            self._of(session).wait()
            self._tell(session, raises=True)

    @property
    def _waits(self) -> bool:
        """Whether `after_run` returns after the commit: if somebody is to be told then."""
        if self._blocking is not None:
            return self._blocking
        return not self._never_waits and _have_after_save(self._listeners)

    def _tell(self, session: Any, *, raises: bool) -> None:
        """Everything that follows a commit, for the saves that have ended."""
        for taken, outcome in self._of(session).decided():
            self._tell_of(session, taken, outcome, raises=raises)

    def _tell_of(self, session: Any, taken: Taken, outcome: SaveOutcome, *, raises: bool) -> None:
        if self._followed(taken, outcome, raises=raises) and self._after(session, taken.step) and not taken.first:
            self._stop = True

    def _followed(self, taken: Taken, outcome: SaveOutcome, *, raises: bool) -> bool:
        """Files and the Saver's own list, after a commit. False if the save failed, and that is not raised."""
        saves = self._saves
        assert saves is not None
        assert self._kept is not None
        raises = raises and self._options["on_error"] == "raise"
        if outcome.state == "failed":
            _complain(SaveError(f"{self._save_path}: step {taken.step} was not saved: {outcome.error}"), raises)
            return False
        if self._files is not None:
            try:
                self._files.write_meta(outcome.prefix, saves.session.graph, saves.saver, newest=not saves.is_pending)
                if self._waits or _have_after_save(self._listeners):
                    # Whoever is told of the commit looks for the newest checkpoint, and must find this one.
                    self._files.name_newest()
            except RayCkptError as error:
                _complain(error, raises)
            self._files.log_checkpoint(taken.step)
        self._kept.record(os.path.join(self._place.url, outcome.prefix))
        return True

    def _after(self, session: Any, step: Any) -> bool:
        logging.info("Calling checkpoint listeners after saving checkpoint %d...", step)
        should_stop = False
        for listener in self._listeners:
            if listener.after_save(session, step):
                logging.info("A CheckpointSaverListener requested that training be stopped. listener: %s", listener)
                should_stop = True
        return should_stop

    # -- sessions that did not end well -------------------------------------------------------------------------

    def _settle_unended(self) -> None:
        """A session whose training ended in an exception: its snapshots become whole checkpoints, nobody is told."""
        saves, self._saves = self._saves, None
        if saves is not None:
            self._settle(saves, None)

    def _settle(self, saves: SessionSaves, session: Any) -> None:
        """Wait for the saves of a session that is gone; listeners are told where there is a new session."""
        timeouts = self._options.get("timeouts", DEFAULT_TIMEOUTS)
        self._saves = saves
        try:
            saves.wait(timeouts.settle_s)
            for taken, outcome in saves.decided():
                if self._followed(taken, outcome, raises=False) and session is not None:
                    self._stop = (self._after(session, taken.step) and not taken.first) or self._stop
        except RayCkptError as error:
            logging.warning("The saves that were under way when a session ended have not all succeeded: %s", error)
        finally:
            self._let_go(saves)

    # -- wrong uses ---------------------------------------------------------------------------------------------

    def _of(self, session: Any) -> SessionSaves:
        saves = self._saves
        if saves is None or saves.session is not session or saves.pid != os.getpid():
            raise self._misuse(session)
        return saves

    def _misuse(self, session: Any) -> UsageError:
        self._check_process()
        if self._saves is None:
            return UsageError(f"{type(self).__name__} was used after its end, or before after_create_session")
        return UsageError(
            f"one {type(self).__name__} is used in two sessions at a time, {session!r} and {self._saves.session!r}:"
            " make one for each session, with a directory of its own"
        )

    def _check_process(self) -> None:
        """After a fork neither Ray nor TensorFlow works; better say so than hang."""
        if self._pid != os.getpid() and (self._saves is not None or ray.is_initialized()):
            raise UsageError(
                f"this {type(self).__name__} was made in process {self._pid} and is used in {os.getpid()}, a fork of"
                " it made after Ray or a session was started: start processes with the method 'spawn', or as Ray actors"
            )


class AsyncCheckpointSaverHook(CheckpointSaverHook):
    """`CheckpointSaverHook` for which training never waits, as `tf.contrib.tpu.AsyncCheckpointSaverHook`.

    Values are those of the step that a checkpoint is named after; they are written while training goes on.
    Listeners' `after_save` is called in the training thread, at the first run after the commit. Arguments, errors and
    settings: as `CheckpointSaverHook`; a save that is due while one is under way is taken too, a third waits.
    """

    _never_waits = True

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        save_secs: float | None = None,
        save_steps: int | None = None,
        saver: Any = None,
        checkpoint_basename: str = "model.ckpt",
        scaffold: Any = None,
        listeners: list[Any] | None = None,
        **settings: Unpack[HookSettings],
    ) -> None:
        logging.info("Create AsyncCheckpointSaverHook.")
        super().__init__(
            checkpoint_dir, save_secs, save_steps, saver, checkpoint_basename, scaffold, listeners, **settings
        )

    def end(self, session: Any) -> None:
        """Wait for the saves under way, save the last step if it is not saved yet, and wait for that."""
        logging.info("Waiting for any pending checkpoints to finish.")
        super().end(session)

    def _before(self, session: Any, step: Any) -> None:
        logging.info("Triggering checkpoint. %s", step)
        super()._before(session, step)

    def _after(self, session: Any, step: Any) -> bool:
        logging.info("Checkpoint finished for %d into %s.", step, self._save_path)
        return super()._after(session, step)


_USED: weakref.WeakSet[CheckpointSaverHook] = weakref.WeakSet()


@atexit.register
def _settle_all() -> None:
    """Training that ended in an exception never called `end`; this runs before Ray's own end."""
    for hook in [hook for hook in _USED if hook._pid == os.getpid() and ray.is_initialized()]:
        try:
            hook._settle_unended()
        except Exception as error:
            # Not this Ray any more. Others have to end, too.
            logging.warning("A hook could not finish its saves as the process ends: %r", error)


def _check(name: str, settings: Mapping[str, Any]) -> None:
    unknown = sorted(set(settings) - set(HookSettings.__annotations__))
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument {unknown[0]!r}")
    timeouts = settings.get("timeouts", DEFAULT_TIMEOUTS)
    check_local(settings.get("on_error", "raise"), timeouts, settings.get("writers_per_host", 1))


@contextmanager
def _collected(failures: list[Exception]) -> Iterator[None]:
    """Goes on after an error: the first one will be raised, others are logged."""
    try:
        yield
    except Exception as error:
        if failures:
            logging.warning("As a session ended: %r", error)
        failures.append(error)


def _complain(error: RayCkptError, raises: bool) -> None:
    if raises:
        raise error
    logging.warning("%s", error)


def _have_after_save(listeners: Iterable[Any]) -> bool:
    empty = tf.compat.v1.train.CheckpointSaverListener.after_save
    methods = [getattr(listener, "after_save", empty) for listener in listeners]
    return any(getattr(method, "__func__", method) is not empty for method in methods)
