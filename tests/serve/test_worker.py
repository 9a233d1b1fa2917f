"""Merged requests of many threads have the results of each request alone, in the user's order."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.serve.store import QueueFull, WrongLength
from rmjax.serve.worker import Request, Worker
from tests import ROOT
from tests.serve.test_streams import ITEMS, in_place, offline, same, streams

PLACES = pytest.mark.parametrize("place", ["device", "database"])


class Recorder:
    """Serves requests by writing down which ones came together."""

    def __init__(self) -> None:
        self.batches: list[list] = []
        self.open = threading.Event()
        self.open.set()

    def serve(self, requests: Sequence[Request]) -> None:
        assert self.open.wait(20)
        self.batches.append([request.content for request in requests])
        for request in requests:
            if isinstance(request.content, Exception):
                raise request.content
            request.future.set_result(request.content)

    def request(self, kind, users, content, size=1) -> Request:
        return Request(self.serve, kind, users, content, size)


@pytest.fixture
def recorder():
    return Recorder()


def held(worker: Worker, recorder: Recorder):
    """Keeps the worker busy, so that what follows waits in the queue."""
    recorder.open.clear()
    first = worker.submit(recorder.request(None, (), "first"))
    while not first.running():
        time.sleep(1e-4)
    return first


def test_what_is_merged(recorder):
    worker = Worker(4, 0.0, 100)
    held(worker, recorder)
    for kind, users, content, size in (
        ("write", "a", 1, 1),
        ("write", "b", 2, 1),
        ("answer", "a", 3, 1),  # behind 1
        ("write", "c", 4, 1),
        ("write", "a", 5, 1),  # behind 3
        ("answer", "b", 6, 1),
        ("write", "d", 7, 3),  # too large for the first batch
        ("write", "e", 8, 1),
        (None, "", 9, 0),  # a barrier
        ("write", "e", 10, 9),  # larger than a batch
        ("write", "f", 11, 1),
    ):
        worker.submit(recorder.request(kind, users, content, size))
    recorder.open.set()
    worker.close()
    assert recorder.batches[1:] == [[1, 2, 4, 8], [3, 6], [5, 7], [9], [10], [11]]


@given(
    st.lists(st.tuples(st.sampled_from(["w", "a", "b", None]), st.integers(0, 3)), max_size=30),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_requests_of_a_user_and_barriers_keep_their_order(wanted, most):
    recorder = Recorder()
    worker = Worker(most, 0.0, 100)
    held(worker, recorder)
    for place, (kind, user) in enumerate(wanted):
        worker.submit(recorder.request(kind, [user], place))
    recorder.open.set()
    worker.close()
    served = [place for batch in recorder.batches[1:] for place in batch]
    assert sorted(served) == list(range(len(wanted)))
    rank = {place: position for position, place in enumerate(served)}
    for later, (kind, user) in enumerate(wanted):
        for earlier, (kind_before, user_before) in enumerate(wanted[:later]):
            if user == user_before or kind is None or kind_before is None:
                assert rank[earlier] < rank[later]
    for batch in recorder.batches[1:]:
        assert len({wanted[place][0] for place in batch}) == 1 and len(batch) <= most


def test_errors_cancelled_requests_and_a_full_queue(recorder):
    worker = Worker(4, 0.0, 3)
    held(worker, recorder)
    bad = worker.submit(recorder.request("bad", "a", ZeroDivisionError("boom")))
    beside = worker.submit(recorder.request("bad", "b", "held with the bad one"))
    gone = worker.submit(recorder.request("good", "c", "cancelled"))
    with pytest.raises(QueueFull, match="3 requests wait already: ask again later"):
        worker.submit(recorder.request("good", "c", "too many"))
    barrier = worker.submit(recorder.request(None, (), "a barrier is not counted"))
    assert gone.cancel()
    recorder.open.set()
    for future in (bad, beside):
        with pytest.raises(ZeroDivisionError, match="boom"):
            future.result(20)
    assert bad.exception() is not beside.exception(), "each caller has an error of its own"
    assert barrier.result(20) == "a barrier is not counted"
    assert worker.submit(recorder.request("good", "c", "goes on")).result(20) == "goes on"
    assert ["cancelled"] not in recorder.batches
    held(worker, recorder)
    last = worker.submit(recorder.request("good", "c", "waits"))
    closing = threading.Thread(target=worker.close)
    closing.start()
    while not worker._closing:
        time.sleep(1e-4)
    with pytest.raises(RuntimeError, match="these streams are closed"):
        worker.submit(recorder.request("good", "c", "late"))
    recorder.open.set()
    closing.join(20)
    assert last.result(0) == "waits"


def test_the_worker_waits_only_while_others_may_come(recorder):
    worker = Worker(8, 2.0, 100)
    begin = time.monotonic()
    for k in range(20):
        worker.submit(recorder.request("w", "a", k)).result()
    assert time.monotonic() - begin < 1.9, "a single caller must not wait"
    held(worker, recorder)  # three callers at once: the worker knows of them
    for k in range(3):
        worker.submit(recorder.request("w", str(k), k))
    recorder.open.set()
    done = recorder.batches
    end = time.monotonic() + 20
    while len(done) < 22 and time.monotonic() < end:
        time.sleep(1e-3)
    assert len(done) == 22
    done.clear()
    early = worker.submit(recorder.request("w", "a", "early"))
    time.sleep(0.1)
    assert not early.done()
    more = [worker.submit(recorder.request("w", str(k), k)) for k in range(8)]
    wait([early, *more], 20)
    assert done[0][0] == "early" and len(done[0]) > 4, "the largest batch, or all callers"
    begin = time.monotonic()
    worker.submit(recorder.request("w", "a", "alone")).result()
    worker.submit(recorder.request("w", "a", "alone again")).result()
    assert time.monotonic() - begin < 3.9, "at most one of them waits: the others stay away"
    worker.close()


@PLACES
def test_any_interleaving_equals_each_stream_offline(tmp_path, place):
    """8 threads write and ask; 3 of them share users; answers equal evaluation of the prefix."""
    store = streams(**in_place(place, tmp_path) | {"sync": "none"})
    begin = threading.Barrier(8)

    def serve(thread: int) -> list:
        rng, log = np.random.default_rng(thread), []
        begin.wait()
        for step in range(12):
            user = f"own {thread} {step % 3}"
            items = list(map(int, rng.integers(0, ITEMS, rng.integers(0, 7))))
            other = f"shared {step % 2}"
            if thread < 3:
                users, lists = [user, other, user], [items, [thread], items]
            else:
                users, lists = [user], [items]
            future = store.write_soon(users, lists)
            query = list(map(int, rng.integers(0, ITEMS, rng.integers(1, 6))))
            (answer,) = store.answer([user], [query])  # behind the write, which may still wait
            log.append((users, lists, future.result(), user, query, answer))
        return log

    with ThreadPoolExecutor(8) as pool:
        logs = list(pool.map(serve, range(8)))
    histories: dict = {}
    shared: dict = {}
    for log in logs:
        for users, lists, lengths, user, query, answer in log:
            for one, items, length in zip(users, lists, lengths, strict=True):
                if one.startswith("shared"):
                    shared.setdefault(one, {})[length] = items[0]
                else:
                    histories[one] = histories.get(one, []) + items
                    assert len(histories[one]) == length
            expected = offline()(histories[user], query)
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
    for user, placed in shared.items():  # the lengths say in which order the threads came
        assert sorted(placed) == list(range(1, 19))
        histories[user] = [placed[length] for length in sorted(placed)]
    same(store, histories)
    store.close()
    if place == "database":
        same(streams(store=tmp_path / "streams.lmdb"), histories)


@PLACES
def test_merged_requests_equal_requests_one_by_one(tmp_path, place):
    merged, alone = streams(**in_place(place, tmp_path), delay=0.0), streams()
    lists, queries = {k: [k] * (2 * k + 1) for k in range(9)}, [[1, 2, 3], [4]] * 5
    hold = threading.Event()
    merged.answer_soon(["x"], [[1]]).add_done_callback(lambda _: hold.wait(20))
    writes = [merged.write_soon([user], [items]) for user, items in lists.items()]
    answers = [
        merged.answer_soon([user], [query]) for user, query in zip(lists, queries, strict=False)
    ]
    hold.set()
    for user, items in lists.items():
        assert alone.write([user], [items]) == writes[user].result()
    for user, query in zip(lists, queries, strict=False):
        (one,), (other,) = answers[user].result(), alone.answer([user], [query])
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@PLACES
def test_a_wrong_length_leaves_everything_as_it_was(tmp_path, place):
    store, histories = streams(**in_place(place, tmp_path)), {"a": [1, 2, 3], "b": [4]}
    assert store.write(list(histories), list(histories.values()), [0, None]) == [3, 1]
    hold = threading.Event()
    store.answer_soon(["x"], [[1]]).add_done_callback(lambda _: hold.wait(20))
    partly = store.write_soon(["b", "a"], [[6], [8]], [1, 9])  # these three are merged
    first = store.write_soon(["b"], [[7]], [1])
    good = store.write_soon(["a"], [[5]], [3])
    again = store.write_soon(["a"], [[5]], [3])  # a retry of the same write
    new = store.write_soon(["new", "a"], [[7], [8]], [0, 9])
    twice = store.write_soon(["b", "b"], [[9], [10, 11]], np.array([2, 3]))
    late = store.write_soon(["b"], [[12]], [5])
    hold.set()
    assert first.result() == [2] and good.result() == [4]
    assert twice.result() == [3, 5] and late.result() == [6]
    for future, actual in ((partly, 3), (again, 4), (new, 4)):
        message = f"user 'a': the stream has {actual} items, and . were expected: nothing was "
        message += r"written. Read info\(user\).length"
        with pytest.raises(WrongLength, match=message) as error:
            future.result()
        assert error.value.user == "a" and error.value.actual == actual
    same(store, {"a": [1, 2, 3, 5], "b": [4, 7, 9, 10, 11, 12], "new": []})
    assert "new" not in store and len(store) == 2
    for lengths, message in (([1, 2], "1 users, but 2 expected lengths"), ([-1], "-1 is no whole")):
        with pytest.raises(ValueError, match=message):
            store.write(["a"], [[1]], lengths)


def test_a_fault_of_the_device_leaves_the_streams_as_they_were(tmp_path, monkeypatch, caplog):
    store = streams(store=tmp_path)
    store.write(["a"], [[1, 2]])
    with monkeypatch.context() as patch:

        def broken(*_):
            raise RuntimeError("out of memory")

        patch.setattr(store._programs, "feed", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            store.write(["a", "b"], [[3], [4]])
    assert "a batch of requests failed" in caplog.text
    assert store.write(["a", "c"], [[5], [6]]) == [3, 1]
    same(store, {"a": [1, 2, 5], "b": [], "c": [6]})


def test_a_callback_must_not_wait_and_a_store_nobody_holds_is_collected(tmp_path):
    store = streams(store=tmp_path)
    caught = []

    def callback(streams):
        try:
            streams.answer(["a"], [[1]])
        except RuntimeError as error:
            caught.append(str(error))

    asked = functools.partial(callback, weakref.proxy(store))
    for future in (store.answer_soon(["a"], [[1]]), store.write_soon(["a"], [[1]])):
        future.add_done_callback(lambda _: asked())
        future.result()
    store.flush()
    assert caught == ["a callback of a future must not wait for another request"] * 2
    store.write_soon(["a"], [[2]])
    threads = store._worker.thread, store._cache.committer.thread
    gone = weakref.ref(store)
    del store, future
    gc.collect()
    for thread in threads:
        thread.join(20)
    assert gone() is None and not any(thread.is_alive() for thread in threads)
    for thread in threading.enumerate():
        if thread.name == "streams-end":  # it closes the database after those two
            thread.join(20)
            assert not thread.is_alive()
    same(streams(store=tmp_path), {"a": [1, 2]})


def test_a_process_that_does_not_close_ends_and_loses_nothing(tmp_path):
    code = (
        "import sys; from tests.serve.test_streams import streams\n"
        "store = streams(store=sys.argv[1], sync='none')\n"
        "for k in range(3): store.write([k], [[1]])\n"
        "store.write_soon(['last'], [[1, 2]])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    same(streams(store=tmp_path), {0: [1], 1: [1], 2: [1], "last": [1, 2]})
