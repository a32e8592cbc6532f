"""The `checkpoint` file, by which TensorFlow finds the newest checkpoint: derived from the log or adopted."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray_ckpt.bundle.state_file import StateFile, encode_state_file, parse_state_file
from ray_ckpt.errors import CheckpointError, UnavailableError, UsageError
from ray_ckpt.log.records import read_head, read_last_good
from ray_ckpt.storage import ObjectInfo, Store
from ray_ckpt.storage.base import checked_path
from ray_ckpt.types import Checkpoint, LogRecord

STATE_FILE = "checkpoint"

_ROUNDS = 100
_STEP = re.compile(r"-(\d+)$")
_SHARD = re.compile(r"\.data-\d{5}-of-(\d{5})$")


def repair_state_file(store: Store) -> bool:
    """Bring the `checkpoint` file up to date with the log; False if it was right already.

    Its version is read first and the log second, so a file that was written from a newer log is never
    replaced by an older one. A directory without a log, or where nothing was committed, is left alone.

    Superseded checkpoints are not named, not even where there are no others: from the seal of a start that came from
    none of them to its first commit the file says that there is no checkpoint, as `Checkpointer.restore` does. Readers
    that wait for one go on waiting; a restart would else train on from what the run has said it does not come from.
    They stay where they are, to be restored by their paths or steps, until retention deletes them.

    Raises `StorageError`, and `UnavailableError` if others keep changing the file.
    """
    changed = False
    for _ in range(_ROUNDS):
        held = store.read_versioned(STATE_FILE)
        head = read_head(store)
        if head is None or not (head.live or head.dying):
            return changed
        wanted = _derived(head)
        # The record's number makes each version unlike all before: a coordinator that read an older log cannot take
        # a file that was right again by chance for the one it has seen.
        number = f"# from record {head.sequence} of _ray_ckpt/log\n".encode()
        raw = encode_state_file(wanted.newest, wanted.all_paths, wanted.timestamps) + number
        if held is not None and held[0] == raw:
            return changed
        if store.replace_if(STATE_FILE, raw, held and held[1]):
            changed = True
    raise UnavailableError(
        f"{store.url}/{STATE_FILE} was changed by others {_ROUNDS} times in a row: does another program,"
        " a tf.train.CheckpointManager for one, write to this directory?"
    )


def live_checkpoints(store: Store) -> list[Checkpoint]:
    """The checkpoints of the directory, newest last; [] if there are none.

    They come from the log. Without one, those that TensorFlow's `checkpoint` file names and whose files
    are there are given as foreign ones: ``step`` from the end of the name (0 without one), ``nbytes`` from
    the files, ``world_size`` 0 for unknown. Below a damaged newest record the last good one counts, with a warning.

    Raises `CheckpointError` if the newest is outside of the directory, `DamagedError`, `StorageError`.
    """
    head = read_last_good(store)
    if head is not None:
        return list(head.live)
    held = store.read_versioned(STATE_FILE)
    return [] if held is None else _foreign(store, parse_state_file(held[0]))


def _derived(head: LogRecord) -> StateFile:
    usable = [checkpoint for checkpoint in head.live if not checkpoint.superseded]
    # Preserved ones are left out as `tf.train.CheckpointManager` does; something must be there to restore, though.
    current = [checkpoint for checkpoint in usable if not checkpoint.preserved or checkpoint is usable[-1]]
    return StateFile(
        current[-1].prefix if current else None,
        tuple(checkpoint.prefix for checkpoint in current),
        tuple(checkpoint.time for checkpoint in current),
    )


def _foreign(store: Store, state: StateFile) -> list[Checkpoint]:
    if state.newest is None:
        return []
    newest = _relative(store, state.newest)
    if newest is None:
        raise CheckpointError(
            f"{store.url}/{STATE_FILE} names {state.newest!r} as the newest checkpoint, which is outside of"
            " this directory: move its files here and name them relatively, or open their own directory"
        )
    # A path out of here among the older ones is left out: it cannot be restored by default anyway.
    others = [_relative(store, path) for path in state.all_paths]
    prefixes = dict.fromkeys(path for path in others if path is not None and path != newest)
    times = {path: at for path, at in zip(others, state.timestamps, strict=False) if path is not None}
    files = {info.path: info for info in store.list("")}
    found = (_adopted(prefix, files, times) for prefix in (*prefixes, newest))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _relative(store: Store, path: str) -> str | None:
    """The prefix relative to the directory (TensorFlow may have written it in full); None if outside."""
    for start in (f"{store.url}/", f"{store.url.removeprefix('file://')}/"):
        path = path.removeprefix(start)
    try:
        return checked_path(path)
    except UsageError:
        return None


def _adopted(prefix: str, files: Mapping[str, ObjectInfo], times: Mapping[str, float]) -> Checkpoint | None:
    """The checkpoint of plain TensorFlow at this prefix; None if its index is not there."""
    index = files.get(f"{prefix}.index")
    if index is None:
        return None
    shards = [
        (info, match)
        for path, info in files.items()
        if path.startswith(f"{prefix}.data-") and (match := _SHARD.fullmatch(path, len(prefix)))
    ]
    step = _STEP.search(prefix)
    return Checkpoint(
        step=int(step[1]) if step else 0,
        prefix=prefix,
        attempt="",
        generation=0,
        time=times.get(prefix, index.modified),
        nbytes=index.nbytes + sum(info.nbytes for info, _ in shards),
        num_shards=int(shards[0][1][1]) if shards else 0,
        world_size=0,
        foreign=True,
    )
