"""A Saver's own list of checkpoints: those that it was told of, and those that a hook saves."""

from __future__ import annotations

import os
from typing import Any

import tensorflow as tf

from ray_ckpt.catalog import Options, open_for_reading
from ray_ckpt.errors import UsageError
from ray_ckpt.log import live_checkpoints
from ray_ckpt.storage import locate

logging = tf.compat.v1.logging


class SaverList:
    """The list of a Saver that a hook saves for. ``keep_before``: as of `Checkpointer`, for this Saver."""

    def __init__(self, saver: Any, keep_before: int | None) -> None:
        self.saver = saver
        self.keep_before = keep_before
        self._warned = False
        self.begin_session()

    def begin_session(self) -> None:
        """What the list names now, it was told of by whoever has restored the session."""
        self._known = list(self.saver._last_checkpoints)

    def record(self, path: str) -> None:
        """Keep the list as `Saver.save` does; what falls out of it is the coordinator's to delete."""
        strange = [name for name, time in self.saver._last_checkpoints if (name, time) not in self._known]
        if strange and not self._warned:
            self._warned = True
            logging.warning(
                "Somebody else saves with the Saver of this hook, %s for one, and will overwrite and delete committed"
                " checkpoints of %s: if it is MonitoredTrainingSession's own hook, pass save_checkpoint_secs=None, not"
                " save_checkpoint_steps; give another hook a Saver and a directory of its own.",
                strange[-1],
                os.path.dirname(path),
            )
        self.saver._RecordLastCheckpoint(path)
        self.saver._checkpoints_to_be_deleted.clear()
        self._known = list(self.saver._last_checkpoints)


def first_told(saver: Any, url: str, options: Options | None) -> int:
    """The lowest generation of which a Saver knows checkpoints in a directory; 0 if it knows of none there.

    Those of generations before are not this Saver's to delete. Raises as `ray_ckpt.checkpoints`.
    """
    told = {_location(path) for path in saver.last_checkpoints} - {None}
    if not told:
        return 0
    live = live_checkpoints(open_for_reading(url, options))
    known = [c for c in live if not c.foreign and _location(os.path.join(url, c.prefix)) in told]
    return min((c.generation for c in known), default=0)


def tell(saver: Any, url: str, options: Options | None) -> None:
    """Tell a Saver of the checkpoints that the `checkpoint` file names, as `recover_last_checkpoints` does."""
    live = live_checkpoints(open_for_reading(url, options))
    named = [c for c in live if not c.superseded and not c.preserved]
    saver.set_last_checkpoints_with_time([(os.path.join(url, c.prefix), c.time) for c in named])


def _location(path: str) -> str | None:
    """One text for all ways to write a path; None for what no directory of ours can hold."""
    try:
        return locate(path).url
    except UsageError:
        return None
