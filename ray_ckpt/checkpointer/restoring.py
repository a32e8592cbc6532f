"""All ranks restore the same checkpoint: the coordinator chooses, every rank reads its part and says how it went.

The choice takes as long as the last rank takes to come. Meanwhile a rank reads the checkpoint that will most
probably be chosen (`ahead`); the state is built, and variables are assigned, once the choice is known. What lies in
the memory of hosts is read from there.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.exceptions import RayError
from tenacity import retry, retry_if_exception_message, stop_after_attempt

from ray_ckpt import log
from ray_ckpt.agent import recall
from ray_ckpt.checkpointer.ahead import Build, Read, ReadAhead
from ray_ckpt.checkpointer.link import Link
from ray_ckpt.errors import (
    DamagedError,
    NoCheckpointError,
    ObjectMissingError,
    StorageError,
    UnavailableError,
    UsageError,
)
from ray_ckpt.protocol.messages import RestoreDecision, RestoreResult, RestoreWish
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.storage import Store
from ray_ckpt.target import Rename, is_abstract, read_state
from ray_ckpt.trackable import is_trackable, reader
from ray_ckpt.types import Checkpoint

logger = logging.getLogger(__name__)

_CALL_S = 10.0
_RECALLS = 3


def restore(
    link: Link, store: Store, wish: RestoreWish, read: Read | None, timeout_s: float
) -> tuple[Checkpoint | None, Any]:
    """The checkpoint that all ranks took (None: there is none) and the state that ``read`` made of it.

    ``read`` None: nothing is read here.

    A damaged checkpoint is reported; then all ranks, also those that had read it already, take the next older one.

    Raises:
        CheckpointError: the step asked for is not there or is damaged, or no checkpoint can be read.
        UnavailableError: not all ranks came; names who is late.
        UsageError: the directory is not the coordinator's, but one of this host alone.
    """
    with link.condition:
        link.logic.wish(wish)
    link.courier.nudge()
    by = f"rank {link.rank}, before the choice"
    ahead = None if read is None or wish.kind == "none" or _lies_here(link) else ReadAhead(store, wish, read, by)
    key = (0, 0)
    while True:
        decision = _next_decision(link, key, timeout_s)
        key = decision.key
        _check_shared(link, store, decision)
        value, damage = _read(link, store, decision, read, ahead, files=wish.stored)
        ahead = None
        with link.condition:
            link.logic.restore_read(RestoreResult(*key, damage))
        link.courier.nudge()
        if damage is not None:
            logger.warning("%s: %s; asking for an older checkpoint", link.url, damage)
            continue
        if not _decided_anew(link, decision, timeout_s):
            _tell(link, decision)
            return decision.checkpoint, value


def _lies_here(link: Link) -> bool:
    """Whether the memory of this host holds snapshots: then the choice will mostly be one of those."""
    try:
        return bool(link.courier.call("holds", timeout_s=_CALL_S))
    except (RayError, TimeoutError):
        return False


def adopt(link: Link, store: Store, step: int | None, timeout_s: float) -> Checkpoint | None:
    """All ranks start from the checkpoint of ``step``, which each has read by other means; None: from none.

    Raises:
        NoCheckpointError: there is no such step.
        UnavailableError, UsageError: as `restore`.
    """
    wish = RestoreWish("none") if step is None else RestoreWish("step", step)
    found, _ = restore(link, store, wish, None, timeout_s)
    return found


retry_until_agreed = retry(
    retry=retry_if_exception_message(match=r"(?s).*the ranks ask for different restores"),
    stop=stop_after_attempt(3),
    reraise=True,
)
"""For what makes a `Checkpointer` and adopts a step that it looks for: all ranks look again where they found others.

