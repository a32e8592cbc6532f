"""The Checkpointers of this process's callbacks.

Keras tells callbacks nothing of a `fit` that ended by an exception, so what that left open is left by the next one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray_ckpt.catalog import open_for_reading
from ray_ckpt.checkpointer import Checkpointer
from ray_ckpt.errors import SaveError, UsageError


@dataclass(frozen=True, slots=True)
class _Open:
    checkpointer: Checkpointer
    fit: Any


_open: dict[str, _Open] = {}


def open_run(url: str, fit: Any, **settings: Any) -> Checkpointer:
    """A new start of the run in this directory. ``fit``: an object that all callbacks of one `fit` share.

    What an earlier `fit` left open in this process is left now: its snapshots are still saved, and this start waits
    for them.

    Raises:
        UsageError: another callback of the same `fit` uses the directory.
        RayCkptError: as `Checkpointer`.
    """
    place = open_for_reading(url, settings.get("storage_options")).url
    before = _open.get(place)
    if before is not None and before.fit is fit:
        raise UsageError(f"two callbacks of one fit() save to {place}: give each a directory of its own")
    leave_run(place)
    checkpointer = Checkpointer(url, **settings)
    _open[place] = _Open(checkpointer, fit)
    return checkpointer


def close_run(checkpointer: Checkpointer) -> None:
    """Wait for all saves, then leave. Raises what `Checkpointer.close` does."""
    _open.pop(checkpointer.url, None)
    checkpointer.close()


def finish_run(checkpointer: Checkpointer, step: int) -> None:
    """Wait for all saves, then leave, for a caller whose state has changed since the last one.

    Raises:
        SaveError: the save of ``step`` failed; those before it were warned about.
    """
    try:
        checkpointer.wait()
    except SaveError:
        outcome = checkpointer.outcome(step)
        if outcome is not None and outcome.state == "failed":
            raise
    finally:
        leave_run(checkpointer.url)


def leave_run(place: str) -> None:
    """Leave without a last save."""
    before = _open.pop(place, None)
    if before is not None:
        before.checkpointer.__exit__(GeneratorExit, None, None)


def check_settings(callback: str, settings: dict[str, Any], owned: tuple[str, ...]) -> None:
    """Raise `UsageError` for settings of the Checkpointer that the callback makes itself."""
    for name in owned:
        if name in settings:
            raise UsageError(f"{callback} decides {name} itself: use save_freq, or ray_ckpt.Checkpointer in a loop")


def as_url(directory_url: Any) -> str:
    """The directory as text. Raises `UsageError` where there is none."""
    url = os.fspath(directory_url)
    if not url:
        raise UsageError("directory_url is empty: name a directory or a bucket, as for ray_ckpt.Checkpointer")
    return str(url)


def check_frequency(save_freq: Any) -> None:
    """Raise `UsageError` unless it is "epoch" or a positive number of batches."""
    whole = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
    if save_freq != "epoch" and not whole:
        raise UsageError(f'Unrecognized save_freq: {save_freq}. Expected save_freq are "epoch" or a number of batches')
