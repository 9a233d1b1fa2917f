"""Requests at a fixed rate: they are drawn, sent by threads or processes, and timed."""

from __future__ import annotations

import collections
import dataclasses
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from rmjax.serve.client import Client, ServiceError

BASES = 8  # different histories; every user has a copy of one of them


class Service(Protocol):
    """What is tested: `Streams` in this process, or a `Client` of a service."""

    def write(
        self,
        users: Sequence[str],
        items: Sequence[Any],
        expected_lengths: Sequence[int | None] | None = None,
    ) -> list[int]:
        """Appends items to streams."""

    def answer(self, users: Sequence[str], queries: Sequence[Any]) -> list[np.ndarray]:
        """Answers queries."""

    def fork(self, user: str, copies: Sequence[str]) -> None:
        """Gives new users copies of a stream."""

    def reset(self, users: Sequence[str]) -> None:
        """Forgets users."""

    def __contains__(self, user: object) -> bool:
        """Whether a user has a stream."""


class Request(NamedTuple):
    """One write or one question of one user."""

    time: float  # arrival, in seconds after the start
    user: int
    ids: np.ndarray  # [n] items to write, or queries to answer
    writes: bool


@dataclasses.dataclass(frozen=True)
class Names:
    """How the service calls users and items."""

    history: int  # items of a stream before the first request; begins the names of users
    ids: np.ndarray | None = None  # [num_items] ids of the items; None: their indices
    kinds: bool = False  # whether queries are kinds of question, not items

    def user(self, user: int) -> str:
        """Returns the name of a user."""
        return f"{self.history}-{user}"

    def base(self, user: int) -> str:
        """Returns the name of the stream of which a user got a copy."""
        return f"{self.history}-base-{user % BASES}"

    def items(self, items: np.ndarray) -> np.ndarray:
        """Returns items as the service calls them."""
        return items if self.ids is None else self.ids[items]

    def body(self, request: Request) -> np.ndarray:
        """Returns the items or the queries of a request."""
        return request.ids if self.kinds and not request.writes else self.items(request.ids)


@dataclasses.dataclass
class Served:
    """What became of n requests."""

    seconds: np.ndarray  # f64 [n] from the planned arrival to the result; NaN after an error
    answers: list[np.ndarray | None]  # n answers f32 [Q, ...]; None for writes and errors
    errors: collections.Counter[str]  # number of errors by kind
    cpu: float = 0.0  # seconds of processor time that the processes of the callers took
    wall: float = 0.0  # seconds from the first planned arrival to the last result


def requests(
    rate: float, seconds: float, users: int, items: int, kinds: int = 0, seed: int = 0
) -> list[Request]:
    """Draws random requests: half write 1 to 20 items, half ask 1 to 16 queries.

    Args:
      rate: mean number of requests a second; arrivals are a Poisson process.
      seconds: mean length of the schedule.
      users: number of users.
      items: number of item ids.
      kinds: number of kinds of question; 0: queries are about items.
      seed: of the random numbers.

    Returns:
      The requests, in order of arrival.

    Raises:
      ValueError: there would be no request.
    """
    if round(rate * seconds) < 1:
        raise ValueError(f"--rate={rate:g} --seconds={seconds:g}: no request: raise one of them")
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, round(rate * seconds)))
    writes = rng.random(len(times)) < 0.5
    sizes = np.where(writes, rng.integers(1, 21, len(times)), rng.integers(1, 17, len(times)))
    who = rng.integers(0, users, len(times))
    return [
        Request(
            float(arrival),
            int(user),
            rng.integers(0, items if w else kinds or items, size),
            bool(w),
        )
        for arrival, user, size, w in zip(times, who, sizes, writes, strict=True)
    ]


