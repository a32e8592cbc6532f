"""The agent of one host as a Ray actor: owns the snapshot memory, has it written, speaks for its workers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.agent import notices
from ray_ckpt.agent.hedge import Hedge
from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.agent.mirror import mirror
from ray_ckpt.agent.pool import WriterPool
from ray_ckpt.agent.serving import RemoteSource, read_piece
from ray_ckpt.agent.watch import when_ended
from ray_ckpt.agent.wire import Door, Server
from ray_ckpt.coordinator import find, find_agent, find_or_start, living_nodes, run_id
from ray_ckpt.errors import ObjectMissingError, StorageError, UsageError
from ray_ckpt.protocol.host import Free, HostLogic, Keep, Mirror, StartWrite
from ray_ckpt.protocol.messages import HostView, SegmentInfo, WorkerReport, WorkerView
from ray_ckpt.restore import Part
from ray_ckpt.snapshot import ProcessId
from ray_ckpt.storage import open_store
from ray_ckpt.types import Layout, ShardReport

logger = logging.getLogger(__name__)

_AGAIN_S = 1.0
_LOOK_S = 2.0
"""Deaths and snapshots are told of; this is for those of which no word came."""
_NOTICE_S = 2.0
_TAKE_OVER_S = 10.0
_DEBOUNCE_S = 0.005
_ROOM_S = 60.0
_ROOM_AGAIN_S = 0.2
_REPLICA_S = 120.0
"""Memory for copies of which the next does not come for so long is given back."""
_WRITE_S = 60.0
_SLOWEST = 1e6
"""Bytes a second: a writer that is slower hangs."""

WorkerAnswer = tuple[int, int, WorkerView]
"""(epoch, version, view) of the coordinator for one worker."""


class Agent:
    """Runs `HostLogic`. Ray restarts it after a crash; segments, try counters and layouts lie in tmpfs."""

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any],
        *,
        node_id: str,
        single_coordinator: bool,
        max_writes: int,
        memory_folder: str | None,
        lease_s: float,
        recover_s: float,
    ) -> None:
        logging.basicConfig(level=logging.INFO)
        self._url = url
        self._options = dict(storage_options)
        self._single_coordinator = single_coordinator
        self._node_id = node_id
        self._folder = memory_folder
        self._lease_s = lease_s
        self._recover_s = recover_s
        self._logic = HostLogic(node_id, "", name=socket.gethostname(), max_writes=max_writes)
        self._processes: dict[str, ProcessId] = {}
        self._coordinator: Any = None
        self._looking = asyncio.Lock()
        self._memory: HostMemory | None = None
        self._pool: WriterPool | None = None
        self._server: Server | None = None
        self._mirrors: dict[int, asyncio.Lock] = {}
        self._hedge = Hedge()
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_at = time.monotonic()
        self._draining = self._deaf = False
        # By itself: Ray starts it again after a crash, and then perhaps nobody calls, but snapshots lie there.
        self._spawn(self._start_alone())

    # -- called by the workers of this host ------------------------------------------------------------------

    async def sync(self, report: WorkerReport, pid: int, seen: tuple[int, int], wait_s: float) -> WorkerAnswer | None:
        """Take a worker's report in; answer with what concerns it once newer than ``seen``, or in ``wait_s``."""
        self._start()
        if report.worker not in self._processes:
            self._processes[report.worker] = ProcessId.of(pid)
            when_ended(pid, self._look_around)
        if report.layout is not None:
            self._memory_now.keep_layout(report.layout)
        self._logic.on_worker(report)
        self._look()
        if report.finished and report.rank not in self._living(report.worker):
            # At once: a cluster that was started for this job alone may end, and this process with it.
            give_back = partial(self._memory_now.give_back, report.rank, closed=report.closed)
            await asyncio.get_running_loop().run_in_executor(None, give_back)
        deadline = time.monotonic() + wait_s
        while True:
            answer = self._logic.worker_view(report.worker)
            if answer is not None and answer[:2] > seen:
                return answer
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return None

    async def prepare(self, rank: int, nbytes: int, slots: int) -> list[str]:
        """Make and warm a rank's snapshot memory; the files to map."""
        self._start()
        if self._pool is not None:
            # Once more, late: Ray ends idle processes after seconds.
            self._pool.warm_up(self._logic.max_writes)
        memory, deadline = self._memory_now, time.monotonic() + _ROOM_S
        while True:
            try:
                return await asyncio.to_thread(memory.prepare, rank, nbytes, slots, self._living())
            except StorageError:
                # What is kept for restarts makes room, once nobody on this or another host reads it any more.
                if self._restored:
                    if not await asyncio.to_thread(memory.give_up_kept):
                        raise
                elif time.monotonic() > deadline:
                    raise
                else:
                    await asyncio.sleep(_ROOM_AGAIN_S)

    # -- called by other hosts, and by workers that restore ----------------------------------------------------

    async def holds(self) -> bool:
        """Whether a snapshot lies here that a restart may want."""
        self._start()
        return bool(self._memory_now.sealed())

    async def parts(self, save: tuple[int, int], directory: str) -> tuple[Door | None, list[Part]]:
        """What lies here of a directory's save, and where it can be read; None: through `read` alone."""
        self._start()
        if self._server is None:
            try:
                self._server = Server(ray.util.get_node_ip_address(), self._memory_now.read)
            except OSError as error:
                logger.warning("%s: snapshots can be read through Ray's calls only: %s", self._url, error)
        door = self._server.door if self._server is not None else None
        return door, await asyncio.to_thread(self._memory_now.parts, save, directory)

    async def layout(self, fingerprint: str) -> Layout | None:
        """A layout that snapshots here were taken of."""
        self._start()
        return await asyncio.to_thread(self._memory_now.layout, fingerprint)

    async def read(self, path: str, fills: int, start: int, nbytes: int) -> tuple[Any, int] | None:
        """For hosts to which the door is shut: bytes of a snapshot and their crc32c; None where it has gone."""
        self._start()
        return await asyncio.to_thread(read_piece, self._memory_now, path, fills, start, nbytes)

    async def mirror(self, source: str, segment: SegmentInfo, bytes_per_s: float | None) -> None:
        """Copy a snapshot from the memory of host ``source``, unless that is done. Raises as `mirror.mirror`."""
        self._start()
        async with self._mirrors.setdefault(segment.rank, asyncio.Lock()):
            self._look()
            if not self._logic.has_copy(segment):
                await self._mirror(source, segment, bytes_per_s)

    async def _mirror(self, source: str, segment: SegmentInfo, bytes_per_s: float | None) -> None:
        agent = await asyncio.to_thread(find_agent, self._url, source)
        door, parts = await agent.parts.remote(segment.save, segment.directory)
        part = next((p for p in parts if Path(p.path).name == segment.name), None)
        layout = await agent.layout.remote(segment.fingerprint)
        if part is None or layout is None:
            raise ObjectMissingError(f"host {source} has no snapshot of rank {segment.rank} of step {segment.step}")
        remote = RemoteSource(agent, door, part, source)
        await asyncio.to_thread(mirror, self._memory_now, part, layout, remote, bytes_per_s)
        # With the layout: a coordinator that starts once the other host is lost has it from nobody else.
        self._logic.on_segments(self._memory_now.sealed(), {layout.fingerprint: layout})
        self._look()

    def _living(self, but: str = "") -> set[int]:
        """The ranks of the processes on this host, but for one worker's."""
        return {
            r.rank
            for worker, r in self._logic.workers.items()
            if worker != but and not r.finished and self._lives(worker)
        }

    def _lives(self, worker: str) -> bool:
        process = self._processes.get(worker)
        return process is not None and process.alive

    async def pid(self) -> int:
        """The process that runs this actor."""
        return os.getpid()

    # -- the machine --------------------------------------------------------------------------------------------

    @property
    def _restored(self) -> bool:
        """Whether all ranks of the job have read what they start from, as far as its workers here were told."""
        view = self._logic.view
        living = [w for w in view.workers if self._lives(w.worker)] if view is not None else []
        return bool(living) and all(w.restore_done or w.refused for w in living)

    @property
    def _memory_now(self) -> HostMemory:
        assert self._memory is not None, "the agent has not been started"
        return self._memory

    def _start(self) -> None:
        """Not in the constructor: Ray takes an exception there for a permanent death."""
        if self._pool is not None:
            return
        if self._memory is None:
            memory = HostMemory.open(run_id(self._url), self._node_id, self._folder)
            self._logic.incarnation = memory.next_incarnation()
            self._memory = memory
            self._logic.on_segments(memory.sealed(), memory.layouts())
            asyncio.get_running_loop().run_in_executor(None, memory.sweep)
        store = open_store(self._url, storage_options=self._options, single_coordinator=self._single_coordinator)
        self._pool = WriterPool(self._node_id, store)
        self._pool.warm_up(self._logic.max_writes)
        for work in (
            self._ask,
            self._watch,
            self._take_over,
            *([self._heed_notices] if notices.on_compute_engine() else []),
        ):
            self._spawn(self._keep_doing(work))

    async def _start_alone(self) -> None:
        """Start without a call; end where that fails and nobody needs this agent."""
        while self._pool is None:
            await asyncio.sleep(_AGAIN_S)
            try:
                self._start()
            except Exception as error:
                logger.warning("%s: the agent cannot start yet: %r", self._url, error)
                self._end_if_idle()

    def _end_if_idle(self) -> None:
        recoverable = self._logic.recoverable
        if not self._logic.idle:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > (self._recover_s if recoverable else self._lease_s):
            if self._server is not None:
                self._server.close()
            if self._memory is not None and not recoverable:
                self._memory.remove()
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _keep_doing(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeat for ever; an error that nobody thought of must not silence the host for good."""
        while True:
            try:
                await work()
            except Exception:
                logger.exception("%s: the agent goes on after an unexpected error", self._url)
                await asyncio.sleep(_AGAIN_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _look(self) -> None:
        """Look at the memory and act; always after the workers' reports have been taken in."""
        self._logic.on_segments(self._memory_now.sealed())
        self._act()
        if self._logic.news:
            self._news.set()

    def _act(self) -> None:
        for action in self._logic.take():
            if isinstance(action, Free):
                self._memory_now.free(action.segment, self._living())
                self._logic.on_freed(action.segment.name)
            elif isinstance(action, Keep):
                self._memory_now.keep(action.segment)
            elif isinstance(action, Mirror):
                self._spawn(self._have_mirrored(action))
            else:
                self._spawn(self._write(action))

    async def _have_mirrored(self, action: Mirror) -> None:
        segment, whole = action.segment, False
        rates = [w.config.replica_bytes_per_s for w in self._logic.workers.values() if w.rank == segment.rank]
        rate = rates[0] if rates else None
        try:
            nbytes = self._memory_now.nbytes(segment.name)
            limit_s = _WRITE_S + nbytes / min(rate or _SLOWEST, _SLOWEST)
            peer = await asyncio.to_thread(find_agent, self._url, action.peer)
            await asyncio.wait_for(peer.mirror.remote(self._node_id, segment, rate), limit_s)
            whole = True
        except Exception as error:
            # Whatever it is: as long as it counts as under way, nothing else is copied.
            cause = getattr(error, "cause", None) or error
            logger.warning(
                "step %d of rank %d has no replica on host %s: %r", segment.step, segment.rank, action.peer, cause
            )
        self._logic.on_mirrored(segment, whole=whole)
        self._look()

    async def _write(self, start: StartWrite) -> None:
        order = start.order
        what = f"shard of writer {start.writer} (rank {start.segment.rank}) of step {order.step} on {self._logic.name}"
        tries: list[int] = []

        def next_try() -> Coroutine[Any, Any, ShardReport] | None:
            if tries and tries[-1] + 1 >= order.max_tries:
                return None
            tries.append(self._memory_now.next_try(start.segment.name, start.local, order.epoch))
            return self._write_try(start, tries[-1]) if tries[-1] < order.max_tries else None

        try:
            nbytes = self._memory_now.nbytes(start.segment.name) // start.segment.writers
            try:
                report = await self._hedge.write(what, nbytes, next_try)
            except StorageError as error:
                final = tries[-1] + 1 >= order.max_tries
                left = "no try is left" if final else "trying again under another name"
                logger.warning("%s: %s; %s", what, error, left)
                self._logic.on_write_failed(start, str(error), final=final)
            else:
                self._logic.on_written(start, report)
        except Exception as error:
            # Whatever it is, the save must hear of it: a writer that is neither at work nor done would hold it up.
            logger.warning("%s: %r", what, error)
            self._logic.on_write_failed(start, str(error) or repr(error), final=True)
        self._look()

    async def _write_try(self, start: StartWrite, attempt_try: int) -> ShardReport:
        assert self._pool is not None
        order = start.order
        return await self._pool.write(
            self._memory_now.path(start.segment.name),
            timeout_s=_WRITE_S + self._memory_now.nbytes(start.segment.name) / _SLOWEST,
            generation=order.generation,
            step=order.step,
            plan_id=order.plan_id,
            writer=start.local,
            prefix=order.prefix,
            shard_id=start.shard_id(attempt_try),
            num_shards=order.num_shards,
            attempt=order.attempt,
            attempt_try=attempt_try,
        )

    # -- the coordinator -------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Always have one question open, so that decisions arrive at once.

        With news, several together where they come fast, ask anew: that ends the older question.
        """
        self._news.clear()
        began = time.monotonic()
        asked = asyncio.ensure_future(self._exchange())
        self._tasks.add(asked)
        asked.add_done_callback(self._asked)
        news = asyncio.ensure_future(self._news.wait())
        await asyncio.wait({asked, news}, return_when=asyncio.FIRST_COMPLETED)
        news.cancel()
        if not asked.done():
            # The first news at once. While there is no coordinator, no more often than it is looked for.
            asked_s = time.monotonic() - began
            await asyncio.sleep(max(_DEBOUNCE_S - asked_s, 0.0) if self._coordinator is not None else _AGAIN_S)
        elif asked.exception() is not None:
            await asyncio.sleep(_AGAIN_S)

    def _asked(self, asked: asyncio.Task[None]) -> None:
        """A question has ended, perhaps one that a newer one has taken the place of."""
        self._tasks.discard(asked)
        if not asked.cancelled() and (error := asked.exception()) is not None:
            logger.error("%s: the agent goes on after an unexpected error", self._url, exc_info=error)

    async def _exchange(self) -> None:
        known = self._logic.view
        seen = (known.epoch, known.version) if known else (0, -1)
        asked = None
        try:
            if self._coordinator is None and not await self._look_for_coordinator():
                await asyncio.sleep(_AGAIN_S)
                return
            asked = self._coordinator
            wait_s = known.poll_s if known else _AGAIN_S
            view: HostView | None = await asked.exchange.remote(self._logic.report(), seen, wait_s, self._logic.idle)
        except RayError as error:
            # Ray is restarting it, or it is gone for good and the next look-up starts another.
            logger.warning("the coordinator of %s does not answer: %s", self._url, error)
            if self._coordinator is asked:
                self._coordinator = None
            await asyncio.sleep(_AGAIN_S)
            return
        if view is not None:
            self._logic.on_view(view)
            self._act()
            self._changed.set()
            self._changed = asyncio.Event()

    async def _look_for_coordinator(self) -> bool:
        """Whether there is one now. One thread looks: where Ray's GCS is away, that takes until it is back."""
        if self._looking.locked():
            return False
        async with self._looking:
            if self._logic.idle:
                # Nobody here needs one: to start it would take the directory from a newer job. But that may want to
                # know what lies here.
                try:
                    self._coordinator = await asyncio.to_thread(find, self._url)
                except UsageError:
                    return False
            else:
                start = partial(find_or_start, single_coordinator=self._single_coordinator)
                self._coordinator = await asyncio.to_thread(start, self._url, self._options)
        return True

    async def _watch(self) -> None:
        """Notice what nobody has told of, and the end of the run."""
        await asyncio.sleep(_LOOK_S)
        self._look_around()
        await asyncio.to_thread(self._memory_now.give_up_replicas, time.time() - _REPLICA_S)
        self._end_if_idle()

    async def _take_over(self) -> None:
        """What others still held when this agent came: a node that was just dying, a process of the start before."""
        await asyncio.sleep(_TAKE_OVER_S)
        memory = self._memory_now
        if await asyncio.to_thread(lambda: memory.has_others and memory.take_over(living_nodes())):
            self._logic.on_segments(memory.sealed(), memory.layouts())
            self._look()

    async def _heed_notices(self) -> None:
        """Have Ray drain this host once its machine is about to be taken away; the coordinator hears of it from Ray."""
        await asyncio.sleep(_NOTICE_S)
        if self._logic.idle or self._draining:
            return
        try:
            notice = await asyncio.to_thread(notices.read_notice)
            if notice is not None:
                logger.warning("%s, in about %.0f s: draining the node", notice.text, notice.left_s)
                await asyncio.to_thread(notices.drain, self._node_id, notice)
                self._draining = True
            self._deaf = False
        except OSError as error:
            # Once: it may go on for days, and must be asked again all the same.
            logger.log(
                logging.DEBUG if self._deaf else logging.WARNING,
                "%s: whether this host is about to be preempted is not known: %s", self._url, error,
            )  # fmt: skip
            self._deaf = True

    def _look_around(self) -> None:
        """Notice workers that died, and segments that were sealed without a word."""
        for worker, process in self._processes.items():
            if not process.alive:
                self._logic.on_worker_dead(worker)
        self._look()
