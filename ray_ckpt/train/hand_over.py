"""The end of a training function after a preemption: all is committed, and Ray Train shall start it again."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError

from ray_ckpt.errors import PreemptedError
from ray_ckpt.train.context import find_context, is_local, is_v2


class _PreemptedInRayTrain(PreemptedError, RayActorError):  # type: ignore[misc]
    """Counted by Ray Train as a preemption (``max_preemption_failures``), not as a failure of the training function.

    Ray Train takes from ``max_failures`` what a training function raises, also after its own notice of the drain
    (`TrainController._handle_preempting_state`), unless it is the loss of a preempted actor.
    """

    def __init__(self, text: str) -> None:
        RayActorError.__init__(self, error_msg=text, preempted=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # The controller of the run reads it, where this package need not be installed.
        return RayActorError, (None, f"PreemptedError: {self.error_msg}", False, True)


def hand_over(url: str, step: int | None, reason: str) -> None:
    """In a worker of Ray Train raise `PreemptedError`, so that it starts the run again elsewhere; else do nothing.

    Nothing either in its local mode and in V1, which start nothing again for a preemption.
    To be called on every rank when all is committed and reported: a training function that returned would have
    succeeded, as Ray Train sees it. ``step`` is the last one that was committed, ``reason`` why the host goes.

    Raises:
        PreemptedError: Ray Train restarts the workers on hosts that stay, and takes it from
            ``FailureConfig.max_preemption_failures`` (unlimited by default); a Ray without that setting from
            ``max_failures``.
    """
    context = find_context()
    if context is None or not is_v2(context) or is_local(context):
        return
    kept = "nothing was committed, so it begins anew" if step is None else f"it goes on from step {step}"
    raise _PreemptedInRayTrain(f"{url}: {reason}; Ray Train starts the run again, and {kept}")
