"""The part of a save that happens in the training thread: layout, plan, free memory, copy."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.exceptions import RayActorError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from ray_ckpt.checkpointer.link import Link
from ray_ckpt.checkpointer.slots import Slots
from ray_ckpt.errors import RayCkptError, SaveError, StorageError, UnavailableError
from ray_ckpt.leaves.layout import Layouts
from ray_ckpt.protocol.messages import JobConfig, Trigger
from ray_ckpt.snapshot import SaveId, Segment, SegmentTooSmallError, needed_nbytes, take_snapshot
from ray_ckpt.trackable import gather, is_trackable
from ray_ckpt.types import Layout, RankPlan

logger = logging.getLogger(__name__)

_STRING_ROOM_NBYTES = 1 << 20
"""Room for leaves without a fixed size, before the first save shows how large they are."""

_STRING_GROWTH = 0.5
"""By how much more they get than they need, as they may grow from save to save: not all memory is made anew then."""

_PREPARE_S = 600.0
_RESTART_S = 60.0
_PREPARE_AGAIN_S = 1.0


class Saver:
    """Takes this rank's snapshots.

    ``stall_s`` is the time that training has lost to it; ``missed`` counts those for a restart that could not be taken.
    """

    def __init__(self, link: Link, run: str, config: JobConfig) -> None:
        self._link = link
        self._run = run
        self._config = config
        self._layouts = Layouts(link.rank, config.world_size)
        self._fingerprint: str | None = None
        self._first = True
        self.stall_s = 0.0
        self.missed = 0
        self.slots = Slots(self._prepare, self._notify)
        link.on_view = self._on_view

    def register(self, state: Any) -> None:
        """Tell the structure of the state ahead of the first save, so that plan and memory are ready for it."""
        layout, _ = self._layouts.of(self._leaves_of(state))
        self._set_layout(layout)

    def save(self, step: int, state: Any, trigger: Trigger) -> None:
        """Snapshot this rank's share of the state, or report that it could not be done.

        Raises:
            StateError: the state cannot be saved.
            RayCkptError: the job cannot go on.
        """
        due, began = time.time(), time.monotonic()
        try:
            self._save(step, state, trigger, due)
        except UnavailableError as error:
            self._skip(step, str(error))
        except RayCkptError as error:
            self._skip(step, str(error))
            raise
        finally:
            self._link.courier.nudge()
            self.stall_s += time.monotonic() - began

    def remember(self, step: int, state: Any) -> None:
        """Snapshot this rank's share of the state for a restart alone, unless plan or memory are not at hand.

        Raises:
            StateError: the state cannot be saved.
        """
        due, began = time.time(), time.monotonic()
        try:
            layout, values = self._layouts.of(self._leaves_of(state))
            plan = self._link.logic.plan_ready if layout.fingerprint == self._fingerprint else None
            # With copies, one is not given up that has its copies for one that has none yet.
            loose = self._link.logic.loose if self._config.replicas else None
            segment = None if plan is None else self.slots.free(needed_nbytes(plan, layout, values), loose)
            if plan is not None and segment is None and needed_nbytes(plan, layout, values) > self.slots.nbytes:
                self.slots.grow(needed_nbytes(plan, layout, values) + _STRING_ROOM_NBYTES)
            if plan is None or segment is None:
                self._miss(step, "no plan is made for it" if plan is None else "all memory is in use")
                return
            save = self._save_id(step, plan, layout, "memory", due)
            try:
                take_snapshot(segment, plan, layout, values, save, keep=self._config.replicas == 0)
            except (StorageError, SaveError) as error:
                self._miss(step, str(error))
        finally:
            self._link.courier.nudge()
            self.stall_s += time.monotonic() - began

    def _miss(self, step: int, why: str) -> None:
        """Say it once: it comes again and again where saves take longer than the time between them."""
        self.missed += 1
        level = logging.WARNING if self.missed == 1 else logging.DEBUG
        logger.log(level, "rank %d: step %d is not kept in host memory: %s", self._link.rank, step, why)

    def _save(self, step: int, state: Any, trigger: Trigger, due: float) -> None:
        layout, values = self._layouts.of(self._leaves_of(state))
        if layout.fingerprint != self._fingerprint:
            if self._fingerprint is not None:
                # First the plan for what all ranks had registered: one for a mixture of old and new would fit nobody.
                self._plan(step, trigger)
            self._set_layout(layout)
        plan = self._plan(step, trigger)
        if plan is None:
            self._give_up()
            return
        nbytes = needed_nbytes(plan, layout, values)
        segment = self._memory(step, trigger, nbytes, plan)
        while segment is not None:
            try:
                take_snapshot(
                    segment, plan, layout, values, self._save_id(step, plan, layout, trigger, due),
                    full_digests=self._first,
                )  # fmt: skip
            except SegmentTooSmallError as error:
                # A string has grown between measuring and copying: another thread changes the state.
                segment = self._memory(step, trigger, 2 * error.needed_nbytes, plan)
                continue
            self._first = False
            with self._link.condition:
                self._link.logic.snapshotted(step, trigger)
                self._link.taken[step] = time.monotonic()
            if self._link.rank == 0:
                mib, ms = nbytes / (1 << 20), 1000 * (time.time() - due)
                logger.info("step %d: snapshot of %.1f MiB taken on this host in %.0f ms", step, mib, ms)
            return
        self._give_up()

    def _leaves_of(self, state: Any) -> Any:
        """The state as containers of leaves: what TensorFlow would save of its own checkpoint object."""
        return gather(state, self._link.rank) if is_trackable(state) else state

    def _plan(self, step: int, trigger: Trigger) -> RankPlan | None:
        """The plan for the registered layout; None if the snapshot is not needed any more."""
        logic = self._link.logic
        with self._link.condition:
            if logic.plan_ready is None:
                logic.await_plan(step)
                self._link.courier.nudge()
        self._link.wait(
            lambda: logic.plan_ready is not None or logic.is_off(step, trigger),
            self._config.save_timeout_s,
            f"the plan of who writes what at step {step}",
        )
        return logic.plan_ready

    def _memory(self, step: int, trigger: Trigger, nbytes: int, plan: RankPlan) -> Segment | None:
        """A free segment; None if the snapshot is not needed any more."""
        roomy = nbytes + max(_STRING_ROOM_NBYTES, int(_STRING_GROWTH * (nbytes - plan.fixed_nbytes)))
        if nbytes > self.slots.nbytes:
            self.slots.grow(roomy)
        found: list[Segment] = []

        def ready() -> bool:
            if self.slots.error is not None or self._link.logic.is_off(step, trigger):
                return True
            if nbytes > self.slots.nbytes:
                self.slots.grow(roomy)
            segment = self.slots.free(nbytes)
            found.extend([segment] if segment is not None else [])
            return segment is not None

        # Copies for restarts give way to a save that waits.
        self._link.courier.nudge()
        self._link.wait(ready, self._config.save_timeout_s, f"free snapshot memory ({nbytes} bytes) at step {step}")
        if not found and self.slots.error is not None:
            raise self.slots.error
        return found[0] if found else None

    def _save_id(self, step: int, plan: RankPlan, layout: Layout, trigger: Trigger, due: float) -> SaveId:
        generation = self._link.logic.generation
        assert generation is not None
        return SaveId(
            run=self._run,
            generation=generation,
            step=step,
            rank=self._link.rank,
            world_size=self._config.world_size,
            plan_id=plan.plan_id,
            trigger=trigger,
            fingerprint=layout.fingerprint,
            writers=len(plan.writers),
            writer_base=plan.writer_base,
            num_writers=plan.num_writers,
            due=due,
            directory=self._link.logic.directory,
        )

    def _skip(self, step: int, reason: str) -> None:
        logger.warning("rank %d could not snapshot step %d: %s", self._link.rank, step, reason)
        with self._link.condition:
            self._link.logic.skip(step, reason)

    def _give_up(self) -> None:
        with self._link.condition:
            self._link.logic.go_on()

    def _set_layout(self, layout: Layout) -> None:
        self._fingerprint = layout.fingerprint
        with self._link.condition:
            self._link.logic.set_layout(layout)
        self._link.courier.nudge()

    # -- off the training thread ------------------------------------------------------------------------

    def _on_view(self) -> None:
        plan = self._link.logic.plan_ready
        if plan is not None and plan.fixed_nbytes > self.slots.nbytes and self.slots.error is None:
            self.slots.grow(plan.fixed_nbytes + _STRING_ROOM_NBYTES)

    def _prepare(self, nbytes: int) -> list[str]:
        def ask() -> list[str]:
            paths: list[str] = self._link.courier.call(
                "prepare", self._link.rank, nbytes, self._config.slots, timeout_s=_PREPARE_S
            )
            return paths

        # An agent that dies while it is asked comes back, and what it has made already is there.
        again = Retrying(
            retry=retry_if_exception_type(RayActorError),
            stop=stop_after_delay(_RESTART_S),
            wait=wait_fixed(_PREPARE_AGAIN_S),
            reraise=True,
        )
        try:
            return again(ask)
        except RayCkptError:
            raise
        except Exception as error:
            raise UnavailableError(f"the agent of this host made no snapshot memory: {error}") from error

    def _notify(self) -> None:
        with self._link.condition:
            self._link.condition.notify_all()
        self._link.courier.nudge()
