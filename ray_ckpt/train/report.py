"""`Checkpointer.report`: Ray Train's report, with a pointer to the newest committed checkpoint."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

from ray_ckpt.errors import RayCkptError, UsageError
from ray_ckpt.train.context import check_v2, find_context, is_local
from ray_ckpt.train.pointer import Pointer, from_train, write

logger = logging.getLogger(__name__)


class Reporter:
    """The reports of one start of the job on one rank; all ranks report equally often."""

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None
        self._attached: Pointer | None = None
        # Ray Train counts directories by name, and deletes them by it: those of another run, or of an emptied one, too.
        self._unique = uuid.uuid4().hex[:6]

    @property
    def used(self) -> bool:
        """Whether `report` was called: equal on all ranks, as it waits for all."""
        return self._last is not None

    def report(self, metrics: Mapping[str, Any], newest: Pointer | None, start: int | None) -> None:
        """Call `ray.train.report` once; Ray Train's rank 0 attaches ``newest`` if it has not been attached yet.

        ``start`` is the present generation, which the directory of the pointer is named after.

        Raises:
            UsageError: not in a worker of Ray Train V2, or metrics that are no mapping from names.
        """
        context = find_context()
        if context is None:
            raise UsageError(
                "ckpt.report() calls ray.train.report(), which works in a training function of trainer.fit() only: "
                "outside of Ray Train there is nobody to report to"
            )
        check_v2(context, "ckpt.report()")
        if not isinstance(metrics, Mapping):
            raise UsageError(f"ckpt.report() takes a dict of metrics by name, found {metrics!r}")
        attaches = context.get_world_rank() == 0
        if attaches and not self.used:
            self._attached = _registered()
        if attaches and newest is not None and newest != self._attached:
            self._attach(dict(metrics), newest, start, keep=is_local(context))
            self._attached = newest
        else:
            _report(dict(metrics))
        self._last = dict(metrics)

    def finish(self, newest: Pointer | None, start: int | None) -> None:
        """After `report` was used: report the last metrics again, so that the last commit is attached."""
        if self._last is not None:
            self.report(self._last, newest, start)

    def _attach(self, metrics: dict[str, Any], pointer: Pointer, start: int | None, keep: bool) -> None:
        """``keep``: the local mode stores nothing, so the directory itself becomes ``result.checkpoint``."""
        import ray.train

        name = f"checkpoint_{pointer.step:012d}_{pointer.generation}_{start or 0}_{self._unique}"
        if keep:
            folder = tempfile.mkdtemp(prefix=f"{name}_")
            write(pointer, folder)
            _report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            return
        with tempfile.TemporaryDirectory(prefix=f"{name}_") as folder:
            write(pointer, folder)
            _report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
        logger.info("Ray Train's checkpoint %s points to step %d in %s", name, pointer.step, pointer.url)


def _report(metrics: dict[str, Any], **more: Any) -> None:
    import ray.train

    ray.train.report(metrics, **more)


def _registered() -> Pointer | None:
    """What an earlier attempt or fit attached last."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    try:
        return None if checkpoint is None else from_train(checkpoint)
    except RayCkptError as error:
        logger.info("Ray Train's latest checkpoint is not one of ckpt.report(): %s", error)
        return None
