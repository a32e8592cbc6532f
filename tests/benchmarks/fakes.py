"""Subjects whose behaviour is known: they keep NumPy arrays in one file a checkpoint, and what is called is noted."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from benchmarks.subjects.base import Subject


class Silent(Subject):
    """Writes and reads raw bytes; verifies nothing. ``calls`` are those of all objects, in order."""

    name: ClassVar[str] = "silent"
    gives_up: ClassVar[str] = "checksums"
    calls: ClassVar[list[str]] = []

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.calls.append("start")
        self._arrays = dict(arrays)

    def update(self, names: Sequence[str]) -> None:
        self.calls.append("update")
        for name in names:
            self._arrays[name] += 1

    def save(self, step: int) -> None:
        self.calls.append(f"save {step}")
        with open(self.files(step), "wb") as file:
            file.write(self._coded(b"".join(array.tobytes() for array in self._arrays.values())))

    def _coded(self, data: bytes) -> bytes:
        return data

    def wait(self) -> None:
        self.calls.append("wait")

    def files(self, step: int) -> str:
        return os.path.join(self.directory, f"step-{step}")

    def open_restore(self, step: int) -> None:
        self._step = step

    def restore(self) -> Mapping[str, Any]:
        with open(self.files(self._step), "rb") as file:
            data = self._decoded(file.read())
        restored, start = {}, 0
        for name, shape in self.case.shapes:
            part = self.case.part(name, shape, self.rank)[1]
            restored[name] = np.frombuffer(data, np.float32, int(np.prod(part)), start).reshape(part)
            start += restored[name].nbytes
        return restored

    def _decoded(self, data: bytes) -> bytes:
        return data

    def close(self) -> None:
        self.calls.append("close")


class Careful(Silent):
    """Verifies a checksum."""

    name: ClassVar[str] = "careful"
    gives_up: ClassVar[str] = ""

    def _coded(self, data: bytes) -> bytes:
        return data + zlib.crc32(data).to_bytes(4, "little")

    def _decoded(self, data: bytes) -> bytes:
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError("checksum")
        return data[:-4]


class Padded(Silent):
    """So much padding that the middle of the file is no data."""

    name: ClassVar[str] = "padded"

    def _coded(self, data: bytes) -> bytes:
        return data + bytes(2 * len(data))


class Forgetful(Silent):
    """Saves what the state was before any update."""

    name: ClassVar[str] = "forgetful"

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            self._arrays[name] = self._arrays[name].copy()


class Failing(Silent):
    """Cannot save."""

    name: ClassVar[str] = "failing"

    def save(self, step: int) -> None:
        raise RuntimeError("the disk | is\nfull")
