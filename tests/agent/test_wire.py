"""Snapshots from host to host: the right bytes, for those who have the word, or an error."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from ray_ckpt.agent import serving
from ray_ckpt.agent.serving import RemoteSource
from ray_ckpt.agent.wire import Connection, Door, Server
from ray_ckpt.bundle import crc32c
from ray_ckpt.errors import DamagedError, ObjectMissingError, UnavailableError
from ray_ckpt.restore import Part
from ray_ckpt.snapshot import Sums
from tests.system.waiting import eventually

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)
PART = Part(0, "/somewhere/00000-0.segment", 3, len(DATA), b"", Sums(b"", ()), "", {})


def read(path: str, fills: int, start: int, nbytes: int) -> memoryview | None:
    return DATA[start : start + nbytes].data if (path, fills) == (PART.path, 3) else None


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server("127.0.0.1", read)
    yield found
    found.close()


def source(door: Door, agent: Any = None) -> RemoteSource:
    return RemoteSource(agent, door, PART, "b")


def test_many_threads_get_what_they_asked_for(server: Server) -> None:
    remote, out = source(server.door), np.zeros_like(DATA)

    def fetch(start: int) -> None:
        remote.read_into(start, memoryview(out)[start : start + 70_001])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(0, len(DATA), 70_001)))
    assert np.array_equal(out, DATA)


def test_what_is_gone_is_said_and_the_connection_goes_on(server: Server) -> None:
    connection = Connection(server.door)
    buffer = memoryview(bytearray(10))
    assert not connection.read_into(PART.path, 4, 0, buffer)
    assert connection.read_into(PART.path, 3, 5, buffer)
    assert bytes(buffer) == DATA[5:15].tobytes()
    # Beyond the end.
    assert not connection.read_into(PART.path, 3, len(DATA) - 5, buffer)
    connection.close()
    with pytest.raises(ObjectMissingError, match="gone"):
        RemoteSource(None, server.door, replace(PART, fills=4), "b").read_into(0, buffer)


def test_so_many_connections_at_once_and_no_more() -> None:
    server = Server("127.0.0.1", read, connections=2)
    buffer = memoryview(bytearray(10))
    first, second = Connection(server.door), Connection(server.door)
    for connection in (first, second, first):
        assert connection.read_into(PART.path, 3, 5, buffer)
        # An answer arrives before the server has done with it.
        eventually(lambda: server._places._taken == len(server._places._idle), "idle connections")
    third = Connection(server.door)
    assert third.read_into(PART.path, 3, 5, buffer), "another one gets its answer"
    assert first.read_into(PART.path, 3, 5, buffer), "that which spoke last stays"
    with pytest.raises(OSError, match=r"closed|reset|Broken"):
        second.read_into(PART.path, 3, 5, buffer)
    server.close()


def test_a_thread_that_reads_from_many_hosts_keeps_few_connections() -> None:
    servers = [Server("127.0.0.1", read) for _ in range(120)]
    buffer = memoryview(bytearray(10))
    for server in (*servers, *servers[:8]):
        source(server.door).read_into(5, buffer)
        assert bytes(buffer) == DATA[5:15].tobytes()
    assert len(serving._own.connections) <= serving._CONNECTIONS
    eventually(lambda: sum(server._places._taken for server in servers) <= serving._CONNECTIONS, "the others closed")
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(Server.close, servers))


def test_an_answer_under_way_is_not_cut_off_for_another_connection() -> None:
    reading, goes_on = threading.Event(), threading.Event()

    def slow(path: str, fills: int, start: int, nbytes: int) -> memoryview | None:
        reading.set()
        assert goes_on.wait(30)
        return read(path, fills, start, nbytes)

    server = Server("127.0.0.1", slow, connections=1)
    buffers = [memoryview(bytearray(10)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Connection(server.door).read_into, PART.path, 3, 0, buffers[0])
        assert reading.wait(30)
        second = pool.submit(Connection(server.door).read_into, PART.path, 3, 5, buffers[1])
        goes_on.set()
        assert first.result(30)
        assert second.result(30)
    assert bytes(buffers[0]) == DATA[:10].tobytes()
    assert bytes(buffers[1]) == DATA[5:15].tobytes()
    server.close()


def test_a_connection_that_was_closed_while_idle_is_made_anew() -> None:
    server = Server("127.0.0.1", read, connections=1)
    remote, buffer = source(server.door), memoryview(bytearray(10))
    remote.read_into(5, buffer)
    assert Connection(server.door).read_into(PART.path, 3, 0, buffer), "the other one's place is taken"
    remote.read_into(5, buffer)
    assert bytes(buffer) == DATA[5:15].tobytes()
    server.close()


def test_a_server_that_is_full_can_be_closed() -> None:
    busy, over = threading.Event(), threading.Event()

    def stuck(*_: Any) -> None:
        busy.set()
        over.wait(30)

    server = Server("127.0.0.1", stuck, connections=1)
    with ThreadPoolExecutor(1) as pool:
        first = Connection(server.door)
        answer = pool.submit(first.read_into, PART.path, 3, 0, memoryview(bytearray(10)))
        assert busy.wait(30)
        waiting = Connection(server.door)
        server.close()
        over.set()
        assert answer.result(30) is False
    waiting.close()


def test_without_the_word_nothing_is_told(server: Server) -> None:
    stranger = Connection(replace(server.door, token=bytes(32)))
    with pytest.raises(OSError, match=r"closed|reset|Broken"):
        stranger.read_into(PART.path, 3, 0, memoryview(bytearray(10)))
    assert server.door.token.hex() not in repr(server.door)
    assert str(server.door.token) not in repr(server.door)


@pytest.mark.parametrize("nonsense", [b"{}\n", b"[1]\n", b"\xff\n", b'["x", "y", 0, 1]\n', b"x" * 10_000])
def test_nonsense_ends_the_connection_alone(server: Server, nonsense: bytes) -> None:
    with socket.create_connection((server.door.host, server.door.port)) as stranger:
        stranger.settimeout(30)
        stranger.sendall(server.door.token + nonsense)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(10) == b""
    assert Connection(server.door).read_into(PART.path, 3, 0, memoryview(bytearray(10)))


def answering(answer: bytes) -> Door:
    """A host that gives this answer to whatever is asked, and goes away."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            with connection.makefile("rb") as lines:
                lines.read(32)
                lines.readline()
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return Door("127.0.0.1", listener.getsockname()[1], bytes(32))


