"""The Checkpointers of this process's callbacks.

Keras tells callbacks nothing of a `fit` that ended by an exception, so what that left open is left by the next one.
"""

from __future__ import annotations

import inspect
import os
import weakref
from dataclasses import dataclass
from typing import Any

from ray_ckpt.catalog import open_for_reading
from ray_ckpt.checkpointer import Checkpointer, restoring
from ray_ckpt.checkpointer.ahead import Read
from ray_ckpt.errors import SaveError, UsageError
from ray_ckpt.protocol.messages import RestoreWish


class Run(Checkpointer):
    """A `Checkpointer` whose restore is told what to read by the checkpoint itself."""

    def restore_by(self, read: Read) -> Any:
        """What ``read`` makes of the newest checkpoint, on all workers the same one; None if there is none.

        Raises:
            CheckpointError, UnavailableError: as `restore`, and whatever ``read`` raises.
        """
        self._check_open()
        _, value = restoring.restore(self._link, self._store, RestoreWish("newest"), read, self._start_timeout_s)
        # The structure of the state is known with the first save.
        self._ready = True
        return value


@dataclass(frozen=True, slots=True)
class _Open:
    run: Run
    fit: Any
    callback: weakref.ref[Any]


_open: dict[str, _Open] = {}


def open_run(url: str, callback: Any, **settings: Any) -> Run:
    """A new start of the run in this directory. ``callback``: whose it is.

    What an earlier `fit` left open in this process is left now: its snapshots are still saved, and this start waits
    for them.

    Raises:
        UsageError: another callback of the same `fit` uses the directory.
        RayCkptError: as `Checkpointer`.
    """
    place = open_for_reading(url, settings.get("storage_options")).url
    before = _open.get(place)
    if before is not None:
        # What all callbacks of one `fit` share; those of a ready CallbackList share it over several.
        if before.fit is callback.params and before.callback() is not callback:
            raise UsageError(f"two callbacks of one fit() save to {place}: give each a directory of its own")
        leave_run(before.run)
    run = Run(url, **settings)
    _open[place] = _Open(run, callback.params, weakref.ref(callback))
    return run


def close_run(run: Run) -> None:
    """Wait for all saves, then leave. Raises what `Checkpointer.close` does."""
    _forget(run)
    run.close()


def finish_run(run: Run, step: int) -> None:
    """Wait for all saves, then leave, for a caller whose state has changed since the last one.

    Raises:
        SaveError: the save of ``step`` failed; those before it were warned about.
    """
    try:
        run.wait()
    except SaveError:
        outcome = run.outcome(step)
        if outcome is not None and outcome.state == "failed":
            raise
    finally:
        leave_run(run)


def leave_run(run: Run) -> None:
    """Leave without a last save; nothing happens if it has been left."""
    _forget(run)
    run.leave()


def _forget(run: Run) -> None:
    if run.url in _open and _open[run.url].run is run:
        del _open[run.url]


def check_settings(callback: str, settings: dict[str, Any], owned: tuple[str, ...]) -> None:
    """Raise `UsageError` for settings that the callback makes itself, TypeError for those that there are not."""
    known = inspect.signature(Checkpointer).parameters
    for name in settings:
        if name in owned:
            raise UsageError(f"{callback} decides {name} itself: use save_freq, or ray_ckpt.Checkpointer in a loop")
        if name not in known:
            raise TypeError(f"{callback}() got an unexpected keyword argument {name!r}")


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
