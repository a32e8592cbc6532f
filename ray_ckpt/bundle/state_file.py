"""The text of the ``checkpoint`` file, from which TensorFlow learns of the newest checkpoint.

Source: ``tensorflow/python/training/checkpoint_state.proto``, and ``get_checkpoint_state`` in
``tensorflow/python/checkpoint/checkpoint_management.py``. Paths are relative to the file's directory: an
absolute "gs://..." is taken for a relative one there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf import text_format

from ray_ckpt.bundle.schema import CheckpointState
from ray_ckpt.errors import DamagedError, UsageError

_NONE_YET = b"# No checkpoint. TensorFlow ignores this file because of the next line.\nno_checkpoint: true\n"


@dataclass(frozen=True, slots=True)
class StateFile:
    """Prefix of the newest checkpoint, those of all, oldest first, and their times (s since the epoch)."""

    newest: str | None
    all_paths: tuple[str, ...]
    timestamps: tuple[float, ...]


def encode_state_file(newest: str | None, all_paths: Sequence[str], timestamps: Sequence[float]) -> bytes:
    """The file's bytes; without a newest checkpoint a file that TensorFlow reads as "there is none".

    TensorFlow raises on an empty file, so none is ever produced.

    Raises:
        UsageError: there is not one timestamp a path, or paths without a newest one.
    """
    if len(timestamps) not in (0, len(all_paths)):
        raise UsageError(f"{len(timestamps)} timestamps for {len(all_paths)} checkpoint paths")
    if not newest:
        if all_paths:
            raise UsageError(f"{len(all_paths)} checkpoint paths, but none is the newest")
        return _NONE_YET
    state = CheckpointState(
        model_checkpoint_path=newest,
        all_model_checkpoint_paths=all_paths,
        all_model_checkpoint_timestamps=timestamps,
    )
    return text_format.MessageToString(state).encode()


def parse_state_file(raw: bytes) -> StateFile:
    """What a ``checkpoint`` file says, whoever wrote it; comments are allowed.

    Raises:
        DamagedError: not the text of a CheckpointState, or one that names no newest checkpoint.
    """
    if raw.startswith(_NONE_YET):
        return StateFile(None, (), ())
    try:
        state = text_format.Parse(raw.decode(), CheckpointState())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise DamagedError(f"the checkpoint state file is not a CheckpointState: {error}") from None
    if not state.model_checkpoint_path:
        raise DamagedError("the checkpoint state file names no model_checkpoint_path")
    return StateFile(
        state.model_checkpoint_path,
        tuple(state.all_model_checkpoint_paths),
        tuple(state.all_model_checkpoint_timestamps),
    )
