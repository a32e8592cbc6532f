"""All ranks restore the same checkpoint: the coordinator chooses, every rank reads its part and says how it went.

The choice takes as long as the last rank takes to come. Meanwhile a rank reads the checkpoint that will most
probably be chosen. If another one is, that reading was in vain, and no more: the state is built, and variables are
assigned, once the choice is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from tenacity import retry, retry_if_exception_message, stop_after_attempt

from ray_ckpt import log
from ray_ckpt.checkpointer.link import Link
from ray_ckpt.errors import DamagedError, NoCheckpointError, ObjectMissingError, UsageError
from ray_ckpt.protocol.messages import RestoreDecision, RestoreResult, RestoreWish
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.storage import Store
from ray_ckpt.types import Checkpoint

logger = logging.getLogger(__name__)

Build = Callable[[], Any]
Read = Callable[[StoredCheckpoint], Build]
"""Reads and verifies all that a state needs; what it gives builds the state."""


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
    ahead = _read_ahead(link, store, wish, read)
    key = (0, 0)
    while True:
        decision = _next_decision(link, key, timeout_s)
        key = decision.key
        _check_shared(link, store, decision)
        if ahead is not None and (decision.checkpoint is None or _id(decision.checkpoint) != ahead[0]):
            ahead = None
        value, damage = _read(link, store, decision, read, ahead and ahead[1])
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


def _id(checkpoint: Checkpoint) -> tuple[str, str, int]:
    """What no two checkpoints of a directory share; marks in the log may change meanwhile."""
    return checkpoint.prefix, checkpoint.attempt, checkpoint.step


def _read_ahead(
    link: Link, store: Store, wish: RestoreWish, read: Read | None
) -> tuple[tuple[str, str, int], Build] | None:
    """What is read of the checkpoint that this wish will most probably get; None where that cannot be told or read."""
    if wish.kind == "none" or read is None:
        return None
    try:
        live = log.live_checkpoints(store)
        found = [c for c in live if (c.step == wish.step if wish.kind == "step" else not c.superseded)]
        if not found or (wish.kind == "newest" and _is_newer_claimed(store, live)):
            return None
        with log.pin(store, found[-1].prefix, by=f"rank {link.rank}, before the choice"):
            return _id(found[-1]), read(open_checkpoint(store, found[-1]))
    except Exception as error:
        # It is met again, and told, when this checkpoint is chosen.
        logger.debug("%s: nothing was read ahead: %s", link.url, error)
        return None


def _is_newer_claimed(store: Store, live: Sequence[Checkpoint]) -> bool:
    """Whether agents of the start before may be finishing a save at this moment, which would then be chosen."""
    prefixes, newest = {c.prefix for c in live}, max(c.step for c in live)
    return any(claim.step > newest and claim.prefix not in prefixes for claim in log.list_claims(store))


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
    link: Link, store: Store, decision: RestoreDecision, read: Read | None, ahead: Build | None
) -> tuple[Any, str | None]:
    """(value, None) or (None, what is damaged). ``ahead``: what was read before the choice, if it was of this one."""
    chosen = decision.checkpoint
    if decision.note:
        logger.warning("%s: %s", link.url, decision.note)
    if chosen is None or read is None:
        return None, None
    try:
        build = ahead
        if build is None:
            with log.pin(store, chosen.prefix, by=f"rank {link.rank} of generation {decision.generation}"):
                build = read(open_checkpoint(store, chosen))
        return build(), None
    except (DamagedError, ObjectMissingError) as error:
        return None, str(error)


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
    if decision.checkpoint is None:
        logger.info("no checkpoint in %s: starting afresh", link.url)
    else:
        logger.info("restored step %d from %s/%s", decision.checkpoint.step, link.url, decision.checkpoint.prefix)


def nothing_found(url: str) -> NoCheckpointError:
    """The error where a checkpoint had to be there."""
    return NoCheckpointError(f'no checkpoint in {url}, and restore(missing="error") was asked for: check the URL')
