"""A store refuses bad input, survives failures half way, and never mixes up users' memories."""

from __future__ import annotations

import errno
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from rmjax.io import checkpoint
from rmjax.serve.committer import Change
from rmjax.serve.store import Streams
from rmjax.serve.store import _end as end
from tests.serve import test_streams
from tests.serve.test_streams import PARAMS, SHAPES, TASK, N, same


def streams(**options) -> Streams:
    return test_streams.streams(**({"capacity": 4} | options))


FULL = OSError(errno.ENOSPC, "No space left on device")
PLACES = pytest.mark.parametrize("place", ["device", "database"])


def fail(*_, **__):
    raise FULL


def store_in(place: str, tmp_path: Path, **options) -> Streams:
    return streams(**test_streams.in_place(place, tmp_path), **options)


@pytest.mark.parametrize(
    "user, kind",
    [(("shop", 3), "tuple"), (1.0, "float"), (None, "NoneType"),
     (True, "bool"), ([1], "list"), (2**63, "int")],
)  # fmt: skip
def test_a_user_of_another_type_is_refused_before_anything_is_written(tmp_path, user, kind):
    store = streams(store=tmp_path)
    for act in (
        lambda: store.write(["ann", user], [[1], [2]]),
        lambda: store.answer([user], [[1]]),
        lambda: store.reset([user]),
        lambda: store.fork("ann", [user]),
    ):
        message = rf"user .* is a {kind}: a user is a str, bytes or an int of 64 bits"
        with pytest.raises(ValueError, match=message):
            act()
    assert len(store) == 0
    store.write(["ann", np.str_("bob"), np.int64(7)], [[1], [2], [3]])
    store.close()
    same(streams(store=tmp_path), {"ann": [1], "bob": [2], 7: [3]})


def test_a_str_instead_of_a_list_and_lists_of_other_lengths_are_refused():
    store = streams()
    for act in (
        lambda: store.write("ann", [[3], [4], [5]]),
        lambda: store.answer("ann", [[3]]),
        lambda: store.reset("ann"),
        lambda: store.fork("ann", "bob"),
    ):
        message = r"users='(ann|bob)' is one user: give a list, as \['(ann|bob)'\]"
        with pytest.raises(ValueError, match=message):
            act()
    message = "1 users, but 2 lists of items: give one list for each user"
    with pytest.raises(ValueError, match=message):
        store.write(["ann"], [[3], [4]])
    with pytest.raises(ValueError, match=r"2 users, but 1 lists of queries"):
        store.answer(["ann", "bob"], [[3]])
    message = "user 'ann': items must be one flat list"
    with pytest.raises(ValueError, match=rf"{message}, got shape \(2, 2\)"):
        store.write(["ann"], [[[3, 4], [5, 6]]])
    with pytest.raises(ValueError, match=f"{message} of whole numbers"):
        store.write(["ann"], [[[3], [4, 5]]])
    with pytest.raises(ValueError, match=rf"{message}, got 3: give \[3\]"):
        store.write(["ann"], [3])
    assert len(store) == 0


@PLACES
def test_threads_get_the_results_of_calls_in_turn(tmp_path, place):
    store, histories = store_in(place, tmp_path), {}
    rng = np.random.default_rng(0)
    for user in range(8):
        histories[user] = [
            list(map(int, rng.integers(0, 50, rng.integers(1, N)))) for _ in range(4)
        ]
    begin = threading.Barrier(8)

    def serve(user: int) -> None:
        begin.wait()
        for part in histories[user]:
            store.write([user], [part])
            store.answer([user], [[1, 2]])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, histories))
    assert len(store) == 8
    same(store, {user: sum(parts, []) for user, parts in histories.items()})


@PLACES
def test_a_closed_store_refuses_every_call(tmp_path, place):
    store = store_in(place, tmp_path)
    store.write(["ann"], [[1]])
    store.close()
    store.close()  # closing twice is allowed
    after = store_in(place, tmp_path)
    for act in CALLS.values():
        message = "these streams are closed: open them again with Streams"
        with pytest.raises(RuntimeError, match=message):
            act(store, tmp_path)
    same(after, {"ann": [1] if place == "database" else []})


