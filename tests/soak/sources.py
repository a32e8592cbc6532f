"""Where the oracle reads a run's files: by the operating system and HTTP, past the package and all faults."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

_CALL_S = 30.0


class Source(ABC):
    """The files of one run's directory, by paths relative to it. A file that is not there: `FileNotFoundError`."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """The files whose paths start so, with their sizes in bytes."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """A whole file."""

    @abstractmethod
    def local(self, prefix: str) -> AbstractContextManager[str]:
        """The same prefix on this machine's disk, with all files that ``<prefix>.`` begins."""


class FolderSource(Source):
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def sizes(self, prefix: str) -> dict[str, int]:
        folder, _, start = prefix.rpartition("/")
        found = {}
        for path in (self.root / folder).glob(f"{start}*"):
            if path.is_file():
                found[str(path.relative_to(self.root))] = path.stat().st_size
        return found

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    @contextmanager
    def local(self, prefix: str) -> Iterator[str]:
        yield str(self.root / prefix)


class BucketSource(Source):
    """A folder of a bucket, by the JSON API of Google Cloud Storage."""

    def __init__(self, endpoint: str, bucket: str, folder: str) -> None:
        self._objects = f"{endpoint}/storage/v1/b/{bucket}/o"
        self._folder = folder

    def sizes(self, prefix: str) -> dict[str, int]:
        found: dict[str, int] = {}
        query = {"prefix": f"{self._folder}/{prefix}", "fields": "items(name,size),nextPageToken"}
        while True:
            page = json.loads(_get(f"{self._objects}?{urllib.parse.urlencode(query)}"))
            found |= {i["name"].removeprefix(f"{self._folder}/"): int(i["size"]) for i in page.get("items", ())}
            if not page.get("nextPageToken"):
                return found
            query["pageToken"] = page["nextPageToken"]

    def read(self, path: str) -> bytes:
        return _get(f"{self._objects}/{urllib.parse.quote(f'{self._folder}/{path}', safe='')}?alt=media")

    @contextmanager
    def local(self, prefix: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="rcs") as folder:
            name = prefix.rpartition("/")[2]
            for path in self.sizes(f"{prefix}."):
                (Path(folder) / path.rpartition("/")[2]).write_bytes(self.read(path))
            yield f"{folder}/{name}"


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_CALL_S) as reply:
            body: bytes = reply.read()
            return body
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise FileNotFoundError(url) from None
        raise
