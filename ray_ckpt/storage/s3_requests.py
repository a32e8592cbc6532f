"""s3fs with an end to every request, and with our retries for the parts of an upload."""

from __future__ import annotations

from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from ray_ckpt.storage.requests import send
from ray_ckpt.storage.retry import TIMEOUT_S

_UPLOAD_IN_PARTS = {"create_multipart_upload", "upload_part", "complete_multipart_upload", "abort_multipart_upload"}


class PatientS3FileSystem(S3FileSystem):  # type: ignore[misc]
    """Sends each request once, or a part of an upload until it has been taken."""

    patience_s = TIMEOUT_S

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await send(
            lambda: super(PatientS3FileSystem, self)._call_s3(method, *args, **kwargs),
            f"{method} of an upload",
            self.patience_s,
            kwargs.get("Body"),
            part=method in _UPLOAD_IN_PARTS,
        )

    call_s3 = sync_wrapper(_call_s3)
