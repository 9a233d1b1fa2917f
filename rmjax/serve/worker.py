"""A queue in front of a store: one thread serves requests, and merges those that fit together.

Requests come from any thread, and their callers get futures. The worker takes the first request and
those behind it that the same compiled call can serve. Two requests of one user never change places.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from absl import logging

from rmjax.serve.database import User

CLOSED = "these streams are closed: open them again with Streams(...)"
E = TypeVar("E", bound=BaseException)


class QueueFull(RuntimeError):
    """So many requests wait already that this one was refused; nothing of it was done."""


@dataclasses.dataclass(eq=False)
class Request:
    """What a caller wants.

    Attributes:
      serve: serves requests of one `kind` together, and completes their futures.
      kind: requests of the same kind can be merged. None: a barrier, which is served alone, after
        all requests before it and before all requests behind it.
      users: whose requests must keep their order.
      content: of the request; `serve` knows its form.
      size: entries of the request, counted against the largest batch.
      future: of the result.
      arrival: seconds of `time.monotonic`.
    """

    serve: Callable[[Sequence[Request]], None]
    kind: Hashable = None
    users: Sequence[User] = ()
    content: Any = None
    size: int = 1
    future: Future[Any] = dataclasses.field(default_factory=Future)
    arrival: float = dataclasses.field(default_factory=time.monotonic)


class Worker:
    """One thread that serves requests.

    The worker knows how many requests were in the store at once a short time ago. It waits for more
    only while there are fewer now. So a single caller never waits, and many callers are merged.

    Args:
      most: entries of the largest batch.
      delay: seconds; no request waits longer than this for others to be merged with.
      queue: most waiting requests; barriers are not counted.

    Attributes:
      thread: the thread that serves.
      observe: is called before a batch is served, with the number of its requests.
    """

    def __init__(self, most: int, delay: float, queue: int):
        self._most, self._delay, self._queue = most, delay, queue
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._inside = 0  # requests that came and are not completed
        self._callers = 0  # most requests that were inside at once, until a wait was in vain
        self.observe: Callable[[int], object] = lambda count: None
        self.thread = threading.Thread(target=self._run, name="streams-worker", daemon=True)
        self.thread.start()

    def submit(self, request: Request, urgent: bool = False) -> Future[Any]:
        """Puts a request into the queue.

        Args:
          request: what to do.
          urgent: serves it next, also while the worker is being closed.

        Returns:
          The future of the request.

        Raises:
          QueueFull: too many requests wait.
          RuntimeError: the worker is closed.
        """
        with self._changed:
            if self._ended or (self._closing and not urgent):
                raise RuntimeError(CLOSED)
            if request.kind is not None and len(self._waiting) >= self._queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already: ask again later")
            (self._waiting.appendleft if urgent else self._waiting.append)(request)
            self._inside += 1
            self._callers = max(self._callers, self._inside)
            self._changed.notify_all()
        request.future.add_done_callback(self._leave)
        return request.future

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    def close(self) -> None:
        """Serves all waiting requests, refuses new ones, and returns when the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def _leave(self, _: Future[Any]) -> None:
        with self._changed:
            self._inside -= 1

    def _run(self) -> None:
        while batch := self._next():
            live = [one for one in batch if one.future.set_running_or_notify_cancel()]
            try:
                if batch[0].kind is not None:
                    self.observe(len(batch))
                if live:
                    live[0].serve(live)
            except BaseException as error:  # an error of one batch must not end the store
                _fail(live, error)
            del batch, live  # requests hold the store, which may be collected while nobody calls

    def _next(self) -> list[Request]:
        """Waits for requests; returns those to serve together, or [] at the end."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    self._ended = True
                    return []
                self._changed.wait()
            deadline = self._waiting[0].arrival + self._delay
            while self._may_gain():
                left = deadline - time.monotonic()
                if left <= 0:
                    self._callers = self._inside  # the others stay away
                    break
                self._changed.wait(left)
            return self._take()

    def _may_gain(self) -> bool:
        """Whether waiting may bring requests that can be merged with the first one."""
        return (
            not self._closing
            and self._inside < self._callers
            and all(request.kind is not None for request in self._waiting)
            and sum(request.size for request in self._waiting) < self._most
        )

    def _take(self) -> list[Request]:
        """Takes the first request and all that can be served with it out of the queue."""
        first = self._waiting.popleft()
        if first.kind is None:
            return [first]
        taken, size, skipped = [first], first.size, list[Request]()
        passed: set[User] = set()  # users of skipped requests
        while self._waiting and size < self._most and self._waiting[0].kind is not None:
            request = self._waiting.popleft()
            fits = request.kind == first.kind and size + request.size <= self._most
            if fits and passed.isdisjoint(request.users):
                taken.append(request)
                size += request.size
            else:
                skipped.append(request)
                passed.update(request.users)
        self._waiting.extendleft(reversed(skipped))
        return taken


def _fail(requests: Sequence[Request], error: BaseException) -> None:
    """Gives an unexpected error to all requests of a batch that are not completed."""
    logging.exception("a batch of requests failed")
    for request in requests:
        with contextlib.suppress(InvalidStateError):
            request.future.set_exception(own(error))


def own(error: E) -> E:
    """A copy of an error for one caller, since each thread that raises it adds its trace to it."""
    try:
        return copy.copy(error)
    except Exception:  # some errors of other libraries cannot be copied
        return error