def test_bytes_that_were_changed_are_noticed() -> None:
    answer = (4).to_bytes(8, "little") + crc32c(b"abcd").to_bytes(4, "little") + b"abce"
    with pytest.raises(DamagedError, match="changed on the way"):
        Connection(answering(answer)).read_into("x", 1, 0, memoryview(bytearray(4)))


def test_a_host_that_goes_in_the_middle_of_an_answer_is_named() -> None:
    answer = (4).to_bytes(8, "little") + crc32c(b"abcd").to_bytes(4, "little") + b"ab"
    with pytest.raises(UnavailableError, match=r"00000-0\.segment on host b"):
        source(answering(answer)).read_into(0, memoryview(bytearray(4)))


def test_where_the_door_is_shut_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shut = Door("127.0.0.1", listener.getsockname()[1], bytes(32))
    asked = []

    def remote(path: str, fills: int, start: int, nbytes: int) -> Any:
        asked.append(nbytes)
        data = DATA[start : start + nbytes]
        return data, crc32c(data)

    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(serving, "CHUNK_NBYTES", 1000)
    agent = SimpleNamespace(read=SimpleNamespace(remote=remote))
    buffer = memoryview(bytearray(2500))
    source(shut, agent).read_into(7, buffer)
    assert bytes(buffer) == DATA[7:2507].tobytes()
    assert asked == [1000, 1000, 500]
