"""A metadata server of Google Compute Engine on loopback, whose keys a test sets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = "/computeMetadata/v1/instance/"


@dataclass
class MetadataServer:
    """``keys`` are what is below ``instance/``; all others are not found. ``host`` is ``127.0.0.1:<port>``.

    ``busy`` keys have no value yet, ``broken`` ones none that the server can give.
    """

    host: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)


@contextmanager
def running() -> Iterator[MetadataServer]:
    """The server, until the end of the block."""
    state = MetadataServer(keys={"preempted": "FALSE", "maintenance-event": "NONE"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.path.removeprefix(ROOT)
            if self.headers.get("Metadata-Flavor") != "Google":
                self.send_error(403)
            elif key in state.busy | state.broken:
                self.send_error(503 if key in state.busy else 500)
            elif key not in state.keys:
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(state.keys[key].encode())

        def log_message(self, format: str, *args: object) -> None:
            """Quietly."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
