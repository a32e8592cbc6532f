"""Bytes of snapshots from host to host over TCP: faster than through Ray's object store, and without its memory.

A connection begins with the server's token, which only members of the Ray cluster are told (`Agent.parts`). Then, any
number of times:

    request   one line of JSON: [path, fills, start, nbytes]
    answer    uint64 number of bytes, uint32 crc32c of them (little-endian), the bytes; none where the snapshot is gone

Nothing is encrypted, as nothing between Ray's processes is by default.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray_ckpt.bundle import crc32c
from ray_ckpt.errors import DamagedError

_TOKEN_NBYTES = 32
_HEAD = struct.Struct("<QI")
_LINE_NBYTES = 4096
_TIMEOUT_S = 30.0
"""A peer that is silent for so long in the middle of an answer is gone."""
_CONNECT_S = 5.0
_IDLE_S = 600.0
_AT_ONCE = 16
"""Answers under way: each holds a copy of what it sends."""

Read = Callable[[str, int, int, int], memoryview | None]
"""(path, fills, start, nbytes) -> bytes of a snapshot; None if it is gone."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where an agent serves its snapshots, and the word that opens it."""

    host: str
    port: int
    token: bytes

    def __repr__(self) -> str:
        return f"Door({self.host}:{self.port})"


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024


class Server:
    """Serves a host's snapshots from threads of its own, until `close`."""

    def __init__(self, host: str, read: Read) -> None:
        token, room = secrets.token_bytes(_TOKEN_NBYTES), threading.Semaphore(_AT_ONCE)

        class Handler(socketserver.StreamRequestHandler):
            timeout = None

            def handle(self) -> None:
                _serve(self.request, self.rfile, token, read, room)

        self._server = _Listener((host, 0), Handler)
        self.door = Door(host, self._server.server_address[1], token)
        threading.Thread(target=self._server.serve_forever, name="ray-ckpt-door", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()


def _serve(connection: socket.socket, lines: Any, token: bytes, read: Read, room: threading.Semaphore) -> None:
    connection.settimeout(_TIMEOUT_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        if not hmac.compare_digest(lines.read(_TOKEN_NBYTES), token):
            return
        connection.settimeout(_IDLE_S)
        while line := lines.readline(_LINE_NBYTES):
            path, fills, start, nbytes = json.loads(line)
            with room:
                data = read(str(path), int(fills), int(start), int(nbytes))
                found = memoryview(b"") if data is None else data
                connection.sendall(_HEAD.pack(len(found), crc32c(found)))
                connection.sendall(found)
    except (OSError, ValueError, TypeError):
        # A client that went away, or none of ours.
        return


class Connection:
    """To one agent's door; used by one thread at a time. Raises `OSError` where it does not open."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._socket = socket.create_connection((door.host, door.port), _CONNECT_S)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.sendall(door.token)

    def read_into(self, path: str, fills: int, start: int, buffer: memoryview) -> bool:
        """Fill the buffer with bytes of a snapshot; False if it is gone.

        Raises:
            OSError: the connection broke.
            DamagedError: what arrived is not what was sent.
        """
        request = json.dumps([path, fills, start, len(buffer)]).encode() + b"\n"
        self._socket.sendall(request)
        head = bytearray(_HEAD.size)
        self._receive(memoryview(head))
        nbytes, crc = _HEAD.unpack(head)
        if nbytes != len(buffer):
            return False
        self._receive(buffer)
        if crc32c(buffer) != crc:
            raise DamagedError(f"{path}: {nbytes} bytes from {start} on were changed on the way from {self._door.host}")
        return True

    def _receive(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._socket.recv_into(buffer[done:])
            if not count:
                raise ConnectionResetError(f"{self._door} closed the connection")
            done += count

    def close(self) -> None:
        """End it."""
        self._socket.close()
