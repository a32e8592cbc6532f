"""Bytes of snapshots from host to host over TCP: faster than through Ray's object store, and without its memory.

A connection begins with the server's token, which only members of the Ray cluster are told (`Agent.parts`). Then, any
number of times:

    request   one line of JSON: [path, fills, start, nbytes]
    answer    uint64 number of bytes, uint32 crc32c of them (little-endian), the bytes; none where the snapshot is gone

Nothing is encrypted, as nothing between Ray's processes is by default. A server may close a connection between two
requests: when it has been idle for long, or to make room for another one.
"""

from __future__ import annotations

import contextlib
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
_IDLE_S = 60.0
CONNECTIONS = 256
"""Open at once: each takes a thread and a file descriptor, of which a process may have no more than 1024."""
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


class _Places:
    """Room for so many connections: for another one, that which has been idle for longest is closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._taken = 0
        self._idle: dict[socket.socket, None] = {}
        self._going: set[socket.socket] = set()
        self._over = False

    def take(self) -> None:
        """A place, as soon as there is one: answers that are under way come to their end."""
        with self._changed:
            while self._taken >= self._limit and not self._over:
                oldest = next(iter(self._idle), None)
                if oldest is not None and not self._going:
                    del self._idle[oldest]
                    self._going.add(oldest)
                    with contextlib.suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)
                self._changed.wait()
            self._taken += 1

    def leave(self, connection: socket.socket) -> None:
        """It has ended."""
        with self._changed:
            self._taken -= 1
            self._idle.pop(connection, None)
            self._going.discard(connection)
            self._changed.notify_all()

    def mark(self, connection: socket.socket, *, idle: bool) -> None:
        """Whether nothing of an answer on it is outstanding."""
        with self._changed:
            self._idle.pop(connection, None)
            if idle:
                self._idle[connection] = None
                self._changed.notify_all()

    def end(self) -> None:
        """Nobody is to wait any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024
    places: _Places

    def process_request(self, request: Any, client_address: Any) -> None:
        self.places.take()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.places.leave(request)
        super().shutdown_request(request)


class Server:
    """Serves a host's snapshots from threads of its own, until `close`, over so many ``connections`` at once."""

    def __init__(self, host: str, read: Read, connections: int = CONNECTIONS) -> None:
        token, room = secrets.token_bytes(_TOKEN_NBYTES), threading.Semaphore(_AT_ONCE)
        places = _Places(connections)

        class Handler(socketserver.StreamRequestHandler):
            timeout = None

            def handle(self) -> None:
                _serve(self.request, self.rfile, token, read, room, places)

        self._server = _Listener((host, 0), Handler)
        self._server.places = self._places = places
        self.door = Door(host, self._server.server_address[1], token)
        threading.Thread(target=self._server.serve_forever, name="ray-ckpt-door", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._places.end()
        self._server.shutdown()
        self._server.server_close()


def _serve(
    connection: socket.socket, lines: Any, token: bytes, read: Read, room: threading.Semaphore, places: _Places
) -> None:
    connection.settimeout(_TIMEOUT_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        if not hmac.compare_digest(lines.read(_TOKEN_NBYTES), token):
            return
        connection.settimeout(_IDLE_S)
        places.mark(connection, idle=True)
        while line := lines.readline(_LINE_NBYTES):
            places.mark(connection, idle=False)
            path, fills, start, nbytes = json.loads(line)
            with room:
                data = read(str(path), int(fills), int(start), int(nbytes))
                found = memoryview(b"") if data is None else data
                connection.sendall(_HEAD.pack(len(found), crc32c(found)))
                connection.sendall(found)
            places.mark(connection, idle=True)
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
