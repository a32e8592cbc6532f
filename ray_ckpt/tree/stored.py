"""The structure that a checkpoint says it has: text that anybody may have written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray_ckpt.errors import DamagedError, RayCkptError
from ray_ckpt.strict_json import MALFORMED


@contextmanager
def reading_structure() -> Iterator[None]:
    """Make a `DamagedError` of whatever taking a malformed structure apart raises; errors of ours pass."""
    try:
        yield
    except RayCkptError:
        raise
    except MALFORMED as error:
        raise DamagedError(
            f"the structure of the saved state is not readable ({error!r:.200}); restore another checkpoint, or pass"
            " the state as a target"
        ) from None
