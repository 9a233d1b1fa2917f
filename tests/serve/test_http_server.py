"""The server as a process: its port, clients who are slow or wrong, and its end after SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rmjax.serve.database import Database
from rmjax.serve.http.server import guarded
from tests import ROOT
from tests.serve.served import IDS, USUAL, mutated

SECONDS = 2.0  # that clients have


class Server:
    """A process of `python -m rmjax.serve` with a small model."""

    def __init__(self, folder: Path, *flags: str, seconds_to_serve: float = 0):
        command = [sys.executable, "-m", "tests.serve.served", "--workdir=made", "--port=0"]
        command += [f"--request_seconds={SECONDS}", *flags]
        started = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}  # it does not begin again
        started |= {"SECONDS_TO_SERVE": str(seconds_to_serve)}
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | started
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stderr=log)
        (self.url,) = self.wait_for(r"(http://\S+): serves").groups()
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def wait_for(self, pattern: str) -> re.Match:
        """The first place of the log that fits a pattern."""
        end = time.monotonic() + 300  # of a busy machine
        while not (match := re.search(pattern, self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        return match

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def write(self, user: str) -> int:
        """The length of a user's stream after one more item."""
        reply = self.client.post("/v1/write", json={"users": [user], "items": [[IDS[1]]]})
        assert reply.status_code == 200, reply.text
        return reply.json()["lengths"][0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"), "--store=streams.lmdb")
    try:
        early = made.client.get("/readyz").status_code, made.client.get("/healthz").status_code
        assert early in ((503, 200), (200, 200))  # compilation may have been fast
        made.wait_for("Ready: requests are served")
        yield made
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(60) == 0
        assert "Traceback" not in made.log.read_text()
    finally:
        made.process.kill()  # nothing is left if the start fails


def test_who_reads_the_address_can_connect(tmp_path):
    server = Server(tmp_path, seconds_to_serve=0.5)
    try:
        server.connect().close()
    finally:
        server.process.kill()


def test_a_signal_during_the_compilation_ends_the_server(tmp_path):
    server = Server(tmp_path, "--store=streams.lmdb")
    server.wait_for("Compiling")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    log = server.log.read_text()
    assert log.endswith(("Stopped before it was ready.\n", "Closed.\n")), log


def test_a_signal_while_the_model_opens_ends_the_server(tmp_path):
    command = [sys.executable, "-m", "tests.serve.served", "--workdir=made", "--port=0"]
    started = {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.perturb=0"}
    environment = os.environ | started | {"JAX_PLATFORMS": "cpu", "SECONDS_TO_OPEN": "60"}
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE
    ) as opening:
        first = opening.stderr.readline()
        time.sleep(0.5)
        opening.send_signal(signal.SIGTERM)
        log = first + opening.stderr.read()
    assert opening.returncode == 0 and b"SIGTERM: stopped before it was ready" in log, log


@contextlib.contextmanager
def guarded_server(protocol, connections: int):
    """A service of uvicorn in a thread, whose every reply is 'ok'; gives its port."""

    async def app(scope, receive, send):
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"ok"})

    kind = guarded(protocol, 300, connections)
    config = uvicorn.Config(app, port=0, http=kind, lifespan="off", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = running.force_exit = True
        thread.join()


PARSERS = pytest.mark.parametrize("protocol", [H11Protocol, HttpToolsProtocol])


@PARSERS
def test_idle_connections_make_room_for_others(protocol):
    """The one that was idle for longest is closed, whatever it was: new, in a head, or kept."""
    request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with guarded_server(protocol, 3) as port, contextlib.ExitStack() as held:
        connect = partial(socket.create_connection, ("127.0.0.1", port), timeout=5)
        new, half, kept = (held.enter_context(connect()) for _ in range(3))
        for connection in (half, kept):
            connection.sendall(request)
            until(connection, b"ok")
        half.sendall(request[:9])
        for idle in (new, kept, half):
            probe = held.enter_context(connect())
            probe.sendall(request)
            until(probe, b"ok")
            assert rest(idle) == b""


@PARSERS
def test_a_head_without_an_end_is_cut_off(protocol):
    line, sent_bytes = b"x: " + b"y" * 996 + b"\r\n", 0
    with guarded_server(protocol, 3) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        with connection, pytest.raises(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(20_000):
                connection.sendall(line)
                sent_bytes += len(line)
        assert sent_bytes < 1.5e7
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            connection.sendall(head + line * 30 + b"\r\n")
            assert rest(connection).endswith(b"ok")


def sent(server: Server, data: bytes) -> bytes:
    """What a server replies to bytes until it closes the connection."""
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return rest(connection)


def rest(connection: socket.socket) -> bytes:
    """What comes from a connection until it is closed."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def until(connection: socket.socket, end: bytes) -> None:
    """Reads a reply, which may come in parts."""
    reply = b""
    while not reply.endswith(end):
        part = connection.recv(1000)
        assert part, reply
        reply += part


def as_bytes(method: str, path: bytes, headers: dict[str, bytes], body: bytes) -> bytes:
    fixed = {"host": b"127.0.0.1", "content-length": b"%d" % len(body), "connection": b"close"}
    lines = [name.encode() + b": " + value for name, value in (fixed | headers).items()]
    return b"\r\n".join([method.encode() + b" " + path + b" HTTP/1.1", *lines, b"", body])


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGESIZE"
    )


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_requests_get_no_error_of_the_server(server, count):
    rng, statuses = np.random.default_rng(count), []
    requests = [as_bytes(*mutated(rng)) for _ in range(count)]
    with ThreadPoolExecutor(8) as pool:
        for first, end in ((0, count // 5), (count // 5, count)):
            before = resident(server.process)
            part = requests[first:end]
            for request, reply in zip(part, pool.map(partial(sent, server), part), strict=True):
                if reply:  # a head that does not end gets none
                    statuses.append(int(reply.split()[1]))
                    assert statuses[-1] in USUAL, (request, reply)
                    assert b"Traceback" not in reply
    assert len(statuses) > 0.9 * count and {200, 400, 404} <= set(statuses)
    assert resident(server.process) < before + 2e7
    assert server.write(f"mutated {count}") == 1


def test_slow_clients_and_idle_connections_do_not_hold_others_up(server):
    """Each of them is cut off: without a request, in a first or second head, and in the body."""
    body = b'{"users": ["ann"], "items": [[]]}'
    headers = {"content-type": b"application/json"}
    request = as_bytes("POST", b"/v1/write", headers, body)
    with contextlib.ExitStack() as held:
        idle = [held.enter_context(server.connect()) for _ in range(200)]
        slow_head, second_head, slow_body = (held.enter_context(server.connect()) for _ in range(3))
        second_head.sendall(as_bytes("GET", b"/healthz", {"connection": b"keep-alive"}, b""))
        until(second_head, b'{"status":"alive"}')
        second_head.sendall(request[:20])
        begin, taken = time.monotonic(), []
        slow_body.sendall(request[:-5])
        for byte in request[:20]:
            slow_head.sendall(bytes([byte]))
            start = time.monotonic()
            server.write("quick")
            taken.append(time.monotonic() - start)
        assert np.median(taken) < 0.5 * SECONDS
        assert b" 408 " in slow_body.recv(1000)
        assert not any(rest(connection) for connection in (slow_head, second_head, *idle))
        assert SECONDS / 2 < time.monotonic() - begin < 10 * SECONDS


def test_a_client_that_sends_without_reading_is_cut_off(server):
    server.write("flood")
    before = resident(server.process)
    with server.connect() as connection:
        request = as_bytes("GET", b"/openapi.json", {"connection": b"keep-alive"}, b"")
        with pytest.raises(ConnectionError):
            for _ in range(300):
                connection.sendall(request * 1000)
    assert server.write("flood") == 2 and resident(server.process) < before + 1e8


def test_a_reader_has_a_deadline():
    """It begins when the buffer is full, and ends when the buffer is empty."""
    transport = Mock()

    async def read(pauses: int) -> int:
        loop = asyncio.get_running_loop()
        plain = type("Plain", (asyncio.Protocol,), {"loop": loop, "transport": transport})
        connection = guarded(plain, 0.05, 9)()
        for _ in range(pauses):
            connection.pause_writing()
            connection.resume_writing()
        if not pauses:
            connection.pause_writing()
        await asyncio.sleep(0.1)
        return transport.abort.call_count

    assert [asyncio.run(read(pauses)) for pauses in (2, 0)] == [0, 1]


def test_after_a_signal_open_requests_end_and_no_new_ones_begin(server):
    """It is the last test: it ends the server."""
    body = b'{"users": ["last"], "items": [["%s"]]}' % IDS[1].encode()
    request = as_bytes("POST", b"/v1/write", {"content-type": b"application/json"}, body)
    assert server.write("last") == 1
    with server.connect() as idle, server.connect() as half:
        half.sendall(request[:-5])
        server.write("other")  # so that the server has begun to read
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM: open requests end")
        with contextlib.suppress(ConnectionRefusedError):
            assert not (reply := sent(server, request)) or b" 503 " in reply
        assert rest(idle) == b""
        half.sendall(request[-5:])
        reply = rest(half)
    while server.process.poll() is None:  # more signals do not stop the store from being closed
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert b'"lengths":[2]' in reply and b"connection: close" in reply.lower()
    assert server.process.wait(60) == 0
    assert server.log.read_text().endswith("Closed.\n")
    with contextlib.closing(Database(server.log.parent / "streams.lmdb")) as database:
        assert database.read(["last"])["last"].length == 2
