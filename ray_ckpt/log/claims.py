"""Claims of attempts on prefixes, and pins of readers: small objects beside the log."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, unquote

from ray_ckpt import strict_json
from ray_ckpt.errors import DamagedError, ObjectMissingError, StorageError, UnavailableError
from ray_ckpt.log.codec import decode_claim, encode_claim, inside
from ray_ckpt.storage import ObjectInfo, Store
from ray_ckpt.storage.base import checked_path
from ray_ckpt.types import PRIVATE_DIR, Claim

CLAIMS = f"{PRIVATE_DIR}/claims"
PINS = f"{PRIVATE_DIR}/pins"
PIN_LIFETIME_S = 3600.0
_ROUNDS = 100

logger = logging.getLogger(__name__)


def put_claim(store: Store, claim: Claim) -> Claim | None:
    """Claim a prefix. None: it is this claim's now, or was already; else the claim that was there.

    Raises `UsageError` for a prefix outside of the directory, `StorageError`, `DamagedError`, `UnavailableError`.
    """
    path = _claim_path(claim.prefix)
    for _ in range(_ROUNDS):
        if store.put_if_absent(path, encode_claim(claim)):
            return None
        try:
            return decode_claim(store.read(path), f"{store.url}/{path}")
        except ObjectMissingError:
            continue  # deleted in between: try again
    raise UnavailableError(
        f"{store.url}/{path} can neither be created nor read, {_ROUNDS} times: is it a link to nowhere?"
    )


def list_claims(store: Store) -> list[Claim]:
    """All claims in the directory, by prefix; what cannot be read is left out. Raises `StorageError`."""
    found = []
    for info in store.list(CLAIMS):
        try:
            found.append(decode_claim(store.read(info.path), f"{store.url}/{info.path}"))
        except ObjectMissingError:
            continue
        except DamagedError as error:
            # It protects its prefix all the same: who wants to claim that meets it.
            logger.warning("a claim is left out: %s", error)
    return sorted(found, key=lambda claim: claim.prefix)


def delete_claim(store: Store, prefix: str) -> None:
    """Remove a claim, if it is there. Raises `StorageError`."""
    store.delete(_claim_path(prefix))


@contextmanager
def pin(store: Store, prefix: str, by: str, lifetime_s: float = PIN_LIFETIME_S) -> Iterator[None]:
    """Keep a checkpoint's files for as long as the block runs, at most ``lifetime_s``.

    Read the log again inside the block: the checkpoint may have been deleted just before. Raises
    `UsageError` for a prefix outside of the directory, and `StorageError`.
    """
    path = f"{PINS}/{quote(checked_path(prefix), safe='')}.{uuid.uuid4().hex}"
    text = {"prefix": prefix, "by": by, "expires": time.time() + lifetime_s}
    store.put(path, json.dumps(text).encode())
    try:
        yield
    finally:
        try:
            store.delete(path)
        except StorageError as error:
            # What was read is good all the same, and the pin expires.
            logger.warning("the pin on %s stays until it expires: %s", prefix, error)


def list_pins(store: Store, now: float) -> set[str]:
    """Prefixes that a reader in any job is using at ``now`` (s since the epoch). Removes expired pins.

    One whose name is no pin's is left out. Raises `StorageError`.
    """
    pinned = set()
    for info in store.list(PINS):
        expires = _expiry(store, info)
        if expires is None:
            continue
        if expires <= now:
            store.delete(info.path)
        else:
            try:
                pinned.add(_pinned_prefix(store, info))
            except DamagedError as error:
                logger.warning("a pin is left out: %s", error)
    return pinned


def _expiry(store: Store, info: ObjectInfo) -> float | None:
    """When the pin ends; None if it is gone. One that cannot be read lives as long as it normally would."""
    try:
        return float(strict_json.parse(store.read(info.path))["expires"])
    except ObjectMissingError:
        return None
    except strict_json.MALFORMED:
        return info.modified + PIN_LIFETIME_S


def _pinned_prefix(store: Store, info: ObjectInfo) -> str:
    name = info.path.removeprefix(f"{PINS}/").rpartition(".")[0]
    return inside(unquote(name), f"{store.url}/{info.path}")


def _claim_path(prefix: str) -> str:
    return f"{CLAIMS}/{quote(checked_path(prefix), safe='')}"