CALLS = {
    "write": lambda store, path: store.write(["ann"], [[2]]),
    "answer": lambda store, path: store.answer(["ann"], [[2]]),
    "wait": lambda store, path: store.wait(),
    "reset": lambda store, path: store.reset(["ann"]),
    "fork": lambda store, path: store.fork("ann", ["bob"]),
    "save": lambda store, path: store.save(path / "saved"),
    "load": lambda store, path: store.load(path / "saved"),
    "flush": lambda store, path: store.flush(),
    "compile": lambda store, path: store.compile(),
    "len": lambda store, path: len(store),
    "contains": lambda store, path: "ann" in store,
    "info": lambda store, path: store.info("ann"),
    "memory": lambda store, path: store.memory("ann"),
    "users": lambda store, path: list(store.users()),
}


@PLACES
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning", "ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_refuses_every_call(tmp_path, place):
    store = store_in(place, tmp_path)
    store.write(["ann"], [[1]])
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)

    def child() -> None:
        messages = {}
        for name, act in (CALLS | {"close": lambda store, path: store.close()}).items():
            try:
                messages[name] = f"{name} did not fail: {act(store, tmp_path)}"
            except RuntimeError as error:
                messages[name] = str(error)
        send.send(messages)

    process = context.Process(target=child)
    process.start()
    assert receive.poll(30)
    messages = receive.recv()
    process.join()
    cause = "this process was forked from it: start it with multiprocessing's 'spawn'"
    assert len(messages) == 15 and all(cause in message for message in messages.values())
    same(store, {"ann": [1]})


def test_a_reset_erases_bytes_on_the_device():
    store = streams(capacity=4)
    store.write(["ann", "bob"], [[41, 42, 43], [1]])
    store.reset(["ann"])
    rows = jax.tree.map(np.asarray, store._cache.rows.rows)
    (slot,) = np.flatnonzero(rows.memory.segments == 0)[:1]
    assert (rows.tail != 41).all() and (rows.tail != 43).all()
    np.testing.assert_array_equal(rows.memory.slots[slot], PARAMS["machine"]["slots"])


SAVED = {"a": [1, 2, 3, 4, 5], 7: [3], "c": [4], "d": [5] * 9}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    store = streams()
    store.write(list(SAVED), list(SAVED.values()))
    path = tmp_path_factory.mktemp("streams") / "saved"
    store.save(path)
    return path


def changed(tmp_path: Path, saved: Path, change) -> Path:
    """The saved streams with changed content and right digests."""
    manifest: dict = {}

    def like(content: dict):
        manifest.update(content)
        return {name: np.zeros(shape, dtype) for name, (dtype, shape) in content["leaves"].items()}

    arrays = checkpoint.load_tree(saved, like)
    about = {"streams": manifest["streams"]}
    change(arrays, about["streams"])
    checkpoint.save_tree(tmp_path / "changed", arrays, about)
    return tmp_path / "changed"


def put(name, place, value):
    return lambda arrays, about: arrays[name].__setitem__(place, value)


def users(*names):
    return lambda arrays, about: about.update(users=list(names), written=[0.0] * len(names))


STRANGE = {
    "a user twice": (users("a", 7, "c", "a"), r"users\[3\] is 'a', who is listed twice"),
    "a list as a user": (users("a", 7, ["c"], "d"), r"users\[2\]: .* is a list"),
    "no times": (
        lambda _, about: about.update(written=[1.0, "noon"]),
        "written is no list of 4 numbers",
    ),
    "no users": (lambda _, about: about.pop("users"), "users is missing or is not a list"),
    "fewer users": (users("a", 7), r"expected float32\[2, 4, 8\]"),
    "not a number": (put("memory/slots", (1, 2, 3), np.nan), "user 7: memory/slots holds nan"),
    "infinite": (put("memory/slots", (3, 0, 0), np.inf), "user 'd': memory/slots holds inf"),
    "a long tail": (put("tail_len", 1, 9999), r"user 7: tail_len holds 9999, outside 0 \.\. 3"),
    "a tail below zero": (put("tail_len", 0, -1), r"user 'a': tail_len holds -1, outside 0 \.\. 3"),
    "a strange item": (put("tail", (2, 0), 50), r"user 'c': tail holds 50, outside 0 \.\. 49"),
    "segments below zero": (put("memory/segments", 0, -5), r"user 'a': memory/segments holds -5"),
}


