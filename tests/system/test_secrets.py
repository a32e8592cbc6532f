"""A credential that a job is given is nowhere to be read: no log, error, status, name, object or file has it."""

from __future__ import annotations

import http.client
import http.server
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray

from ray_ckpt.testing.servers import s3_server
from tests.system.job import Job, get
from tests.system.processes import segment_folder
from tests.system.waiting import eventually

pytestmark = pytest.mark.xdist_group("ray")

PARTS = ("CANARYKEY", "CANARY/secret", "CANARYTOKEN")
CANARY = "CANARY"


def options(endpoint: str) -> dict[str, Any]:
    """Credentials that all can be told by one word."""
    key, secret, token = (f"{part}{uuid.uuid4().hex}" for part in PARTS)
    return {
        "endpoint_url": endpoint,
        "key": key,
        "secret": secret,
        "token": token,
        "client_kwargs": {"region_name": "eu-west-1"},
    }


def texts_of_ray(short_tmp: Path) -> Iterator[tuple[str, bytes]]:
    """All that Ray's processes have logged, on any host."""
    for path in short_tmp.rglob("*"):
        if path.is_file() and "/logs/" in str(path):
            yield str(path), path.read_bytes()


def shown(job: Job, short_tmp: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that somebody could read of a job while it runs."""
    yield from texts_of_ray(short_tmp)
    for rank in range(len(job.workers)):
        yield f"log of rank {rank}", "\n".join(job.on(rank, "get", "messages")).encode()
        for path in segment_folder(job, rank).rglob("*"):
            if path.is_file():
                yield str(path), path.read_bytes()
    yield "status", repr(get(job.coordinator().status.remote())).encode()
    yield "status of a worker", repr(job.on(0, "call", "status")).encode()
    yield "repr of a worker", repr(job.on(0, "do", _repr)).encode()
    yield "actors", repr(ray.util.list_named_actors(all_namespaces=True)).encode()


def _repr(worker: Any) -> str:
    return repr(worker.ckpt)


def leaks(texts: Iterator[tuple[str, bytes]]) -> list[str]:
    """Where the credential is, with a bit of what is around."""
    found = []
    for name, raw in texts:
        at = raw.find(CANARY.encode())
        if at >= 0:
            found.append(f"{name}: {raw[max(0, at - 80) : at + 80]!r}")
    return found


@pytest.mark.slow
def test_right_credentials_are_shown_nowhere(make_job: Callable[..., Job], short_tmp: Path) -> None:
    with s3_server() as server:
        url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:8]}")
        given = options(server.endpoint)
        job = make_job(f"{url}/run", save_steps=2, storage_options=given).start(2)
        job.all("restore")
        job.all("train", 1, 4)
        job.all("call", "wait")
        stored = fsspec.filesystem("s3", **given, use_listings_cache=False, skip_instance_cache=True)
        objects = {path: stored.cat_file(path) for path in stored.find(f"{url}/run")}
        assert any(path.endswith("model.ckpt-4.index") for path in objects)
        assert leaks(iter(objects.items())) == []
        assert leaks(shown(job, short_tmp)) == []
        job.end()


class _Service(http.server.BaseHTTPRequestHandler):
    """Passes requests on; once told to, it refuses them all and repeats what it was sent, as some services do."""

    protocol_version = "HTTP/1.1"
    behind = ""
    refuses = threading.Event()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuses.is_set():
            sent = f"{self.path} {dict(self.headers)}".replace("&", "&amp;").replace("<", "&lt;")
            text = f"<Error><Code>AccessDenied</Code><Message>you sent {sent}</Message></Error>".encode()
            self._reply(403, {"Content-Type": "application/xml"}, text)
            return
        link = http.client.HTTPConnection(self.behind, timeout=30)
        link.request(self.command, self.path, body, dict(self.headers))
        answer = link.getresponse()
        self._reply(answer.status, dict(answer.headers), answer.read())
        link.close()

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def log_message(self, *_: Any) -> None:
        """Nothing: the test's output is no log of the job."""


@contextmanager
def service(endpoint: str) -> Iterator[tuple[str, threading.Event]]:
    """A service in front of another: its endpoint, and what makes it refuse."""
    refuses = threading.Event()
    handler = type("Handler", (_Service,), {"behind": endpoint.removeprefix("http://"), "refuses": refuses})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", refuses
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_refused_credentials_are_shown_nowhere(make_job: Callable[..., Job], short_tmp: Path) -> None:
    with s3_server() as server, service(server.endpoint) as (endpoint, refuses):
        url = server.make_bucket(f"bucket-{uuid.uuid4().hex[:8]}")
        settings = {"storage_options": options(endpoint), "save_steps": 2}
        refuses.set()
        with pytest.raises(ray.exceptions.RayTaskError, match="not permitted") as caught:
            make_job(f"{url}/refused", **settings).start(1)
        assert "you sent" in str(caught.value)
        assert CANARY not in str(caught.value)
        refuses.clear()
        job = make_job(f"{url}/run", **settings).start(1)
        job.all("restore")
        job.all("train", 1, 2)
        job.all("call", "wait")
        refuses.set()
        job.all("train", 3, 4)
        eventually(lambda: [name for name, text in texts_of_ray(short_tmp) if b"you sent" in text], "logs of a refusal")
        assert leaks(shown(job, short_tmp)) == []
        refuses.clear()
        job.end()
