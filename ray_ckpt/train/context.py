"""What Ray Train says about this process: its rank, the number of workers, and where the run lies."""

from __future__ import annotations

import posixpath
import sys
from typing import Any

from ray_ckpt.errors import UsageError
from ray_ckpt.train.place import Place, place_of

FOLDER = "ray_ckpt"
"""Where in Ray Train's experiment directory the checkpoints lie."""

_BY_HAND = "give Checkpointer the run's directory or URL as its first argument"


def find_context() -> Any:
    """The `ray.train.TrainContext` of this worker; None where this process is no worker of Ray Train."""
    if "ray.train" not in sys.modules:
        # Its workers have imported it; others need not pay for that.
        return None
    import ray.train

    try:
        context = ray.train.get_context()
    except (RuntimeError, DeprecationWarning):
        # Outside of a training function, or in a function of Ray Tune.
        return None
    return None if not is_v2(context) and _is_v1_outside() else context


def is_v2(context: object) -> bool:
    """Whether it is a context of Ray Train V2, the only one with one storage and pairing of reports for all ranks."""
    return type(context).__module__.startswith("ray.train.v2.")


def is_local(context: object) -> bool:
    """Whether it is Ray Train's local mode (``num_workers=0``): the training function runs in the driver itself."""
    return type(context).__name__ == "LocalTrainContext"


def _is_v1_outside() -> bool:
    """V1 gives a context to every process, which calls itself rank 0 of 1 where it knows nothing."""
    from ray.train._internal.session import get_session

    return get_session() is None


def identity() -> tuple[int, int] | None:
    """(rank, world size) of this worker of Ray Train; None where it is none.

    Raises:
        UsageError: it is one, but its context is incomplete.
    """
    context = find_context()
    if context is None:
        return None
    try:
        return int(context.get_world_rank()), int(context.get_world_size())
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UsageError(
            f"this worker of Ray Train does not know its rank ({error!r}): make the Checkpointer in the training "
            "function, or give rank= and world_size="
        ) from error


def home() -> Place:
    """The run's directory, ``<experiment directory>/ray_ckpt``: one for all attempts and all fits of a name.

    Raises:
        UsageError: this is no worker of Ray Train, its version is too old, or its storage has no URL.
    """
    context = find_context()
    if context is None:
        raise UsageError(
            "Checkpointer() without a URL takes the run's directory from Ray Train, but this process is not in a "
            f"training function of trainer.fit(): {_BY_HAND}"
        )
    check_v2(context, "Checkpointer() without a URL")
    try:
        storage = context.get_storage()
        filesystem, path = storage.storage_filesystem, storage.experiment_fs_path
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise UsageError(
            f"Ray Train does not tell this worker where the run is stored ({error!r}; with num_workers=0 it has no "
            f"storage): {_BY_HAND}"
        ) from error
    try:
        return place_of(filesystem, posixpath.join(path, FOLDER))
    except UsageError as error:
        raise UsageError(f"rank {context.get_world_rank()}: {error}; {_BY_HAND}") from None


def check_v2(context: object, what: str) -> None:
    """Raise `UsageError` where Ray Train is V1; ``what`` is the call that needs V2."""
    if is_v2(context):
        return
    import ray

    raise UsageError(
        f"{what} needs Ray Train V2, but this is V1 (Ray {ray.__version__}): set RAY_TRAIN_V2_ENABLED=1 in the "
        "environment of the process that calls fit(), with Ray 2.48 or newer; or give Checkpointer a URL, and call "
        "ray.train.report() yourself"
    )
