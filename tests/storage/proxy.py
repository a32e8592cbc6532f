"""An HTTP proxy on loopback that passes requests on, but for those that meet a fault."""

from __future__ import annotations

import http.client
import io
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Decide = Callable[[str, str, dict[str, str]], str]
"""What to do with a request, from its method, path (and "#" and the object, where the body names it), and headers:

pass: nothing; strip: take conditions away; drop: do it, but close without a reply; twice: do it a second time; reset:
break the connection in the middle of the request; cut: break it in the middle of the reply; flip: change a byte of the
reply; hold: do not answer before the proxy ends; a number: answer with this status instead.

Two things of GCS the server of the tests does not do, so they are done here: a part of an upload whose reply was
dropped, and that is sent again, is not added to what is there; and the reply to the last part names no range.
"""

_HOP = {"transfer-encoding", "connection", "content-length"}
_CONDITIONS = {"if-none-match", "if-match"}
_HOLD_S = 120.0
_NAMES = {"403": "AccessDenied", "429": "TooManyRequests", "503": "SlowDown"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    decide: Decide
    ended: threading.Event
    rfile: io.BufferedReader
    parts: dict[tuple[str, str], tuple[int, list[tuple[str, str]], bytes]]

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", "0"))
        what = self.decide(self.command, self.path + self._named(length), headers)
        if what == "reset":
            self.rfile.read(length // 2)
            self._break()
            return
        body = self.rfile.read(length)
        if what == "hold":
            self.ended.wait(_HOLD_S)
            self._break()
        elif what[0].isdigit():
            self._refuse(what, "x-amz-date" in headers)
        else:
            if what == "strip":
                headers = {name: value for name, value in headers.items() if name not in _CONDITIONS}
            self._pass_on(body, headers, what)

    def _named(self, length: int) -> str:
        """The object that an upload to GCS names in its body."""
        if not length or not self.path.startswith("/upload/"):
            return ""
        found = re.search(rb'"name": ?"([^"]+)"', self.rfile.peek(512)[:512])
        return f"#{found[1].decode()}" if found else ""

    def _pass_on(self, body: bytes, headers: dict[str, str], what: str) -> None:
        part = (self.path, headers.get("content-range", ""))
        if part in self.parts:
            self._answer(*self.parts.pop(part))
            return
        if what == "twice":
            self._ask(body, headers)
        status, kept, data = self._ask(body, headers)
        if what == "drop":
            if part[1]:
                self.parts[part] = status, kept, data
            self.close_connection = True
            return
        if what == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        self._answer(status, kept, data, cut=what == "cut")

    def _ask(self, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=30)
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        hidden = _HOP - ({"content-length"} if self.command == "HEAD" else set())
        if "content-range" in headers and response.status == 200:
            hidden |= {"range"}
        return response.status, [(n, v) for n, v in response.getheaders() if n.lower() not in hidden], data

    def _refuse(self, what: str, s3: bool) -> None:
        """``what``: the status, and after a colon the seconds to wait for the next try, where it names them."""
        status, _, asked_s = what.partition(":")
        name = _NAMES[status]
        text = f"<Error><Code>{name}</Code><Message>of the test</Message></Error>"
        if not s3:
            text = f'{{"error": {{"code": {status}, "message": "{name} of the test"}}}}'
        self._answer(int(status), [("Retry-After", asked_s)] if asked_s else [], text.encode())

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._break()

    def _break(self) -> None:
        """End the connection as a machine does that goes down."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections break here all the time."""


@contextmanager
def proxy(upstream: str, decide: Decide) -> Iterator[str]:
    """The URL of a proxy in front of ``upstream``."""
    ended = threading.Event()
    settings = {"upstream": upstream, "decide": staticmethod(decide), "ended": ended, "parts": {}}
    handler = type("Handler", (_Handler,), settings)
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
