"""The log itself: one object a record, created exclusively, the highest number the whole truth.

Old records are pruned, so a number alone does not say that a record was never there. That is why `append`
looks at the log again after it created its record.
"""

from __future__ import annotations

import logging

from ray_ckpt.errors import DamagedError, ObjectMissingError, UnavailableError, UsageError
from ray_ckpt.log.codec import decode_record, encode_record
from ray_ckpt.storage import Store
from ray_ckpt.types import PRIVATE_DIR, LogRecord

LOG = f"{PRIVATE_DIR}/log"
FIRST_SEQUENCE = 1
MIN_KEPT = 16
"""Records below the head that are never pruned, so that `append` can tell a stale writer from a slow one."""

_DIGITS = 20
_ROUNDS = 10

logger = logging.getLogger(__name__)


def record_path(sequence: int) -> str:
    """Where the record of this number is."""
    return f"{LOG}/{sequence:0{_DIGITS}d}"


def read_head(store: Store) -> LogRecord | None:
    """The newest record, None for a directory without a log.

    Lists once, then probes upward until a number is missing, since a listing may lag behind: a few
    requests, however long the log. Raises as `decode_record` does, and `StorageError`.
    """
    found = _newest(store)
    if found is None:
        return None
    try:
        return _decoded(store, *found)
    except DamagedError as error:
        raise DamagedError(f"{error}; {_remedy(store, found[0])}") from None


def read_last_good(store: Store) -> LogRecord | None:
    """As `read_head`, for those who only read: below a damaged newest record the last good one, with a warning.

    Raises `DamagedError` if none is good.
    """
    found = _newest(store)
    if found is None:
        return None
    try:
        return _decoded(store, *found)
    except DamagedError as error:
        good = _last_good(store, found[0])
        if good is None:
            raise DamagedError(f"{error}; {_remedy(store, found[0])}") from None
        logger.warning("%s; reading record %d instead, which lists %s", error, good.sequence, _listed(good))
        return good


def _newest(store: Store) -> tuple[int, bytes] | None:
    """The highest number and its bytes; None for a directory without a log."""
    for _ in range(_ROUNDS):
        listed = _sequences(store)
        sequence = listed[-1] if listed else FIRST_SEQUENCE
        raw = _read(store, sequence)
        while raw is not None:
            following = _read(store, sequence + 1)
            if following is None:
                return sequence, raw
            sequence, raw = sequence + 1, following
        if not listed:
            return None
    raise UnavailableError(
        f"the log of {store.url} was pruned faster than it could be read, {_ROUNDS} times: is its listing"
        " out of date by minutes?"
    )


def _decoded(store: Store, sequence: int, raw: bytes) -> LogRecord:
    source = f"{store.url}/{record_path(sequence)}"
    record = decode_record(raw, source)
    if record.sequence != sequence:
        raise DamagedError(f"{source} says it is record {record.sequence}: it was damaged or renamed")
    return record


def _last_good(store: Store, damaged: int) -> LogRecord | None:
    """The highest record below this number that can be read."""
    for sequence in reversed(_sequences(store)):
        raw = _read(store, sequence) if sequence < damaged else None
        if raw is not None:
            try:
                return _decoded(store, sequence, raw)
            except DamagedError:
                continue
    return None


def _remedy(store: Store, damaged: int) -> str:
    good = _last_good(store, damaged)
    if good is None:
        return "no older record can be read, so put this file back from a copy"
    files = "that file" if good.sequence == damaged - 1 else f"that file and all above number {good.sequence}"
    return f"remove {files} to go on from record {good.sequence}, which lists {_listed(good)}"


def _listed(record: LogRecord) -> str:
    steps = ", ".join(str(checkpoint.step) for checkpoint in record.live)
    return f"steps {steps}" if steps else "no checkpoint"


def append(store: Store, record: LogRecord) -> tuple[bool, LogRecord]:
    """Create the record of its sequence number: (True, it), or (False, the head) if it came too late.

    ``record`` must differ from everybody else's, by its ``owner`` and ``time``. Repeating an append whose
    answer was lost is safe. Raises `StorageError`.
    """
    if store.put_if_absent(record_path(record.sequence), encode_record(record)):
        highest = max(_sequences(store), default=record.sequence)
        if highest - record.sequence < MIN_KEPT:
            return True, record
        # The number was free only because its record has been pruned: this writer slept through it.
        store.delete(record_path(record.sequence))
    head = read_head(store)
    if head is None:
        raise UnavailableError(f"the log of {store.url} vanished while it was written")
    return False, head


def prune(store: Store, head: LogRecord, keep: int = 64) -> None:
    """Remove all records but the last ``keep`` up to ``head``, oldest first.

    Raises `UsageError` for a ``keep`` that would defeat `append`, and `StorageError`.
    """
    if keep < MIN_KEPT:
        raise UsageError(f"keep={keep}: at least {MIN_KEPT} records must stay")
    for sequence in _sequences(store):
        if sequence <= head.sequence - keep:
            store.delete(record_path(sequence))


def _sequences(store: Store) -> list[int]:
    """The numbers that the listing shows, ascending."""
    names = (info.path.removeprefix(f"{LOG}/") for info in store.list(LOG))
    return sorted(int(name) for name in names if len(name) == _DIGITS and name.isascii() and name.isdigit())


def _read(store: Store, sequence: int) -> bytes | None:
    try:
        return store.read(record_path(sequence))
    except ObjectMissingError:
        return None
