"""A store refuses bad input, survives failures half way, and never mixes up users' memories."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from rmjax.io import atomic, checkpoint
from rmjax.serve.store import InFiles, OnDevice, Streams
from tests.serve import test_streams
from tests.serve.test_streams import PARAMS, SHAPES, TASK, N, same


@functools.cache
def programs() -> tuple:
    store = test_streams.streams()
    return store._feed, store._answer


def streams(**options) -> Streams:
    """A store whose programs are compiled once for all tests."""
    store = test_streams.streams(**({"capacity": 4} | options))
    store._feed, store._answer = programs()
    return store


FULL = OSError(errno.ENOSPC, "No space left on device")
PLACES = pytest.mark.parametrize("place", ["device", "files"])


def fail(*_, **__):
    raise FULL


def store_in(place: str, tmp_path: Path, **options) -> Streams:
    return streams(folder=tmp_path / "rows" if place == "files" else None, **options)


@pytest.mark.parametrize(
    "user, kind",
    [(("shop", 3), "tuple"), (b"ann", "bytes"), (1.0, "float"), (None, "NoneType"),
     (True, "bool"), ([1], "list"), (2**63, "int")],
)  # fmt: skip
def test_a_user_of_another_type_is_refused_before_anything_is_written(tmp_path, user, kind):
    store = streams(folder=tmp_path)
    for act in (
        lambda: store.write(["ann", user], [[1], [2]]),
        lambda: store.answer([user], [[1]]),
        lambda: store.reset([user]),
        lambda: store.fork("ann", [user]),
    ):
        message = rf"user .* is a {kind}: a user is a str or an int of 64 bits"
        with pytest.raises(ValueError, match=message):
            act()
    assert len(store) == 0
    store.write(["ann", np.str_("bob"), np.int64(7)], [[1], [2], [3]])
    store.close()
    same(streams(folder=tmp_path), {"ann": [1], "bob": [2], 7: [3]})


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
    after = streams(folder=tmp_path / "rows") if place == "files" else None
    for act in CALLS.values():
        message = "these streams are closed: open them again with Streams"
        with pytest.raises(RuntimeError, match=message):
            act(store, tmp_path)
    if after is not None:
        same(after, {"ann": [1]})


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
    assert len(messages) == 12 and all(cause in message for message in messages.values())
    same(store, {"ann": [1]})


def index_with(**values):
    """A change of an index."""
    return lambda index: index.update(values)


HARMS = {
    "two users of one slot": (index_with(slots=[0, 0, 2]), r"slots\[1\] is 0, .*different"),
    "a user twice": (index_with(users=["ann", "ann", "cy"]), r"users\[1\] is 'ann', .*twice"),
    "a slot below zero": (index_with(slots=[0, -1, 2]), r"slots\[1\] is -1, .*0 \.\. 3"),
    "a slot beyond": (index_with(slots=[0, 1, 10**9]), r"slots\[2\] is 1000000000, .*0 \.\. 3"),
    "no slot": (index_with(slots=[0, None, 2]), r"slots\[1\] is None"),
    "true": (index_with(slots=[0, True, 2]), r"slots\[1\] is True"),
    "a list as a user": (index_with(users=["ann", ["bob"], "cy"]), r"users\[1\]: .*'bob'.* a list"),
    "fewer slots": (index_with(slots=[0, 1]), "3 users, but 2 slots"),
    "no users": (lambda index: index.pop("users"), "users is missing or is not a list"),
    "capacity": (index_with(capacity=10**9), r"\.bin has \d+ of \d+ bytes"),
    "capacity and a slot": (
        index_with(capacity=10**9, slots=[0, 1, 10**9 - 1]),
        r"\.bin has \d+ of \d+ bytes",
    ),
    "half a capacity": (
        index_with(capacity=1.5),
        "capacity is 1.5: it must be a whole number, at least 1",
    ),
    "a slot to erase": (index_with(erase=[1]), r"erase\[0\] is 1"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_an_edited_index_is_refused_and_the_field_is_named(tmp_path, harm):
    store = streams(folder=tmp_path)
    store.write(["ann", "bob", "cy"], [[1], [2], [3]])
    store.close()
    file = tmp_path / "index.json"
    index = json.loads(file.read_text())
    del index["sha256"]  # as after an edit on purpose
    change, message = HARMS[harm]
    change(index)
    file.write_text(json.dumps(index))
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        streams(folder=tmp_path)
    assert str(tmp_path) in str(error.value)
    after = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert before == after, "no file may grow"


def test_a_damaged_index_is_refused_and_the_cause_is_named(tmp_path):
    store = streams(folder=tmp_path)
    store.write(["ann", "bob"], [[1], [2]])
    store.close()
    file = tmp_path / "index.json"
    text = file.read_text()
    for damaged, message in (
        (text.replace("[0, 1]", "[1, 0]"), "the digest does not fit the content"),
        (text[:-9], "no whole JSON"),
        ("", "the file is empty"),
        ("[]", "not an index of streams"),
    ):
        assert damaged != text
        file.write_text(damaged)
        with pytest.raises(ValueError, match=f"index.json.* {message}"):
            streams(folder=tmp_path)
    file.write_text(text)
    same(streams(folder=tmp_path), {"ann": [1], "bob": [2]})


def test_flush_writes_rows_before_the_index_and_frees_slots_after_it(tmp_path, monkeypatch):
    store = streams(folder=tmp_path, capacity=4)
    store.write(["ann", "bob"], [[1, 2], [3]])
    store.reset(["ann"])
    steps, write, flush = [], atomic.write, InFiles.flush
    monkeypatch.setattr(InFiles, "flush", lambda self: (steps.append("rows"), flush(self)))

    def index(path, content):
        steps.append(path.name)
        assert store._free == [] and store._released == [0]
        write(path, content)

    monkeypatch.setattr(atomic, "write", index)
    store.flush()
    assert steps[:2] == ["rows", "index.json"] and store._free == [0] and store._released == []
    store.reset(["bob"])
    monkeypatch.setattr(atomic, "write", fail)
    with pytest.raises(OSError):
        store.flush()
    store.write(["eve"], [[9]])  # not into bob's slot: the index on the disk still lists bob
    store._held.close()  # a crash
    monkeypatch.undo()
    same(streams(folder=tmp_path), {"bob": [3]})


def test_a_reset_erases_bytes_from_the_files(tmp_path):
    secret = [41, 42, 43]
    pattern = np.asarray(secret, np.int32).tobytes()
    store = streams(folder=tmp_path, capacity=4)
    store.write(["ann", "bob"], [secret, [1] * 9])
    store.flush()
    rows = {path: path.read_bytes() for path in tmp_path.glob("*.bin")}
    assert any(pattern in content for content in rows.values())
    slots = next(path for path in rows if path.name.endswith("slots.bin"))
    size = len(rows[slots]) // 4
    store.reset(["bob", "ann"])
    store.flush()
    assert not any(pattern in path.read_bytes() for path in rows)
    empty = np.asarray(PARAMS["machine"]["slots"], np.float32).tobytes()
    assert slots.read_bytes()[: 2 * size] == 2 * empty, "both rows must be those of an empty stream"


def test_a_reset_erases_bytes_after_a_crash_behind_the_index(tmp_path, monkeypatch):
    store = streams(folder=tmp_path, capacity=4)
    store.write(["ann", "bob"], [[41, 42, 43], [1]])
    store.reset(["ann"])
    with monkeypatch.context() as patch:
        patch.setattr(Streams, "_fill", fail)
        with pytest.raises(OSError):
            store.flush()
    store._held.close()
    pattern = np.asarray([41, 42, 43], np.int32).tobytes()
    assert any(pattern in path.read_bytes() for path in tmp_path.glob("*.bin"))
    same(streams(folder=tmp_path), {"bob": [1]})
    assert not any(pattern in path.read_bytes() for path in tmp_path.glob("*.bin"))


def test_a_reset_erases_bytes_on_the_device():
    store = streams(capacity=4)
    store.write(["ann", "bob"], [[41, 42, 43], [1]])
    store.reset(["ann"])
    assert isinstance(store._store, OnDevice)
    rows = jax.tree.map(np.asarray, store._store.rows)
    assert not rows.tail[0].any() and not rows.tail_len[0]
    np.testing.assert_array_equal(rows.memory.slots[0], PARAMS["machine"]["slots"])


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
    return lambda arrays, about: about.update(users=list(names))


STRANGE = {
    "a user twice": (users("a", 7, "c", "a"), r"users\[3\] is 'a', who is listed twice"),
    "a list as a user": (users("a", 7, ["c"], "d"), r"users\[2\]: .* is a list"),
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
    store = streams(folder=tmp_path / "rows")
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
    for name in ("grow", "put"):
        with monkeypatch.context() as patch:
            patch.setattr(store._store, name, fail)
            with pytest.raises(OSError):
                store.load(saved)
        same(store, histories)
        assert len(store) == 2
    put, calls = store._store.put, []

    def put_once(*given):
        if calls:
            fail()
        calls.append(put(*given))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_batches", [1])
        patch.setattr(store._store, "put", put_once)
        with pytest.raises(OSError):
            store.load(saved)
    same(store, histories)
    store.load(saved)
    same(store, SAVED)
    assert len(store) == 4
    if place == "files":
        store.close()
        same(streams(folder=tmp_path / "rows"), SAVED)


def test_memories_that_are_not_finite_are_not_saved(tmp_path):
    store = Streams(TASK, jax.tree.map(lambda x: x * np.nan, PARAMS), **SHAPES)
    store.write(["ann"], [[1]])
    with pytest.raises(ValueError, match="user 'ann': memory/slots holds nan"):
        store.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_full_disk_is_named_and_close_releases_the_folder(tmp_path, monkeypatch):
    store = streams(folder=tmp_path / "rows")
    store.write(["ann"], [[1]])
    store.flush()
    store.write(["bob"], [[2]])
    monkeypatch.setattr(np.memmap, "flush", fail)
    cause = r"bytes could not be written \(no space is left\): free"
    with pytest.raises(OSError, match=rf"rows.\S+\.bin: [\d,]+ {cause}"):
        store.flush()
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"index.json: \d+ {cause}"):
        store.close()
    monkeypatch.undo()
    same(streams(folder=tmp_path / "rows"), {"ann": [1]})


def test_the_home_directory_is_expanded_and_urls_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store = streams(folder="~/rows")
    store.write(["ann"], [[1]])
    store.save("~/saved")
    store.load("~/saved")
    store.close()
    assert not Path("~").exists()
    assert Path("saved").is_dir() and Path("rows", "index.json").is_file()
    with pytest.raises(ValueError, match="folder=gs://b/x is an address"):
        streams(folder="gs://b/x")
    other = streams()
    for act in (other.save, other.load):
        with pytest.raises(ValueError, match="path=gs://b/x is an address"):
            act("gs://b/x")
        with pytest.raises(ValueError, match=r"path=.*lr\[0.01\] has '\[' in its whole path"):
            act("lr[0.01]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "saved"]