def serve(
    service: Service,
    wanted: Sequence[Request],
    names: Names,
    threads: int = 8,
    start: float | None = None,
) -> Served:
    """Serves requests in real time: threads take them in order and wait for each result.

    Args:
      service: what is tested.
      wanted: [n] requests, in order of arrival. A user's requests keep this order: the next one
        waits for the one before.
      names: of users and items.
      threads: number of threads, so the most requests that are under way together.
      start: when the schedule begins, in seconds of `time.monotonic`; None: now.

    Returns:
      Latencies, answers and errors.
    """
    n = len(wanted)
    served = Served(np.full(n, np.nan), [None] * n, collections.Counter())
    ended, before = [threading.Event() for _ in wanted], _before(wanted)
    tickets, turn = iter(range(n)), threading.Lock()
    begin = time.monotonic() if start is None else start

    def next_ticket() -> int | None:
        with turn:
            return next(tickets, None)

    def work() -> None:
        for k in iter(next_ticket, None):
            request, earlier = wanted[k], before[k]
            time.sleep(max(0.0, begin + request.time - time.monotonic()))
            if earlier is not None:
                ended[earlier].wait()
            user, body = [names.user(request.user)], [names.body(request)]
            try:
                if request.writes:
                    service.write(user, body)
                else:
                    (served.answers[k],) = service.answer(user, body)
                served.seconds[k] = time.monotonic() - begin - request.time
            except Exception as error:  # an error of any kind is a result of the test
                with turn:
                    served.errors[_kind(error)] += 1
                    if sum(served.errors.values()) <= 3:
                        logging.error("request %d of user %s: %s", k, *user, error)
            ended[k].set()

    used = sum(os.times()[:2])
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    served.cpu, served.wall = sum(os.times()[:2]) - used, time.monotonic() - begin
    return served


def _kind(error: Exception) -> str:
    """The kind of an error in the counts, such as 'HTTP 429' or 'QueueFull'."""
    if isinstance(error, ServiceError):
        return f"HTTP {error.status}"
    return type(error).__name__


def _before(wanted: Sequence[Request]) -> list[int | None]:
    """The place of the same user's request before each request; None: it is the first one."""
    last: dict[int, int] = {}
    places: list[int | None] = []
    for k, request in enumerate(wanted):
        places.append(last.get(request.user))
        last[request.user] = k
    return places


def serve_from_processes(
    url: str,
    wanted: Sequence[Request],
    names: Names,
    clients: int = 4,
    threads: int = 8,
) -> Served:
    """Serves requests as `serve` does, from several processes that call a service over HTTP.

    Args:
      url: of the service.
      wanted: [n] requests, in order of arrival. All requests of a user come from one process.
      names: of users and items.
      clients: number of processes.
      threads: number of threads of a process; each has a connection.

    Returns:
      Latencies, answers and errors; the processor time is that of all processes.
    """
    n, spawn = len(wanted), multiprocessing.get_context("spawn")
    total = Served(np.full(n, np.nan), [None] * n, collections.Counter())
    parts = [[k for k in range(n) if wanted[k].user % clients == c] for c in range(clients)]
    pipes: list[Connection] = []
    for part in parts:
        ours, theirs = spawn.Pipe()
        job = theirs, url, [wanted[k] for k in part], names, threads
        spawn.Process(target=_client, args=job, daemon=True).start()
        theirs.close()  # so that a read raises an error if the process ends
        pipes.append(ours)
    try:
        for pipe in pipes:
            pipe.recv()  # the process is ready
        start = time.monotonic() + 0.1
        for pipe in pipes:
            pipe.send(start)
        for part, pipe in zip(parts, pipes, strict=True):
            served: Served = pipe.recv()
            total.seconds[part] = served.seconds
            for k, answer in zip(part, served.answers, strict=True):
                total.answers[k] = answer
            total.errors += served.errors
            total.cpu, total.wall = total.cpu + served.cpu, max(total.wall, served.wall)
    except EOFError as error:
        raise RuntimeError("a client process ended early: its error is above") from error
    return total


def _client(
    pipe: Connection, url: str, wanted: Sequence[Request], names: Names, threads: int
) -> None:
    """The process of one client."""
    service = Client(url)
    gc.freeze()  # a full collection of all modules would delay requests by 0.1 s
    pipe.send(None)
    pipe.send(serve(service, wanted, names, threads, pipe.recv()))