@pytest.mark.parametrize("harm", STRANGE)
def test_impossible_saved_streams_are_refused_and_nobody_is_lost(tmp_path, saved, harm):
    change, message = STRANGE[harm]
    path = changed(tmp_path, saved, change)
    store = streams(store=tmp_path / "rows")
    store.write(["ann", "bob"], [[1], [2]])
    with pytest.raises(ValueError, match=message) as error:
        store.load(path)
    assert str(path) in str(error.value)
    same(store, {"ann": [1], "bob": [2], "a": []})
    assert len(store) == 2


@PLACES
def test_a_load_without_room_leaves_the_store_as_it_was(tmp_path, saved, place, monkeypatch):
    store, histories = store_in(place, tmp_path), {"ann": [1], "bob": [2]}
    store.write(list(histories), list(histories.values()))
    rows = store._cache.rows
    failing = [(rows, "grow"), (rows, "put")]
    for part in failing if place == "device" else [(store._cache.database, "commit")]:
        with monkeypatch.context() as patch:
            patch.setattr(*part, fail)
            with pytest.raises(OSError):
                store.load(saved)
        same(store, histories)
        assert len(store) == 2
    store.load(saved)
    same(store, SAVED)
    assert len(store) == 4
    if place == "database":
        store.close()
        same(store_in(place, tmp_path), SAVED)


def test_a_load_that_fails_half_way_leaves_the_store_as_it_was(saved, monkeypatch):
    store, histories = streams(), {"ann": [1], "bob": [2]}
    store.write(list(histories), list(histories.values()))
    put, calls = store._cache.rows.put, []

    def put_once(*given):
        if calls:
            fail()
        calls.append(put(*given))

    with monkeypatch.context() as patch:
        patch.setattr(store._cache, "_batches", [1])
        patch.setattr(store._cache.rows, "put", put_once)
        with pytest.raises(OSError):
            store.load(saved)
    same(store, histories)


