"""What Ray Train keeps in place of the data: a directory with one small file that says where a checkpoint lies."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_ckpt import catalog, strict_json
from ray_ckpt.errors import DamagedError, NoCheckpointError, StorageError, UsageError
from ray_ckpt.storage import locate
from ray_ckpt.train.place import place_of

FILE = "ray_ckpt.json"


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where a committed checkpoint lies.

    ``url`` is the run's directory, ``prefix`` the checkpoint's name in it; ``generation`` the number of the start
    that committed it (0: plain TensorFlow did). ``storage_options`` is how `from_train` reached the place; it is never
    stored.
    """

    url: str
    step: int
    prefix: str
    generation: int
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def path(self) -> str:
        """What TensorFlow calls the checkpoint: for `tf.train.load_checkpoint` and `tf.train.Checkpoint.read`."""
        location = locate(self.url)
        return posixpath.join(location.root if location.scheme == "file" else location.url, self.prefix)

    def load(
        self, *, names: Iterable[str] | None = None, storage_options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors of this checkpoint by name, as `ray_ckpt.load` gives them.

        ``storage_options`` adds to those with which the pointer was found.

        Raises:
            NoCheckpointError: retention has deleted the data; says what is there.
            DamagedError, StorageError, UsageError: as `ray_ckpt.load`.
        """
        options = {**self.storage_options, **(storage_options or {})}
        found = catalog.checkpoints(self.url, storage_options=options)
        same = [info for info in found if info.step == self.step]
        if not same or same[-1].prefix != self.prefix:
            raise NoCheckpointError(self._gone(found))
        return catalog.load(self.url, self.step, names=names, storage_options=options)

    def _gone(self, found: Iterable[catalog.CheckpointInfo]) -> str:
        what = f"{self.prefix} in {self.url}, of start {self.generation}, to which Ray Train's checkpoint points"
        steps = [info.step for info in found]
        if not steps:
            return f"{what}, is not there, nor is any other checkpoint: was the directory moved or deleted?"
        again = "was replaced by a later start" if self.step in steps else "was deleted by retention (max_to_keep)"
        there = ", ".join(map(str, steps))
        return f"{what}, {again}; there are steps {there}: ray_ckpt.load(url, step=...), or keep more"


def write(pointer: Pointer, folder: str) -> None:
    """Make the folder a directory that `from_train` understands."""
    content = asdict(pointer)
    del content["storage_options"]
    Path(folder, FILE).write_text(json.dumps(content))


def from_train(checkpoint: Any) -> Pointer:
    """The way from Ray Train's checkpoint to the data: its URL, step, prefix, and `Pointer.load`.

    ``checkpoint`` is a `ray.train.Checkpoint` that `Checkpointer.report` has attached: ``result.checkpoint``,
    ``ray.train.get_checkpoint()``, or one of ``result.best_checkpoints``.

    Raises:
        UsageError: None, or not a checkpoint of Ray Train.
        NoCheckpointError: somebody else's checkpoint, or a pointer that has been deleted; says what is there.
        DamagedError, StorageError: the pointer cannot be read.
    """
    if checkpoint is None:
        raise UsageError(
            "Ray Train has no checkpoint: none was committed before the last ckpt.report(), or report was not called"
        )
    filesystem, folder = getattr(checkpoint, "filesystem", None), getattr(checkpoint, "path", None)
    if filesystem is None or folder is None:
        raise UsageError(f"from_train() needs a ray.train.Checkpoint such as result.checkpoint, found {checkpoint!r}")
    path = posixpath.join(folder, FILE)
    try:
        with filesystem.open_input_stream(path) as file:
            raw = bytes(file.readall())
    except FileNotFoundError:
        raise NoCheckpointError(
            f"{folder} is no checkpoint of ckpt.report(), which would hold {FILE}: {_what_is_there(filesystem, folder)}"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    return _decoded(raw, path, filesystem)


def _decoded(raw: bytes, path: str, filesystem: Any) -> Pointer:
    try:
        content = strict_json.parse(raw)
        url = str(content["url"])
        found = str(content["prefix"]), strict_json.integer(content["generation"]), _options(filesystem, path, url)
        return Pointer(url, strict_json.integer(content["step"]), *found)
    except strict_json.MALFORMED as error:
        raise DamagedError(f"{path} is not a pointer that ckpt.report() wrote ({error!r})") from None


def _options(filesystem: Any, path: str, url: str) -> Mapping[str, Any]:
    """The run lies beside the pointer, unless the user chose another place: then the options are the user's to give."""
    try:
        place = place_of(filesystem, path)
    except UsageError:
        return {}
    return place.storage_options if locate(place.url).scheme == locate(url).scheme else {}


def _what_is_there(filesystem: Any, folder: str) -> str:
    import pyarrow.fs  # type: ignore[import-untyped]

    selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
    names = sorted(info.base_name for info in filesystem.get_file_info(selector))
    return f"it holds {', '.join(names[:8])}" if names else "it is empty, or was deleted by num_to_keep"
