"""The coordinator's process in `benchmarks.scale`: the real actor with its event loop, I/O threads and store.

Calls come in frames over a socket, as pickles of (call, method, arguments); answers go back as pickles of (call,
result) made by Ray's own cloudpickle. There is no Ray cluster: what its transport costs is measured apart.
"""

from __future__ import annotations

import asyncio
import pickle
import resource
import socket
import sys
from typing import Any

from ray import cloudpickle

from ray_ckpt.coordinator.actor import Coordinator

HEAD_NBYTES = 4


class Frames(asyncio.Protocol):
    """Cuts a stream into frames: four bytes of length, little-endian, then a pickle."""

    def __init__(self, on_frame: Any) -> None:
        self._on_frame = on_frame
        self._buffer = bytearray()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """The other side is there."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes have come, of any number of frames."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= HEAD_NBYTES:
            stop = at + HEAD_NBYTES + int.from_bytes(self._buffer[at : at + HEAD_NBYTES], "little")
            if stop > len(self._buffer):
                break
            frame = bytes(self._buffer[at + HEAD_NBYTES : stop])
            at = stop
            self._on_frame(frame)
        del self._buffer[:at]

    def send(self, frame: bytes) -> None:
        """One frame to the other side."""
        self._transport.write(len(frame).to_bytes(HEAD_NBYTES, "little") + frame)


class Server:
    """Hands calls to the coordinator, each in a task of its own, as Ray does with an async actor."""

    def __init__(self, url: str) -> None:
        self._coordinator = Coordinator(url, {}, single_coordinator=False, lease_s=1e9)
        self.frames = Frames(self._on_frame)
        self._tasks: set[asyncio.Task[None]] = set()
        self.calls = self.nbytes_in = self.nbytes_out = 0

    def _on_frame(self, frame: bytes) -> None:
        call, method, arguments = pickle.loads(frame)
        self.calls += method == "exchange"
        self.nbytes_in += len(frame)
        task = asyncio.get_running_loop().create_task(self._answer(call, method, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, call: int, method: str, arguments: tuple[Any, ...]) -> None:
        owner = self if method == "cost" else self._coordinator
        frame = cloudpickle.dumps((call, await getattr(owner, method)(*arguments)))
        self.nbytes_out += len(frame)
        self.frames.send(frame)

    async def cost(self) -> dict[str, float]:
        """What this process has used so far."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "cpu_s": used.ru_utime + used.ru_stime,
            "peak_nbytes": used.ru_maxrss * 1024,
            "calls": self.calls,
            "nbytes_in": self.nbytes_in,
            "nbytes_out": self.nbytes_out,
        }


async def serve(url: str, fd: int) -> None:
    """Until the parent ends this process."""
    server = Server(url)
    await asyncio.get_running_loop().create_connection(lambda: server.frames, sock=socket.socket(fileno=fd))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
