"""gcsfs with one layer of retries instead of two, and with an end to every request."""

from __future__ import annotations

from typing import Any

import aiohttp
from gcsfs.core import GCSFileSystem

from ray_ckpt.storage.requests import SILENCE, send
from ray_ckpt.storage.retry import TIMEOUT_S

_UPLOAD_IN_PARTS = ("uploadType=resumable", "upload_id=")
"""In the URL that starts one, and in the one that takes its parts."""


def silence(timeout_s: float) -> aiohttp.ClientTimeout:
    """How long to wait for a connection, and for each piece of an answer; gcsfs itself has no limit."""
    share_s = SILENCE * timeout_s
    return aiohttp.ClientTimeout(total=None, sock_connect=share_s, sock_read=share_s)


class PatientGCSFileSystem(GCSFileSystem):  # type: ignore[misc]
    """Sends each request once, or a part of an upload until it has been taken.

    Derived from the plain class: the experimental one asks the service for the bucket's kind before each operation,
    and ignores conditional creation on zonal buckets.
    """

    patience_s = TIMEOUT_S

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        # Without gcsfs's own retries: six, with waits of up to 32 s, for each of ours.
        once = GCSFileSystem._request.__wrapped__
        part = kwargs.get("uploadType") == "resumable" or any(text in path for text in _UPLOAD_IN_PARTS)
        return await send(
            lambda: once(self, method, path, *args, **kwargs),
            "part of an upload",
            self.patience_s,
            kwargs.get("data"),
            part=part,
        )
