"""`gs://`: Google Cloud Storage through gcsfs.

Conditional writes use the object's generation (``ifGenerationMatch``, 0 for "must not exist"), see
https://cloud.google.com/storage/docs/request-preconditions. gcsfs offers only the create form of it, and
puts a fixed boundary into its uploads that data could contain, so small objects are uploaded here.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

from ray_ckpt.storage.remote import BLOCK_NBYTES, RemoteBackend


class GcsBackend(RemoteBackend):
    """Objects of one bucket below one folder."""

    def connect(self) -> Any:
        from ray_ckpt.storage.gcs_requests import PatientGCSFileSystem, silence

        # A part of an upload that is sent again is ignored by the service; the size proves it.
        defaults: dict[str, Any] = {"requests_timeout": silence(self.timeout_s), "consistency": "size"}
        if "endpoint_url" not in self.options and "STORAGE_EMULATOR_HOST" not in os.environ:
            # gcsfs falls back to anonymous access without a word; this one says what is missing.
            defaults["token"] = "google_default"
        options = {**defaults, **self.options}
        # A cached listing hides what other writers made since.
        fs = PatientGCSFileSystem(**{**options, "use_listings_cache": False, "skip_instance_cache": True})
        fs.patience_s = self.timeout_s
        return fs

    def put(self, path: str, data: memoryview) -> None:
        if len(data) < BLOCK_NBYTES:
            self._upload(path, data, None)
            return
        with self.create(path) as writer:
            writer.write(data)

    def put_if_absent(self, path: str, data: bytes) -> None:
        self._upload(path, memoryview(data), "0")

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        headers, data = self.fs.call("GET", self.fs.url(self.full(path)))
        return bytes(data), str(headers["X-Goog-Generation"])

    def replace_if(self, path: str, data: bytes, version: str) -> None:
        self._upload(path, memoryview(data), version)

    def size(self, path: str) -> int:
        bucket, key = self._split(path)
        return int(self.fs.call("GET", "b/{}/o/{}", bucket, key, json_out=True)["size"])

    def _split(self, path: str) -> tuple[str, str]:
        bucket, _, key = self.full(path).partition("/")
        return bucket, key

    def _upload(self, path: str, data: memoryview, generation: str | None) -> None:
        """One multipart request (https://cloud.google.com/storage/docs/json_api/v1/objects/insert)."""
        bucket, key = self._split(path)
        boundary = uuid.uuid4().hex
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            f"{json.dumps({'name': key})}\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        self.fs.call(
            "POST",
            f"{self.fs._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="multipart",
            ifGenerationMatch=generation,  # gcsfs leaves out what is None
            headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
            data=b"".join([head.encode(), data, f"\r\n--{boundary}--".encode()]),
        )
