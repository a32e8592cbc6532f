"""The coordinator as a Ray actor: the pure machine, its I/O in threads, its views as long polls."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray

from ray_ckpt.coordinator.clock import Clock
from ray_ckpt.coordinator.executor import Executor
from ray_ckpt.coordinator.leaving import cluster_nodes, leaving_nodes
from ray_ckpt.coordinator.names import hosts_with_agents
from ray_ckpt.coordinator.questions import Questions, Seen
from ray_ckpt.coordinator.threads import IoThreads
from ray_ckpt.errors import StorageError
from ray_ckpt.protocol.coordinator import CoordinatorLogic
from ray_ckpt.protocol.flows import Io, IoFailedError
from ray_ckpt.protocol.messages import HostReport, HostView, RunStatus, SaveOutcome
from ray_ckpt.storage import open_store

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_IDLE_TICK_S = 0.5
_PAUSE = 3.0
"""After a derivation, so many times what it took before the next: a quarter of a core at most."""
_IDLE_PAUSE = 20.0
"""The same where nothing has changed but the time."""
_ABANDONED_S = 600.0
"""Agents call every few seconds: when none has for so long, nobody will, whatever is left to do."""
_GC_THRESHOLDS = (10_000, 10, 100)
"""Millions of records that stay, nearly none in cycles: at Python's own pace collections take half of the time. Much
more seldom than this, what a save leaves in cycles (threads, errors) piles up to tens of MiB.
"""
_IO_THREADS = 8
_IO_TIMEOUT_S = 300.0
_NODES_S = 1.0
_NODES = 500
_LEAVING_S = 1.0
_LEAVING_TIMEOUT_S = 10.0
_NO_ANSWER_S = 5.0


class Coordinator:
    """Runs one epoch of `CoordinatorLogic`. Ray restarts it after a crash; it then claims a new epoch.

    The constructor does nothing that can fail: Ray takes an exception there for a permanent death.
    """

    def __init__(
        self, url: str, storage_options: Mapping[str, Any], *, single_coordinator: bool, lease_s: float
    ) -> None:
        logging.basicConfig(level=logging.INFO)
        self._url = url
        self._options = dict(storage_options)
        self._single_coordinator = single_coordinator
        self._lease_s = lease_s
        self._logic = CoordinatorLogic(url, f"{socket.gethostname()}:{os.getpid()}:{time.time_ns():x}")
        self._executor: Executor | None = None
        self._threads = IoThreads(_IO_THREADS)
        self._clock = Clock()
        self._changed = asyncio.Event()
        self._questions = Questions(self._logic.view)
        self._deriving: asyncio.TimerHandle | None = None
        self._derived_at = self._took_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_at = self._called_at = time.monotonic()
        # By itself: Ray starts it again after a crash, and then perhaps nobody calls.
        self._spawn(self._tick())

    # -- called by agents ---------------------------------------------------------------------------------

    async def exchange(self, report: HostReport, seen: Seen, wait_s: float, idle: bool = False) -> HostView | None:
        """Take a host's report in; answer with its view once that differs from the one ``seen``, or in ``wait_s``.

        None: there is no other view, or a newer question of the same host has come. An ``idle`` host only tells what
        lies in its memory: for its sake the directory is not taken over, which a newer job elsewhere may have.
        """
        if idle and self._executor is None:
            await asyncio.sleep(wait_s)
            return None
        self._start()
        if self._logic.take_in(report, self._clock.now()):
            self._derive_soon()
        if self._logic.roster.report(report.host) is not report:
            # From before: the agent that asks now has its own question open.
            await asyncio.sleep(wait_s)
            return None
        return await self._questions.ask(report.host, seen, wait_s)

    def _derive_soon(self) -> None:
        """Once for all reports that have come by then; with many workers only so often that time is left."""
        if self._deriving is None:
            wait_s = self._derived_at + _PAUSE * self._took_s - time.monotonic()
            self._deriving = asyncio.get_running_loop().call_later(max(wait_s, 0.0), self._derive)

    def _derive(self) -> None:
        self._deriving = None
        began = time.monotonic()
        try:
            self._logic.derive(self._clock.now())
        except Exception:
            # Without further derivations no deadline would pass and the actor would never end.
            logger.exception("%s: the coordinator goes on after an unexpected error", self._url)
        self._took_s = time.monotonic() - began
        self._publish()
        self._derived_at = time.monotonic()

    # -- called by drivers and the command line -----------------------------------------------------------

    async def request_save(self, request_id: str, reason: str, wait_s: float) -> SaveOutcome | None:
        """Ask for a save; its outcome, None if there is none within ``wait_s``. May be repeated with the same id."""
        self._start()
        self._logic.request_save(request_id, reason, self._clock.now())
        self._publish()
        deadline = time.monotonic() + wait_s
        while request_id not in self._logic.cut.request_outcomes:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return None
        return self._logic.cut.request_outcomes[request_id]

    async def request_stop(self, reason: str) -> None:
        """Have all workers save and stop at one step."""
        self._start()
        self._logic.request_stop(reason, self._clock.now())
        self._publish()

    async def status(self) -> RunStatus:
        """What is going on."""
        self._start()
        return self._logic.status()

    async def pid(self) -> int:
        """The process that runs this actor."""
        return os.getpid()

    # -- the machine --------------------------------------------------------------------------------------

    def _start(self) -> None:
        """On every call from outside; the first one begins the work."""
        self._called_at = time.monotonic()
        if self._executor is not None:
            return
        store = open_store(self._url, storage_options=self._options, single_coordinator=self._single_coordinator)
        gc.set_threshold(*_GC_THRESHOLDS)
        planner = self._logic.planner
        self._executor = Executor(
            store, lambda save: planner.plan_of(save.segments), agents=lambda: hosts_with_agents(self._url)
        )
        self._logic.start(self._clock.now())
        self._spawn(self._watch_nodes())
        self._spawn(self._watch_leaving())

    async def _watch_nodes(self) -> None:
        """Hear of hosts that are gone, from whom nobody else would say so."""
        while True:
            # Ray lists all nodes in one answer: of many, less often.
            await asyncio.sleep(_NODES_S * (1 + len(self._logic.roster.hosts) // _NODES))
            if self._logic.idle:
                continue
            try:
                nodes = await self._threads.run(_LEAVING_TIMEOUT_S, "Ray's list of nodes", cluster_nodes)
            except Exception as error:
                logger.debug("%s: which nodes are alive is not known: %r", self._url, error)
                continue
            if self._logic.on_nodes(nodes, self._clock.now()):
                self._publish()

    async def _watch_leaving(self) -> None:
        """Hear of hosts that are about to go."""
        trouble = ""
        while True:
            await asyncio.sleep(_NO_ANSWER_S if trouble else _LEAVING_S)
            if self._logic.idle:
                continue
            try:
                leaving = await self._threads.run(_LEAVING_TIMEOUT_S, "Ray's list of draining nodes", leaving_nodes)
                if self._logic.on_leaving(leaving, self._clock.now()):
                    self._publish()
                trouble = ""
            except AttributeError as error:
                logger.warning("%s: no save ahead of a drain, which this Ray does not tell of: %s", self._url, error)
                return
            except Exception as error:
                level = logging.DEBUG if trouble == repr(error) else logging.WARNING
                trouble = repr(error)
                logger.log(level, "%s: whether nodes are being drained is not known: %s", self._url, trouble)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _pump(self) -> None:
        """Start what the machine wants done."""
        for io_id, io in self._logic.take():
            self._spawn(self._run(io_id, io))

    def _publish(self) -> None:
        """After conclusions have been drawn: act, and answer those for whom there is news."""
        self._pump()
        self._questions.forget(self._logic.take_forgotten())
        self._questions.answer(self._logic.views.take_changed())
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self, io_id: int, io: Io) -> None:
        assert self._executor is not None
        what = type(io).__name__
        try:
            result = await self._threads.run(_IO_TIMEOUT_S, what, self._executor.run, io)
        except StorageError as error:
            result = IoFailedError(str(error))
        except Exception as error:
            logger.exception("%s: %s failed unexpectedly", self._url, what)
            result = IoFailedError(f"{type(error).__name__}: {error}")
        if isinstance(result, IoFailedError):
            logger.warning("%s: %s: %s", self._url, what, result)
        try:
            self._logic.answered(io_id, result, self._clock.now())
            self._pump()
            self._derive_soon()
        except Exception:
            # The flow that waited for this answer is lost, and with it a save: the next process begins anew.
            logger.exception("%s: the coordinator ends: it failed at the answer to %s", self._url, what)
            os._exit(1)

    async def _tick(self) -> None:
        """Keep the machine's time; end what nobody needs: a leaked actor would keep its node from scaling down."""
        while True:
            busy = self._logic.busy
            await asyncio.sleep(_TICK_S if busy else _IDLE_TICK_S)
            self._clock.now()
            paused_s = time.monotonic() - self._derived_at
            if self._executor is not None and (busy or paused_s > _IDLE_PAUSE * self._took_s):
                self._derive_soon()
            if self._executor is not None and not self._logic.idle:
                self._busy_at = time.monotonic()
            fenced = self._logic.ledger.phase == "fenced"
            now = time.monotonic()
            if fenced or now - self._busy_at > self._lease_s or now - self._called_at > _ABANDONED_S:
                try:
                    await self._end("it was fenced" if fenced else "no job is left")
                except Exception as error:
                    logger.info("%s: the coordinator cannot end yet: %r", self._url, error)
                    continue
                return

    async def _end(self, why: str) -> None:
        """End for good. Who still needs a coordinator starts the next one, which reads in the log whose turn it is.

        Where this host was cut off, Ray may have started the actor again elsewhere: that one must live.
        """
        nodes = await self._threads.run(_LEAVING_TIMEOUT_S, "Ray's list of nodes", cluster_nodes)
        context = ray.get_runtime_context()
        logger.info("%s: the coordinator ends: %s", self._url, why)
        if context.get_node_id() in nodes.dead:
            os._exit(1)
        ray.kill(context.current_actor, no_restart=True)


def remote_coordinator(**options: Any) -> Any:
    """The actor class with these Ray options. Its own CPU share is zero: it mostly waits.

    A byte of memory is asked for since Ray heeds a soft affinity only for actors that ask for something.
    """
    return ray.remote(Coordinator).options(num_cpus=0, memory=1, max_restarts=-1, max_task_retries=0, **options)
