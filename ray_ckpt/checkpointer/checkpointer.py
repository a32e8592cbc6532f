"""`Checkpointer`: three lines in a training loop."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import ray

from ray_ckpt import log, train
from ray_ckpt.checkpointer import restoring, sigterm
from ray_ckpt.checkpointer.deciding import Decisions, resolve
from ray_ckpt.checkpointer.link import Home, Link
from ray_ckpt.checkpointer.saving import Saver
from ray_ckpt.checkpointer.settings import (
    DEFAULT_TIMEOUTS,
    Timeouts,
    check_local,
    check_place,
    configured,
    ensure_ray,
    where,
    who_am_i,
    whole_step,
)
from ray_ckpt.coordinator import find, run_id
from ray_ckpt.errors import SaveError, UnavailableError, UsageError
from ray_ckpt.protocol.messages import (
    BASENAME,
    JobConfig,
    Overlap,
    RestoreWish,
    RunStatus,
    SaveOutcome,
)
from ray_ckpt.storage import open_store
from ray_ckpt.target import Rename
from ray_ckpt.trackable import is_trackable

logger = logging.getLogger(__name__)

_CALL_S = 30.0


class Checkpointer:
    """Saves a training job's state asynchronously and restores it, on any number of hosts.

    Use it in every worker, as a context manager::

        with ray_ckpt.Checkpointer("gs://bucket/run", save_steps=500) as ckpt:
            state = ckpt.restore(init_state)
            for step in range((ckpt.restored_step or 0) + 1, 100_001):
                state = train_step(state)
                ckpt.step(step, state)
                if ckpt.should_stop:
                    break

    Args:
        url: the run's directory, any URL that `ray_ckpt.storage` knows. It is the run's identity. Without it, in a
            worker of Ray Train: the folder ``ray_ckpt`` of Ray Train's experiment directory.
        save_steps, save_secs: the cadence, one of them or neither (then `save` and `request_save` only).
        memory_steps: the cadence of snapshots that only lie in host memory, for a restart while hosts live. Skipped
            where all snapshot memory is in use; with ``snapshots=3`` that is seldom.
        replicas: 1 copies each snapshot to another host, so that a host may be lost: its save still commits, and the
            next start finds the snapshot. Costs the memory of two more snapshots a host. ``replica_bytes_per_s``
            bounds the rate at which a host copies.
        rank, world_size: by default Ray Train's, else those of a multi-process JAX, else 0 and 1.
        max_to_keep, keep_every_steps, keep_every_hours: retention; None keeps all. What ``keep_every_hours`` keeps is
            so many hours younger than the last one that it kept, or than ``keep_hours_from`` (seconds since the
            epoch; by default the first one is kept); it is no longer named in the `checkpoint` file.
        keep_hours_grid: the rule of `tf.train.Saver` for ``keep_every_hours`` instead: of what would be deleted one is
            kept for each so many hours since this time (seconds since the epoch), however far apart they are.
        keep_before: retention leaves checkpoints of generations before this number alone, and does not count them; 0:
            all that earlier starts made. Of this and the two before ranks may have their own: rank 0's count.
        basename: checkpoints are ``<basename>-<step>``.
        overlap: what a due save does while all snapshot memory is still being written: "wait" for it in `step()`,
            "skip" the save or "coalesce" it into the next possible one, both decided for all workers at once.
        on_error: "warn" (default) goes on after a failed background save, up to ``max_failures`` in a row, then
            stops all workers at one step with the cause; "raise" does so after the first.
        stride: steps between two calls of `step`.
        fresh: start without `restore` in a directory that holds checkpoints; they are superseded.
        snapshots: how many snapshots of the state a host's memory may hold.
        memory_dir: a folder for snapshots instead of the machine's tmpfs, a local SSD for one.
        timeouts: after which every wait ends in a decision, see `Timeouts`.
        delete_grace_s: how long a deleted checkpoint's data outlives its index, for readers without a pin.
        storage_options: for the fsspec file system; and ``timeout_s``, how long an operation on the storage may take
            with all its retries, 120 seconds by default (`open_store`).
        single_coordinator: allow a store that cannot create objects exclusively; see `open_store`.
        handle_sigterm: the first SIGTERM has all workers save and stop, see `preempted`, and does not end this process;
            where this is made in the main thread, and neither the program nor JAX's preemption service has a handler.

    Raises:
        UsageError, MissingExtraError: settings that cannot work; no URL outside of Ray Train.
        StorageError: the directory cannot be written.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        save_steps: int | None = None,
        save_secs: float | None = None,
        memory_steps: int | None = None,
        replicas: int = 0,
        replica_bytes_per_s: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        max_to_keep: int | None = 5,
        keep_every_steps: int | None = None,
        keep_every_hours: float | None = None,
        keep_before: int | None = None,
        keep_hours_from: float | None = None,
        keep_hours_grid: float | None = None,
        basename: str = BASENAME,
        overlap: Overlap = "wait",
        on_error: Literal["warn", "raise"] = "warn",
        max_failures: int = 3,
        stride: int = 1,
        fresh: bool = False,
        snapshots: int = 2,
        writers_per_host: int = 2,
        memory_dir: str | os.PathLike[str] | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        delete_grace_s: float = 60.0,
        storage_options: Mapping[str, Any] | None = None,
        single_coordinator: bool = False,
        handle_sigterm: bool = True,
    ) -> None:
        check_local(on_error, timeouts, writers_per_host)
        self.rank, self.world_size = who_am_i(rank, world_size)
        config = configured(
            timeouts,
            world_size=self.world_size,
            save_steps=save_steps,
            save_secs=save_secs,
            memory_steps=memory_steps,
            replicas=replicas,
            replica_bytes_per_s=replica_bytes_per_s,
            stride=stride,
            overlap=overlap,
            slots=snapshots,
            max_failures=1 if on_error == "raise" else max_failures,
            max_to_keep=max_to_keep,
            keep_every_steps=keep_every_steps,
            keep_every_hours=keep_every_hours,
            keep_before=keep_before,
            keep_hours_from=keep_hours_from,
            keep_hours_grid=keep_hours_grid,
            basename=basename,
            delete_grace_s=delete_grace_s,
            fresh=fresh,
        )
        place, options = where(url, storage_options)
        self._store = open_store(place, storage_options=options, single_coordinator=single_coordinator)
        home = Home(self._store.url, options, single_coordinator, writers_per_host, memory_dir, timeouts.recover_s)
        self._open(home, config, timeouts, handle_sigterm)

    def _open(self, home: Home, config: JobConfig, timeouts: Timeouts, handle_sigterm: bool) -> None:
        self.url = check_place(home.url)
        if self.rank == 0:
            self._store.check()
        ensure_ray()
        self._link = link = Link(home, self.rank, config)
        self._start_timeout_s = timeouts.start_s
        self._last: tuple[int, Any] | None = None
        self._ready = False
        self._closed = False
        self._saver = Saver(link, run_id(self.url), config)
        self._decisions = Decisions(link, self._saver, config.save_timeout_s)
        self._reporter = train.Reporter()
        link.open()
        if handle_sigterm:
            sigterm.listen(self)

    # -- restore ------------------------------------------------------------------------------------------

    def restore(
        self,
        like: Any = None,
        step: int | None = None,
        *,
        missing: Literal["init", "error"] = "init",
        partial: bool = False,
        rename: Rename | None = None,
        cast: bool = False,
    ) -> Any:
        """The state of the newest checkpoint (or of ``step``), sharded as ``like`` is, on all workers the same one.

        ``like``: a state, an abstract one (shapes, dtypes, shardings) or a function that makes a fresh state; that
        one runs only if there is no checkpoint. ``missing="error"`` raises then. ``partial``, ``rename`` and ``cast``:
        see `target.read_state`. After an explicit older ``step``, newer checkpoints are superseded: never the
        default again, and the first to be deleted. A `tf.train.Checkpoint` is restored by TensorFlow, objects that
        are made later too.

        Raises:
            UsageError: called twice, or after the first step.
            MismatchError: the checkpoint and ``like`` differ; lists the leaves.
            NoCheckpointError, DamagedError, UnavailableError.
        """
        self._check_open()
        if self._link.logic.has_wish:
            raise UsageError("restore() follows restore(), adopt() or step(): call it once, before the first step")
        if missing not in ("init", "error"):
            raise UsageError(f'missing must be "init" or "error", found {missing!r}')
        stored = is_trackable(like)
        wish = RestoreWish("newest", stored=stored) if step is None else RestoreWish("step", step, stored)

        read = restoring.reader_of(like, self.rank, self.world_size, partial=partial, rename=rename, cast=cast)
        found, state = restoring.restore(self._link, self._store, wish, read, self._start_timeout_s)
        if found is None and self.restored_step is None:
            if missing == "error":
                raise restoring.nothing_found(self.url)
            state = restoring.fresh(self.url, resolve(like))
        self._saver.register(state)
        self._ready = True
        if self.restored_step is not None and self._link.logic.saved_step is None:
            # It lies in host memory only: should the loop have no step left to do, this is what it ends with.
            self._last = (self.restored_step, state)
        return state

    def adopt(self, step: int | None) -> None:
        """Instead of `restore`: the state comes from the checkpoint of ``step``, read by other means; None: from none.

        Waits for all workers, which name the same step. What was committed after it is superseded. None needs
        ``fresh`` where there are checkpoints.

        Raises:
            UsageError: called twice, after `restore` or after the first step.
            NoCheckpointError: this step is not among the checkpoints.
            UnavailableError: not all workers came; names who is late.
        """
        self._check_open()
        if self._link.logic.has_wish:
            raise UsageError("adopt() follows restore(), adopt() or step(): call it once, before the first step")
        restoring.adopt(self._link, self._store, None if step is None else whole_step(step), self._start_timeout_s)
        # The structure of the state is known with the first save: until then nothing need be fetched.
        self._ready = True

    @property
    def generation(self) -> int:
        """The number of this start of the job in the directory, from 1. Raises `UsageError` before it has begun."""
        found = self._link.logic.generation
        if found is None:
            raise UsageError("the generation is known after restore(), adopt() or the first step")
        return found

    @property
    def restored_step(self) -> int | None:
        """The step that `restore` found; None on a fresh start."""
        return self._link.logic.restored_step

    # -- the training loop ----------------------------------------------------------------------------------

    def step(self, step: int, state: Any) -> None:
        """Tell that ``step`` training steps are completed, with this state; saves it if that is due.

        ``state`` may be a function that returns it, called only when a save is due. It may change as soon as
        this returns. Costs microseconds when nothing is due.

        Raises:
            UsageError: steps go back.
            StateError: the state cannot be saved; names the leaf.
            SaveError: background saves failed and all workers stop here (see ``on_error``).
            FencedError: a newer start of the job has taken over.
        """
        link = self._link
        if type(step) is not int:
            step = whole_step(step)
        if not self._ready or link.trouble is not None:
            self._prepare(state)
        with link.lock:
            due = link.logic.arrive(step)
        self._last = (step, state)
        if due is not None:
            self._decisions.act(due, state)

    def reached(self, bound: int, stride: int | None = None) -> bool:
        """The loop is at most at step ``bound`` now: for loops that do not know their step after each one.

        The bound is one of the steps that the loop comes to. Where a run is of several steps, ``stride`` says of how
        many; the default is the setting of that name.

        True: a save or a stop has been agreed on, so call `step` with the real step after each run until this is
        false. Nothing is agreed on at or before the bound any more. Costs about a microsecond.

        Raises:
            FencedError: a newer start of the job has taken over.
        """
        link = self._link
        if link.trouble is not None:
            raise link.trouble
        with link.lock:
            return link.logic.reached(bound, stride)

    def outcome(self, step: int) -> SaveOutcome | None:
        """How the save of this step by this start ended; None while it is under way, or if there was none.

        ``state`` is "committed", with ``prefix``, or "failed", with ``error``. The last 64 are known.
        """
        with self._link.condition:
            return self._link.logic.outcomes.get(step)

    def save(self, step: int, state: Any, *, force: bool = False) -> None:
        """Save this step now, in the background; call it on every worker with the same step.

        The step that was restored is not saved again, unless ``force``. What is saved already is not saved twice.

        Raises:
            SaveError: `save` was called for this step before, and that failed: save at a later step.
            RayCkptError: as `step`.
        """
        step = whole_step(step)
        if not self._ready or self._link.trouble is not None:
            self._prepare(state)
        self._decisions.check_not_failed(step)
        self._last = (step, state)
        if step == self._link.logic.saved_step and not force:
            logger.info("step %d was restored from %s and is saved already", step, self.url)
            return
        self._decisions.ask(step, state, "explicit")

    def _prepare(self, state: Any) -> None:
        """The first call: all workers have joined, and the structure of the state is known."""
        self._check_open()
        if self._link.trouble is not None:
            raise self._link.trouble
        if not self._link.logic.has_wish:
            restoring.restore(
                self._link, self._store, RestoreWish("none"), lambda _: lambda: None, self._start_timeout_s
            )
        self._saver.register(resolve(state))
        self._ready = True

    def request_save(self, reason: str = "request_save()") -> str:
        """Ask for a save at the next step that all workers can agree on; from any worker, any thread."""
        request_id = uuid.uuid4().hex
        with self._link.condition:
            self._link.logic.request(request_id, reason)
        self._link.courier.nudge()
        return request_id

    def request_stop(self, reason: str = "request_stop()", *, preempted: bool = False) -> None:
        """Have all workers save and stop at the same step: `should_stop` becomes true on each.

        ``preempted``: because this process or its host is about to be ended; then `preempted` does too.
        """
        with self._link.condition:
            self._link.logic.request_stop(reason, preempted=preempted)
        self._link.courier.nudge()

    @property
    def should_stop(self) -> bool:
        """Whether all workers have saved and are to stop at the step that was told last."""
        return self._decisions.stop is not None

    @property
    def stop_reason(self) -> str:
        """Why all workers are to stop; empty while they are not."""
        stop = self._decisions.stop
        return "" if stop is None else stop.reason

    @property
    def preempted(self) -> bool:
        """Whether all workers are to stop because a host or process of the job is about to go."""
        stop = self._decisions.stop
        return stop is not None and stop.preempted

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every snapshot taken so far is committed or has failed.

        Raises:
            SaveError: one of them failed since the last `wait`; the text says which and why.
            UnavailableError: not in time; names who is late.
        """
        self._decisions.wait(timeout_s)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Instead of `ray.train.report(metrics)`, on every rank and as often: attaches the newest committed checkpoint.

        What Ray Train gets is a pointer, see `ray_ckpt.from_train`; no save waits for this call, nor this call for a
        save. `close` reports the last metrics once more, so that the last commit is attached as well; so all ranks must
        report by this, or none.

        Raises:
            UsageError: not in a worker of Ray Train.
        """
        self._check_open()
        self._reporter.report(metrics, self._decisions.newest(), self._link.logic.generation)

    # -- looking --------------------------------------------------------------------------------------------

    def latest_step(self) -> int | None:
        """The newest committed step that is not superseded, None if there is none."""
        steps = [c.step for c in log.live_checkpoints(self._store) if not c.superseded]
        return steps[-1] if steps else None

    def all_steps(self) -> list[int]:
        """All committed steps that are not superseded, in the order of their commits."""
        return [c.step for c in log.live_checkpoints(self._store) if not c.superseded]

    def status(self) -> RunStatus:
        """What the coordinator is doing: saves under way and what they wait for."""
        found: RunStatus = ray.get(find(self.url).status.remote(), timeout=_CALL_S)
        return found

    @property
    def stall_s(self) -> float:
        """Seconds that the training thread has spent in snapshots, waits included: for steps queued on a device too."""
        return self._saver.stall_s

    # -- the end --------------------------------------------------------------------------------------------

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.leave()

    def close(self) -> None:
        """Save the last step if it is not saved yet, wait for all saves, and leave. May be called again.

        Where `reached` has gone beyond the last step, its state is not known any more and nothing is added.

        Raises:
            SaveError: the last step was not saved.
            FencedError: a newer start of the job has taken over, so the last step was not saved.
            PreemptedError: in a worker of Ray Train after a stop that was `preempted`; all is committed.
        """
        if self._closed:
            return
        closed = False
        try:
            self._finish()
            closed = not self.preempted
        except (SaveError, UnavailableError) as error:
            if self.preempted:
                # In Ray Train the next start may have more luck, with what was committed before.
                self._hand_over(f"{self.stop_reason}; {error}")
            raise
        finally:
            self._leave(closed=closed)
        if self.preempted:
            self._hand_over(self.stop_reason)

    def _finish(self) -> None:
        """The last save, the end of all others, the last report."""
        if self._last is not None and self._ready and self._last[0] >= self._link.logic.bound:
            if self._link.trouble is not None:
                raise self._link.trouble
            self._decisions.ask(*self._last, "final")
        with self._link.condition:
            self._link.logic.finish()
        self._link.courier.nudge()
        lost = [outcome for outcome in self._decisions.settle() if self._last and outcome.step == self._last[0]]
        if lost:
            raise SaveError(f"{self.url}: the last step, {lost[0].step}, was not saved: {lost[0].error}")
        self._reporter.finish(self._decisions.newest(), self._link.logic.generation)

    def _hand_over(self, reason: str) -> None:
        newest = self._decisions.newest()
        train.hand_over(self.url, newest.step if newest is not None else None, reason)

    def leave(self) -> None:
        """Leave at once, without a last save; what has been snapshotted is saved without this process, and stays in
        host memory for the next start.
        """
        self._leave(closed=False)

    def _leave(self, *, closed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._ready = False
        self._last = None
        with self._link.condition:
            self._link.logic.finish(closed=closed)
        # First, as the agent removes with the last report what nobody has open.
        self._saver.slots.close()
        self._link.close()
        sigterm.unlisten(self)

    def on_sigterm(self) -> None:
        """This process has been sent SIGTERM: all workers save and stop. For the handler, in a thread of its own."""
        logger.warning("rank %d: SIGTERM: all workers save and stop; a second one ends this process", self.rank)
        self.request_stop(f"rank {self.rank} was sent SIGTERM", preempted=True)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Checkpointer is closed: make a new one")
