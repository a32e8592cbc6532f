"""What a kind of storage has to provide: bare operations, without retries or our errors.

A backend raises what its library raises: `FileNotFoundError` where there is no object,
`FileExistsError` where a condition failed, `EOFError` for an object that ends too early, any other
`OSError` for the rest. `store.BackedStore` turns that into a `Store`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from ray_ckpt.storage.base import Listing, ObjectWriter


class Backend(ABC):
    """Bare operations on the objects of one directory; see the same names in `base.Store`."""

    exclusive: bool = True
    attempts: int = 6
    """How often an operation is tried, if its time lasts so long."""

    @abstractmethod
    def put(self, path: str, data: memoryview) -> None:
        """Write the whole object, atomically and durably."""

    @abstractmethod
    def create(self, path: str) -> ObjectWriter:
        """Start an object that is written piece by piece."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create the object, or raise `FileExistsError`."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """The whole object and its version."""

    @abstractmethod
    def replace_if(self, path: str, data: bytes, version: str) -> None:
        """Replace the object of this version, or raise `FileExistsError` or `FileNotFoundError`."""

    @abstractmethod
    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer, or raise `EOFError`."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes in the object."""

    @abstractmethod
    def list(self, prefix: str) -> Listing:
        """Objects below the directory ``prefix`` ("": all), in any order."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object; `FileNotFoundError` is allowed."""