Each looks for itself, and a save of the start before may be committed between two looks.
"""


def _decided_anew(link: Link, decision: RestoreDecision, timeout_s: float) -> bool:
    """Wait for all ranks; True if one of them found damage, so that another choice was made."""

    def anew() -> bool:
        present = link.logic.restore
        return present is not None and present.key > decision.key

    link.wait(lambda: link.logic.restore_done or anew(), timeout_s, "all ranks to have restored")
    return anew()


def _next_decision(link: Link, key: tuple[int, int], timeout_s: float) -> RestoreDecision:
    def decided() -> bool:
        found = link.logic.restore
        return found is not None and found.key > key

    link.wait(decided, timeout_s, "the choice of a checkpoint to start from")
    found = link.logic.restore
    assert found is not None
    return found


def _read(
    link: Link, store: Store, decision: RestoreDecision, read: Read | None, ahead: ReadAhead | None, *, files: bool
) -> tuple[Any, str | None]:
    """(value, None) or (None, what is damaged).

    ``ahead``: what is being read since before the choice. ``files``: only what lies in the store will do.
    """
    chosen = decision.checkpoint
    if decision.note:
        logger.warning("%s: %s", link.url, decision.note)
    held = bool(decision.holders) and not files
    if ahead is not None and (chosen is None or held):
        ahead.end()
        ahead = None
    if decision.step is None or read is None:
        return None, None
    build, trouble = _recall(link, decision, read) if held else (None, "nobody holds the snapshot any more")
    if build is not None:
        return build(), None
    if chosen is None:
        return None, trouble
    try:
        build = ahead.take(chosen) if ahead is not None else None
        if build is None:
            with log.pin(store, chosen.prefix, by=f"rank {link.rank} of generation {decision.generation}"):
                build = read(open_checkpoint(store, chosen))
        return build(), None
    except (DamagedError, ObjectMissingError) as error:
        return None, str(error)


def _recall(link: Link, decision: RestoreDecision, read: Read) -> tuple[Build | None, str]:
    """What was read from the memory of hosts; (None, why not)."""
    chosen = decision.checkpoint
    save = decision.snapshot or (chosen.generation, chosen.step) if chosen is not None else decision.snapshot
    assert save is not None
    began, error = time.monotonic(), ""
    for again in range(_RECALLS):
        # Another host's copy first, where there is one.
        holders = tuple((*of[again % len(of) :], *of[: again % len(of)]) for of in decision.holders)
        try:
            with recall(link.url, save, decision.directory, holders, link.node_id) as stored:
                build = read(stored)
            break
        except (DamagedError, StorageError, UnavailableError, RayError) as found:
            error = str(found)
            logger.info("%s: step %s is not read from host memory: %s", link.url, decision.step, error)
    else:
        if chosen is None:
            logger.warning("%s: step %s cannot be read from host memory: %s", link.url, decision.step, error)
        return None, error
    hosts = len({of[0] for of in decision.holders})
    logger.info(
        "%s: step %d read from the memory of %d hosts in %.2f s", link.url, save[1], hosts, time.monotonic() - began
    )
    return build, ""


def _check_shared(link: Link, store: Store, decision: RestoreDecision) -> None:
    """A path may name another folder on each host; then the coordinator's log is not here."""
    if not store.url.startswith("file://"):
        return
    head = log.read_head(store)
    if head is None or head.generation is None or head.generation.number < decision.generation:
        found = "no log at all" if head is None else "an older log"
        raise UsageError(
            f"{link.url} holds {found} on this host (rank {link.rank}), but the coordinator has written generation "
            f"{decision.generation}: the directory must be one that all hosts share, such as NFS, or a bucket"
        )


def _tell(link: Link, decision: RestoreDecision) -> None:
    if decision.snapshot is not None:
        logger.info("restored step %d from host memory: it is newer than what %s holds", decision.snapshot[1], link.url)
    elif decision.checkpoint is None:
        logger.info("no checkpoint in %s: starting afresh", link.url)
    else:
        logger.info("restored step %d from %s/%s", decision.checkpoint.step, link.url, decision.checkpoint.prefix)


def reader_of(like: Any, rank: int, world_size: int, *, partial: bool, rename: Rename | None, cast: bool) -> Read:
    """What reads a checkpoint into the form of ``like``. Raises `UsageError` for options that do not go with it."""
    if is_trackable(like):
        if rename is not None or cast:
            raise UsageError("TensorFlow restores a tf.train.Checkpoint by itself: without rename and cast")
        return reader(like, partial=partial)

    def read(stored: StoredCheckpoint) -> Build:
        return read_state(stored, like, rank=rank, world_size=world_size, partial=partial, rename=rename, cast=cast)

    return read


def fresh(url: str, state: Any) -> Any:
    """The state to begin with where there is no checkpoint. Raises `NoCheckpointError` if it is none."""
    if is_abstract(state):
        what = "None" if state is None else "abstract"
        raise NoCheckpointError(
            f"no checkpoint in {url}, and `like` is {what}: pass a function that makes a fresh state"
        )
    return state


def nothing_found(url: str) -> NoCheckpointError:
    """The error where a checkpoint had to be there."""
    return NoCheckpointError(f'no checkpoint in {url}, and restore(missing="error") was asked for: check the URL')
