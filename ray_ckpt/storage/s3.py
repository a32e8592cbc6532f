"""`s3://`: Amazon S3, and what speaks its protocol, through s3fs.

Conditional writes use ``If-None-Match: *`` and ``If-Match: <ETag>``, see
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html. A 409 means that two
conditional writes met, and is retried; a 412 that the condition failed.
"""

from __future__ import annotations

from typing import Any

from fsspec.asyn import sync

from ray_ckpt.storage.remote import BLOCK_NBYTES, RemoteBackend
from ray_ckpt.storage.requests import SILENCE


class S3Backend(RemoteBackend):
    """Objects of one bucket below one folder."""

    def connect(self) -> Any:
        from ray_ckpt.storage.s3_requests import PatientS3FileSystem

        options = {**self.options, "use_listings_cache": False, "skip_instance_cache": True}
        # All retries are in one place, `retry`; two more layers below it would multiply the waits.
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": SILENCE * self.timeout_s,
            "read_timeout": SILENCE * self.timeout_s,
            **options.get("config_kwargs", {}),
        }
        fs = PatientS3FileSystem(**options)
        fs.retries = 1
        fs.patience_s = self.timeout_s
        return fs

    def put(self, path: str, data: memoryview) -> None:
        if len(data) < BLOCK_NBYTES:
            self._put_object(path, bytes(data))
            return
        with self.create(path) as writer:
            writer.write(data)

    def put_if_absent(self, path: str, data: bytes) -> None:
        self._put_object(path, data, IfNoneMatch="*")

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        found: tuple[bytes, str] = sync(self.fs.loop, self._get_object, path)
        return found

    def replace_if(self, path: str, data: bytes, version: str) -> None:
        self._put_object(path, data, IfMatch=version)

    def _split(self, path: str) -> dict[str, str]:
        bucket, _, key = self.full(path).partition("/")
        return {"Bucket": bucket, "Key": key}

    def _put_object(self, path: str, data: bytes, **condition: str) -> None:
        try:
            self.fs.call_s3("put_object", Body=data, **self._split(path), **condition)
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(path) from error
            raise

    async def _get_object(self, path: str) -> tuple[bytes, str]:
        """Content and ETag from one response, so that they belong together."""
        response = await self.fs._call_s3("get_object", **self._split(path))
        async with response["Body"] as body:
            return await body.read(), response["ETag"]


def _code(error: OSError) -> str:
    """The service's own error code, which s3fs keeps in the cause only."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
