"""An HTTP proxy on loopback that passes requests on, and drops the replies it is told to drop."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Decide = Callable[[str, str, dict[str, str]], str]
"""What to do with a request, from its method, path and headers: "pass", "drop" its reply, "strip" conditions."""

_HOP = {"transfer-encoding", "connection", "content-length"}
_CONDITIONS = {"if-none-match", "if-match"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    decide: Decide

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        what = self.decide(self.command, self.path, headers)
        if what == "strip":
            headers = {name: value for name, value in headers.items() if name not in _CONDITIONS}
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=30)
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        if what == "drop":
            self.close_connection = True
            return
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def proxy(upstream: str, decide: Decide) -> Iterator[str]:
    """The URL of a proxy in front of ``upstream``."""
    handler = type("Handler", (_Handler,), {"upstream": upstream, "decide": staticmethod(decide)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
