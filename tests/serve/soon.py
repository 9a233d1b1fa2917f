"""Temporary: the coming interface of Streams over today's class."""

import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rmjax.serve.store import QueueFull, WrongLength

StreamInfo = namedtuple("StreamInfo", "length written bytes")


class Soon:
    def __init__(self, streams, queue=1024):
        self.streams, self.pool, self.lengths, self.written = streams, ThreadPoolExecutor(1), {}, {}
        self.queue, self.waiting, self.lock = queue, 0, threading.Lock()
        self.gate = threading.Event()
        self.gate.set()

    def soon(self, act, *args):
        with self.lock:
            if self.waiting >= self.queue:
                raise QueueFull(f"{self.waiting} requests wait")
            self.waiting += 1

        def run():
            self.gate.wait()
            try:
                return act(*args)
            finally:
                self.waiting -= 1

        return self.pool.submit(run)

    def write_(self, users, items, expected_lengths=None):
        for user, want in zip(users, expected_lengths or [None] * len(users), strict=True):
            if want is not None and want != self.lengths.get(user, 0):
                raise WrongLength(user, self.lengths.get(user, 0))
        self.streams.write(users, items)
        out = []
        for user, ids in zip(users, items, strict=True):
            self.lengths[user] = self.lengths.get(user, 0) + len(ids)
            self.written[user] = time.time()
            out.append(self.lengths[user])
        return out

    def write_soon(self, *args):
        return self.soon(self.write_, *args)

    def write(self, *args):
        return self.write_soon(*args).result()

    def answer(self, *args):
        return self.answer_soon(*args).result()

    def answer_soon(self, *args):
        return self.soon(self.streams.answer, *args)

    def recommend_soon(self, *args):
        return self.soon(self.streams.recommend, *args)

    def reset(self, users):
        self.streams.reset(users)
        for user in users:
            self.lengths.pop(user, None)

    def fork(self, user, copies):
        self.streams.fork(user, copies)
        for copy in copies:
            self.lengths[copy], self.written[copy] = self.lengths[user], self.written[user]

    def info(self, user):
        if user not in self.streams:
            raise ValueError(f"user {user!r} has no stream in this store")
        return StreamInfo(self.lengths[user], self.written[user], 100)

    def memory(self, user):
        import jax

        from rmjax.machines import current_memory

        if user not in self.streams:
            raise ValueError(f"user {user!r} has no stream in this store")
        s = self.streams
        rows = s._store.take(np.array([s._slots[user]]))
        memory = current_memory(MACHINE[0], s._params["machine"], rows)
        return jax.tree.map(lambda x: np.asarray(x)[0], memory)

    def compile(self):
        self.streams.compile()

    def close(self):
        self.pool.shutdown()
        self.streams.close()

    def __len__(self):
        return len(self.streams)


MACHINE = [None]
