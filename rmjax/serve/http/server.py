"""The server of an app: its address, its clients' deadlines, and its end after a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import resource
import signal
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from absl import logging
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from rmjax.serve.client import plain_token
from rmjax.serve.http.app import make_app
from rmjax.serve.http.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # they end the server
_IDLE = 75  # seconds that a connection may be idle between two requests
_PIPELINE = 16  # requests that a client may send before the reply to an earlier one
_HEAD = 1 << 16  # most bytes of a request's head, about
_FILES = 128  # files that are kept for other things than connections
_END = 25  # seconds that open requests have after a signal; Kubernetes kills after 30


def serve(service: Service, opened: socket.socket, token: str | None, connections: int) -> None:
    """Serves until SIGTERM or SIGINT; then open requests end, and no new ones begin.

    The port opens at once. `/readyz` gives 503 until everything is compiled. After a signal during
    the compilation, the process ends. Later signals do nothing, so that they cannot stop the caller
    from closing its store.

    Args:
      service: the endpoints; the caller closes its store.
      opened: a bound socket, from `bound`.
      token: as in `make_app`.
      connections: most open connections; each more closes the one that was idle for longest.

    Raises:
      Exception: what went wrong in the compilation.
    """
    with contextlib.suppress(ValueError, OSError):  # the hard limit may be below
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        connections = max(1, min(connections, files - _FILES))
    config = uvicorn.Config(
        make_app(service, token),
        http=guarded(AutoHTTPProtocol, service.limits.seconds, connections),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_END,
    )
    server = _Server(config, service)
    compilation = threading.Thread(target=server.compile, name="compile", daemon=True)
    for number in SIGNALS:  # before uvicorn has its own, and when it raises them again at the end
        signal.signal(number, server.handle_exit)
    compilation.start()
    server.run(sockets=[opened])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not service.ready and server.fault is None:
        # XLA cannot be stopped, and takes minutes. No write was accepted, so nothing is lost.
        logging.info("Stopped before it was ready.")
        os._exit(0)
    if server.fault is not None:
        raise server.fault


class _Server(uvicorn.Server):
    """A server that refuses requests from the moment of a signal."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.fault: Exception | None = None  # of the compilation
        self._service = service

    def compile(self) -> None:
        """Compiles what the service needs; if it fails, the server ends."""
        logging.info(
            "Compiling writes, answers and recommendations for all sizes of requests; until "
            "'Ready', requests get 503."
        )
        try:
            self._service.compile()
            # The imported modules are 200,000 objects: a full collection takes 0.1 s, in which
            # nothing is served. Frozen objects are left out of it.
            gc.collect()
            gc.freeze()
            logging.info("Ready: requests are served.")
        except Exception as error:  # `serve` raises it in the main thread
            self.fault, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Acts on a signal."""
        if not self._service.closing:
            logging.info("%s: open requests end.", signal.Signals(sig).name)
        self._service.closing = True
        super().handle_exit(sig, frame)


def bound(host: str, port: int, token: str | None) -> socket.socket:
    """Binds the address of a server.

    Args:
      host: a name or an IP address.
      port: 0 for any free one.
      token: as in `make_app`.

    Returns:
      A socket that does not listen yet.

    Raises:
      ValueError: other machines can reach the host, and there is no token; or there is no such
        host, or the token has characters that a header cannot have.
      OSError: the port is taken, or this user may not open it.
    """
    plain_token(token or "")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host={host}: there is no such address ({error})") from None
    if token is None and not ipaddress.ip_address(str(address[0])).is_loopback:
        cure = "set RMJAX_TOKEN in the environment to a secret, or leave --host out"
        raise ValueError(f"--host={host}: other machines reach it without a token: {cure}")
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a restart
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise OSError(f"--host={host} --port={port}: {error.strerror}: take another port") from None
    return opened


def url(opened: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def guarded(protocol: Any, seconds: float, connections: int) -> type[asyncio.Protocol]:
    """Makes a protocol of uvicorn cut off clients who are slow, or who send without reading.

    uvicorn has a deadline for connections that are idle after a reply. It has none for a head that
    does not end, and none for a client that does not read. It queues any number of requests that
    come before the reply to an earlier one. Its limit of connections refuses requests, also of
    probes, while idle connections stay open. With httptools it has no limit for a head.

    Args:
      protocol: the class.
      seconds: for a head to arrive, and for a client to read a reply.
      connections: most open connections of all instances together.

    Returns:
      A subclass.
    """

    class Guarded(_Guard, protocol):  # type: ignore[misc]
        _seconds, _most, _opened = seconds, connections, {}

    return Guarded


class _Guard(asyncio.Protocol):
    """The limits of `guarded`, for a class that inherits from a protocol of uvicorn, too."""

    _seconds: float
    _most: int
    _opened: dict[_Guard, None]  # connections, the one first that has sent nothing for longest
    loop: Any
    cycle: Any
    transport: Any
    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _in_head, _size = False, 0  # with httptools: whether a head is open, and its bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head = self._deadline()
        self._opened[self] = None
        if len(self._opened) > self._most:
            idle = next((one for one in self._opened if not one.in_request()), self)
            del self._opened[idle]
            idle.transport.close()

    def data_received(self, data: bytes) -> None:
        if self in self._opened:
            self._opened[self] = self._opened.pop(self)
        self._size = self._size + len(data) if self._in_head else 0
        super().data_received(data)
        too_long = self._in_head and self._size > _HEAD
        if too_long or len(getattr(self, "pipeline", ())) > _PIPELINE:
            self.transport.abort()
        if self.in_request():
            self._cancel("_head")  # the head is complete
        elif self._head is None and not self.transport.is_closing():
            self._head = self._deadline()

    def on_message_begin(self) -> None:  # of httptools; h11 has its own limit
        self._in_head = True
        super().on_message_begin()  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()  # type: ignore[misc]

    def in_request(self) -> bool:
        """Whether a request has no full reply yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("_head")
        self._cancel("_reader")
        self._opened.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = self._deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_reader")

    def _deadline(self) -> asyncio.TimerHandle:
        timer: asyncio.TimerHandle = self.loop.call_later(self._seconds, self.transport.abort)
        return timer

    def _cancel(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