def test_a_store_that_does_not_fit_the_device_releases_its_database(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rmjax.serve.cache.OnDevice", fail)
        with pytest.raises(OSError, match="No space left"):
            streams(store=tmp_path)
    streams(store=tmp_path).close()


def test_memories_that_are_not_finite_are_not_saved(tmp_path):
    store = Streams(TASK, jax.tree.map(lambda x: x * np.nan, PARAMS), **SHAPES)
    store.write(["ann"], [[1]])
    with pytest.raises(ValueError, match="user 'ann': memory/slots holds nan"):
        store.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_home_directory_is_expanded_and_urls_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store = streams(store="~/rows")
    store.write(["ann"], [[1]])
    store.save("~/saved")
    store.load("~/saved")
    store.close()
    assert not Path("~").exists()
    assert Path("saved").is_dir() and Path("rows", "data.mdb").is_file()
    with pytest.raises(ValueError, match="store=gs://b/x is an address.*LMDB needs a local disk"):
        streams(store="gs://b/x")
    other = streams()
    for act in (other.save, other.load):
        with pytest.raises(ValueError, match="path=gs://b/x is an address"):
            act("gs://b/x")
        with pytest.raises(ValueError, match=r"path=.*lr\[0.01\] has '\[' in its whole path"):
            act("lr[0.01]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "saved"]


def test_a_callback_cannot_close_the_store(tmp_path):
    store, errors = streams(store=tmp_path), []

    def callback(_):
        try:
            store.close()
        except RuntimeError as error:
            errors.append(str(error))

    for future in (store.answer_soon(["ann"], [[1]]), store.write_soon(["ann"], [[1]])):
        future.add_done_callback(callback)
        future.result(20)
    store.flush()
    assert errors == ["a callback of a future must not close the store"] * 2
    assert store.write(["ann"], [[2]]) == [2]
    store.close()
    for late in (store._cache.committer.settle, lambda: store._cache._commit({"ann": None})):
        with pytest.raises(RuntimeError, match="these streams are closed"):
            late()


def test_a_store_that_ends_in_one_of_its_threads_commits_and_closes(tmp_path):
    """The thread of the worker, or of the committer, may drop the last reference to a store."""
    for place in ("worker", "committer"):
        store = streams(store=tmp_path)
        parts, hold = store._parts, threading.Event()
        soon = store.answer_soon if place == "worker" else store.write_soon
        block = store.answer_soon(["ann"], [[1]])
        block.add_done_callback(lambda _, hold=hold: hold.wait(20))
        ended = soon(["ann"], [[1]])
        ended.add_done_callback(lambda _, parts=parts: end(*parts))
        last = store.write_soon([place], [[1, 2]])
        hold.set()
        assert last.result(20) == [2]
        for thread in (parts[1].thread, parts[2].thread):
            thread.join(20)
            assert not thread.is_alive()
        for _ in range(200):
            try:
                again = streams(store=tmp_path)
                break
            except RuntimeError:  # the database is being closed
                time.sleep(0.01)
        assert again.info(place).length == 2
        again.close()


def test_writes_that_are_lost_are_reported_once(tmp_path, monkeypatch):
    store = streams(store=tmp_path, sync="none")
    with monkeypatch.context() as patch:
        patch.setattr(store._cache.database, "commit", fail)
        patch.setattr(store._cache.committer, "_report", lambda: True)  # so that `flush` is first
        for _ in range(2):
            store.write(["ann"], [[1]])
            with pytest.raises(OSError, match="No space left"):
                store.flush()
    store.flush()
    store.close()


def test_a_commit_whose_report_fails_does_not_end_the_store(tmp_path, caplog):
    store = streams(store=tmp_path)

    def done(_):
        raise ZeroDivisionError("of a report")

    store._cache.committer.add(Change(dict, done))
    assert store.write(["ann"], [[1]]) == [1]
    assert "a commit could not be reported" in caplog.text


@PLACES
def test_a_fault_between_two_batches_of_a_write_leaves_the_streams_as_they_were(
    tmp_path, monkeypatch, place
):
    store, histories = store_in(place, tmp_path), {"ann": [1, 2], "bob": [3]}
    store.write(list(histories), list(histories.values()))
    put, calls = store._cache.rows.put, []

    def put_once(*given):
        calls.append(given)
        if len(calls) == 2:
            fail()
        put(*given)

    with monkeypatch.context() as patch:
        patch.setattr(store._cache.rows, "put", put_once)
        with pytest.raises(OSError, match="No space left"):
            store.write(["ann", "eve", "bob"], [[4], [5], [6] * 3 * N])  # two shapes
    assert len(calls) > 1 and len(store) == 2
    same(store, histories | {"eve": []})
    assert store.write(["ann", "bob", "dan"], [[7], [8], [9]], [2, 1, 0]) == [3, 2, 1]
    same(store, {"ann": [1, 2, 7], "bob": [3, 8], "dan": [9], "eve": []})


def test_writers_wait_for_a_disk_that_is_slower_than_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.serve.cache._BACKLOG", 3)
    store, go, most = streams(store=tmp_path, sync="none"), threading.Event(), []
    commit, committing = store._cache.database.commit, store._cache.committer
    store.write(["ann"], [[0]])  # compiles
    store.flush()

    def slow(*given, **named):
        assert go.wait(20)
        commit(*given, **named)

    monkeypatch.setattr(store._cache.database, "commit", slow)
    writes = []
    for k in range(12):
        writes.append(store.write_soon(["ann"], [[k]]))
        time.sleep(0.02)
        most.append(committing.waiting)
    assert max(most) == 4 and not writes[-1].done()
    go.set()
    assert [write.result(20) for write in writes] == [[k + 2] for k in range(12)]
    store.close()


def test_questions_about_committed_users_force_no_commit(tmp_path, monkeypatch):
    store = streams(store=tmp_path)
    store.write(["ann", "bob"], [[1], [2, 3]])
    settle = Mock(wraps=store._cache.committer.settle)
    monkeypatch.setattr(store._cache.committer, "settle", settle)
    later = store.write_soon(["ann"], [[1]])
    assert store.info("bob").length == 2 and len(store) == 2
    settle.assert_not_called()
    assert later.result() == [2]
    later = store.write_soon(["eve"], [[1]])
    assert len(store) == 3 and store.info("eve").length == 1
    later.result()
    store.close()


def test_a_device_that_fails_twice_is_named(monkeypatch):
    store = streams()
    store.write(["ann", "bob"], [[1], [2]])
    put, calls = store._cache.rows.put, []

    def put_once(*given):
        calls.append(put(*given) if not calls else fail())

    monkeypatch.setattr(store._cache.rows, "put", put_once)
    with pytest.raises(RuntimeError, match=r"the streams of \['ann', 'bob'\] and 0 more may be wr"):
        store.write(["ann", "bob"], [[4], [6] * 3 * N])
