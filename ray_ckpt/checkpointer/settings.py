"""The user's settings, checked: who this worker is, when to save, what to keep."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import ray

from ray_ckpt.errors import UsageError
from ray_ckpt.protocol.messages import JobConfig
from ray_ckpt.train import home, identity


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines in seconds; every wait has one and names who is late when it passes.

    ``start_s``: for all workers to join and to have restored. ``save_s``: for a save to commit; then it is abandoned.
    ``settle_s``: for the saves of a start that is over, before a new start chooses what to restore. ``host_s``: for
    a host to be heard of. ``recover_s``: so long the agents of a job that was killed wait with its snapshots for the
    next start; it keeps an autoscaler from taking their hosts away.
    """

    start_s: float = 600.0
    save_s: float = 1800.0
    settle_s: float = 120.0
    host_s: float = 30.0
    recover_s: float = 300.0


START_VARIABLE = "RAY_CKPT_START"
"""A text that all workers of one start of the job share and that rises from start to start, a time for one.

Optional: with it, a process of an older start that was never told to go cannot be taken for a rank of a newer one.
"""

DEFAULT_TIMEOUTS = Timeouts()

_COUNTS = "world_size save_steps memory_steps stride slots max_tries max_failures max_to_keep keep_every_steps"
_TIMES = "save_secs replica_bytes_per_s keep_every_hours save_timeout_s settle_timeout_s host_timeout_s"
_WHOLE = frozenset(_COUNTS.split())
_POSITIVE = _WHOLE | frozenset(_TIMES.split())
_OVERLAPS = ("wait", "skip", "coalesce")
_ARGUMENTS = {
    "slots": "snapshots",
    "save_timeout_s": "timeouts.save_s",
    "settle_timeout_s": "timeouts.settle_s",
    "host_timeout_s": "timeouts.host_s",
}
"""What users call some of the job's settings."""


def configured(timeouts: Timeouts, **settings: Any) -> JobConfig:
    """What all ranks must share: these fields of `JobConfig`, and the deadlines. Raises as `checked`."""
    config = JobConfig(**settings)
    return checked(
        replace(
            config,
            save_timeout_s=timeouts.save_s,
            settle_timeout_s=timeouts.settle_s,
            host_timeout_s=timeouts.host_s,
        )
    )


def checked(config: JobConfig) -> JobConfig:
    """The settings themselves, with the start of the job from the environment.

    Raises:
        UsageError: names the setting, what was expected and what was found.
    """
    if config.save_steps is not None and config.save_secs is not None:
        raise UsageError("give save_steps or save_secs, not both; request_save() asks for a save at any time")
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None and field.name in _POSITIVE:
            check_positive(_ARGUMENTS.get(field.name, field.name), value, whole=field.name in _WHOLE)
    if type(config.replicas) is not int or config.replicas not in (0, 1):
        raise UsageError(f"replicas must be 0 or 1, found {config.replicas!r}")
    if config.overlap not in _OVERLAPS:
        raise UsageError(f"overlap must be one of {', '.join(_OVERLAPS)}, found {config.overlap!r}")
    _check_basename(config.basename)
    if config.keep_before is not None and (type(config.keep_before) is not int or config.keep_before < 0):
        raise UsageError(f"keep_before must be the number of a generation, or 0, found {config.keep_before!r}")
    for name in ("keep_hours_from", "keep_hours_grid"):
        if getattr(config, name) is not None:
            _check_time(name, getattr(config, name))
    if config.keep_hours_from is not None and config.keep_hours_grid is not None:
        raise UsageError("give keep_hours_from or keep_hours_grid, not both: they are two rules")
    if not config.delete_grace_s >= 0:
        raise UsageError(f"delete_grace_s must not be negative, found {config.delete_grace_s!r}")
    return replace(config, start=os.environ.get(START_VARIABLE, ""))


def _check_basename(name: object) -> None:
    if not isinstance(name, str) or not name or "/" in name or not name.isprintable():
        raise UsageError(f'basename must be a file name such as "model.ckpt", found {name!r}')


def _check_time(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a time in seconds since the epoch, found {value!r}")


def check_positive(name: str, value: object, *, whole: bool) -> None:
    """Raise `UsageError` unless it is a positive number, a whole one if asked for."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} must be a number, found {value!r}")
    if whole and not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, found {value!r}")
    if not value > 0:
        raise UsageError(f"{name} must be positive, found {value!r}")


def check_local(on_error: str, timeouts: Timeouts, writers_per_host: int) -> None:
    """The settings that are not part of `JobConfig`. Raises `UsageError`."""
    if on_error not in ("warn", "raise"):
        raise UsageError(f'on_error must be "warn" or "raise", found {on_error!r}')
    if not isinstance(timeouts, Timeouts):
        raise UsageError(f"timeouts must be a ray_ckpt.Timeouts, found {timeouts!r}")
    check_positive("timeouts.start_s", timeouts.start_s, whole=False)
    check_positive("timeouts.recover_s", timeouts.recover_s, whole=False)
    check_positive("writers_per_host", writers_per_host, whole=True)


def whole_step(step: object) -> int:
    """The step as an int; numpy's whole numbers count as such. Raises `UsageError`."""
    try:
        found = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"step must be a whole number of completed steps, found {step!r}") from None
    if isinstance(step, bool) or not 0 <= found < 2**63:
        raise UsageError(f"step must be a whole number of completed steps, from 0 to 2**63 - 1, found {step!r}")
    return found


def where(
    url: str | os.PathLike[str] | None, storage_options: Mapping[str, Any] | None
) -> tuple[str | os.PathLike[str], dict[str, Any]]:
    """The run's directory and the options for its file system: as given, else Ray Train's with the given ones added.

    Raises:
        UsageError: no URL, and Ray Train knows none.
    """
    if url is not None:
        return url, dict(storage_options or {})
    place = home()
    return place.url, {**place.storage_options, **(storage_options or {})}


def check_place(url: str) -> str:
    """The URL itself; raises `UsageError` for a store that the processes of a job cannot share."""
    if url.startswith("memory://"):
        raise UsageError(
            f"{url} lives in the memory of one process, but workers, agents and coordinator are several: use a "
            "directory or a bucket"
        )
    return url


def who_am_i(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size): as given, else Ray Train's, else those of a multi-process JAX, else (0, 1).

    Raises:
        UsageError: only one is given, they do not fit together, or Ray Train does not tell them.
    """
    if (rank is None) != (world_size is None):
        raise UsageError(f"give rank and world_size together, found rank={rank!r} and world_size={world_size!r}")
    if rank is None or world_size is None:
        rank, world_size = identity() or _from_jax() or (0, 1)
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{name} must be a whole number, found {value!r}")
    if world_size < 1 or not 0 <= rank < world_size:
        raise UsageError(f"rank must be one of 0 to world_size - 1, found rank={rank} and world_size={world_size}")
    return rank, world_size


def _from_jax() -> tuple[int, int] | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    client = getattr(jax.distributed, "is_initialized", lambda: False)
    return (jax.process_index(), jax.process_count()) if client() else None


def ensure_ray() -> None:
    """Connect to the Ray that started this process (a submitted job finds it in RAY_ADDRESS), or start a local one.

    Without that variable never to one that happens to run on this machine: it may be somebody else's.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=True)
