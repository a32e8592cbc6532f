"""The pool of Ray writer tasks on one host: pinned to it, warmed up, never retried by Ray.

A retry by Ray would write the same path again; the agent retries under the next shard number instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.errors import RayCkptError, SaveError, StorageError
from ray_ckpt.storage import Store
from ray_ckpt.types import ShardReport
from ray_ckpt.writer import write_shard

logger = logging.getLogger(__name__)

_END_S = 5.0


def _warm_up(store: Store) -> str:
    """Have a writer process started, with everything imported that a shard needs."""
    return store.url


class WriterPool:
    """Submits `write_shard` to this host; falls back to this process where the host takes no tasks any more."""

    def __init__(self, node_id: str, store: Store) -> None:
        options = {
            "num_cpus": 0,
            "max_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        self._store = store
        self._write = ray.remote(write_shard).options(name="ray_ckpt.write_shard", **options)
        self._warming: list[Any] = []
        self._warm = ray.remote(_warm_up).options(name="ray_ckpt.warm_up", **options)

    def warm_up(self, writers: int) -> None:
        """Start the processes of the pool in the background, unless they are starting already."""
        if self._warming and len(ray.wait(self._warming, num_returns=len(self._warming), timeout=0)[1]):
            return
        self._warming = [self._warm.remote(self._store) for _ in range(writers)]

    async def write(self, path: str, *, timeout_s: float, **arguments: Any) -> ShardReport:
        """One try of one shard, which may take ``timeout_s`` beside one operation of the store: that one tells more.

        A try that is late, or whose caller is cancelled, has its process killed before this returns.

        Raises:
            SaveError: the snapshot is not there any more.
            StorageError: the try failed; another may work.
        """
        task = self._write.remote(path, store=self._store, **arguments)
        timeout_s += self._store.timeout_s
        try:
            report: ShardReport = await asyncio.wait_for(task, timeout_s)
            return report
        except asyncio.CancelledError:
            await _end(task)
            raise
        except asyncio.TimeoutError:
            await _end(task)
            raise StorageError(f"the writer was not done after {timeout_s:.0f} s and has been ended") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SaveError):
                raise cause from None
            raise StorageError(str(cause)) from None
        except TaskUnschedulableError:
            logger.warning("this host takes no tasks any more: the agent writes %s itself", path)
            return await self._write_here(path, timeout_s, arguments)
        except WorkerCrashedError as error:
            raise StorageError(f"the writer process died: {error}") from None
        except RayError as error:
            raise StorageError(f"the writer task failed: {error}") from None

    async def _write_here(self, path: str, timeout_s: float, arguments: dict[str, Any]) -> ShardReport:
        loop = asyncio.get_running_loop()
        written = loop.run_in_executor(None, lambda: write_shard(path, store=self._store, **arguments))
        done, _ = await asyncio.wait([written], timeout=timeout_s)
        if not done:
            raise StorageError(f"the agent was not done with the shard after {timeout_s:.0f} s")
        try:
            return written.result()
        except RayCkptError:
            raise
        except OSError as error:
            raise StorageError(str(error)) from error


async def _end(task: Any) -> None:
    """Kill the task's process and wait until it is gone; not for long: one that hangs in the kernel stays."""

    async def ended() -> None:
        with contextlib.suppress(RayError):
            await task

    ray.cancel(task, force=True)
    await asyncio.wait([asyncio.ensure_future(ended())], timeout=_END_S)
