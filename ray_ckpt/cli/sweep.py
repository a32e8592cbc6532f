"""What a directory and this host hold that no job needs any more. Finding is apart from removing.

A file is an orphan only where a dead attempt of ours is known to have made it: a claim of an older epoch names
its prefix, or it lies in the folder of such an attempt; and the log lists it neither as live nor as dying.
Attempts of older epochs are fenced off from the log for good, so what is an orphan once stays one. Any other file
is left alone, as plain TensorFlow or a person may have put it there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt import strict_json
from ray_ckpt.bundle import parse_index_name, parse_shard_name, parse_state_file
from ray_ckpt.errors import DamagedError, ObjectMissingError
from ray_ckpt.log import delete_claim, list_claims, list_pins, read_head
from ray_ckpt.snapshot import SegmentInfo, reclaim, scan
from ray_ckpt.storage import ObjectInfo, Store
from ray_ckpt.types import PRIVATE_DIR, Claim, LogRecord

_PINS = f"{PRIVATE_DIR}/pins"
_STATE_FILE = "checkpoint"
_ATTEMPT_FOLDER = re.compile(r"e(\d+)-\d+/")


@dataclass(frozen=True, slots=True)
class Sweep:
    """What may go: files of dead attempts (an index before its data), their claims, expired pins.

    ``unknown`` are prefixes of checkpoint files that nothing accounts for; they stay.
    """

    files: tuple[ObjectInfo, ...] = ()
    claims: tuple[Claim, ...] = ()
    pins: tuple[ObjectInfo, ...] = ()
    unknown: tuple[str, ...] = ()


def find(store: Store, now: float, min_age_s: float) -> Sweep:
    """What of a directory may go at ``now`` (s since the epoch); nothing where there is no log of ours.

    Raises:
        CheckpointError: the log or a claim is damaged, or of a newer version.
        StorageError: the storage failed.
    """
    # In this order: a file's claim is older than the file, and a commit of it would be in the later log.
    listed = store.list("")
    claims = list_claims(store)
    head = read_head(store)
    if head is None:
        return Sweep()
    files = _by_prefix(listed)
    kept = _kept(store, head, claims)
    young = {p for p, infos in files.items() if any(now - info.modified < min_age_s for info in infos)}
    dead = {claim.prefix: claim for claim in claims if claim.prefix not in kept | young}
    orphans = sorted(p for p in files if p not in kept | young and (p in dead or _in_dead_folder(p, head)))
    claimed = {claim.prefix for claim in claims}
    return Sweep(
        files=tuple(info for prefix in orphans for info in files[prefix]),
        claims=tuple(claim for claim in dead.values() if _may_forget(claim, head)),
        pins=tuple(info for info in listed if info.path.startswith(f"{_PINS}/") and _expired(store, info, now)),
        unknown=tuple(sorted(set(files) - kept - set(orphans) - claimed - _attempt_prefixes(files))),
    )


def remove(store: Store, sweep: Sweep, now: float) -> None:
    """Remove what `find` found; may be repeated after an error. Raises `StorageError`."""
    for info in sweep.files:
        store.delete(info.path)
    for claim in sweep.claims:
        delete_claim(store, claim.prefix)
    list_pins(store, now)


def default_segment_folder() -> Path:
    """The folder on tmpfs that holds a folder of segments for each run of this user."""
    return Path(f"/dev/shm/ray_ckpt-{os.getuid()}")


def find_segments(folder: Path, now: float, min_age_s: float) -> list[SegmentInfo]:
    """The segments in all run folders that nobody has open and that are old enough."""
    found = [segment for run in sorted(folder.glob("*")) if run.is_dir() for segment in scan(run)]
    return [segment for segment in found if not segment.in_use and now - segment.modified >= min_age_s]


def remove_segments(segments: Iterable[SegmentInfo]) -> list[SegmentInfo]:
    """Remove them; gives back those that went: the others have been opened since."""
    return [segment for segment in segments if reclaim(segment.path)]


def _by_prefix(listed: Iterable[ObjectInfo]) -> dict[str, list[ObjectInfo]]:
    """The checkpoint files by their prefix, an index first: without it nobody takes the rest for whole."""
    files: dict[str, list[ObjectInfo]] = {}
    for info in listed:
        if info.path.startswith(f"{PRIVATE_DIR}/"):
            continue
        prefix = parse_index_name(info.path)
        shard = parse_shard_name(info.path)
        if prefix is not None:
            files.setdefault(prefix, []).insert(0, info)
        elif shard is not None:
            files.setdefault(shard[0], []).append(info)
    return files


def _kept(store: Store, head: LogRecord, claims: Iterable[Claim]) -> set[str]:
    """Prefixes that somebody lists, writes, reads or names."""
    return {
        *(checkpoint.prefix for checkpoint in head.live),
        *(dying.checkpoint.prefix for dying in head.dying),
        *(claim.prefix for claim in claims if claim.epoch >= head.epoch),
        *list_pins(store, now=0.0),
        *_state_file_paths(store),
    }


def _state_file_paths(store: Store) -> Iterator[str]:
    try:
        state = parse_state_file(store.read(_STATE_FILE))
    except (ObjectMissingError, DamagedError):
        return
    yield from state.all_paths
    if state.newest is not None:
        yield state.newest


def _in_dead_folder(prefix: str, head: LogRecord) -> bool:
    match = _ATTEMPT_FOLDER.match(prefix)
    return match is not None and int(match[1]) < head.epoch


def _attempt_prefixes(prefixes: Iterable[str]) -> set[str]:
    return {prefix for prefix in prefixes if _ATTEMPT_FOLDER.match(prefix)}


def _may_forget(claim: Claim, head: LogRecord) -> bool:
    """A plain prefix that the log has not passed yet could be claimed again, while a zombie still writes it."""
    return claim.step <= head.high_water or _ATTEMPT_FOLDER.match(claim.prefix) is not None


def _expired(store: Store, info: ObjectInfo, now: float) -> bool:
    try:
        return float(strict_json.parse(store.read(info.path))["expires"]) <= now
    except (ObjectMissingError, *strict_json.MALFORMED):
        return False
