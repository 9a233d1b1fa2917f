"""A database keeps complete rows, names each damage, and is read beside the process that writes."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from unittest.mock import Mock

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmjax.serve.database import (
    Damaged,
    Database,
    Row,
    check_user,
    key_of,
    open_readonly,
    user_of,
)
from rmjax.serve.lmdb_file import checked_size
from rmjax.serve.store import Streams
from tests.serve.test_streams import PARAMS, SHAPES, TASK, same, streams

ABOUT = {"format": 1, "machine": "abc"}
USERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=510),
)


def row(seed: int = 0, size: int = 40) -> Row:
    return Row(seed + 1, 3 * seed, 100.5 + seed, np.random.default_rng(seed).bytes(size))


def filled(path, users=("ann", 7, b"ann"), size: int = 40) -> dict:
    rows = {user: row(seed, size) for seed, user in enumerate(users)}
    base = Database(path, ABOUT)
    base.commit(rows)
    base.close()
    return rows


@given(st.lists(USERS, unique_by=lambda user: (type(user), user)))
@settings(max_examples=50, deadline=None)
def test_keys_are_one_to_one_and_ints_keep_their_order(users):
    for user in users:
        check_user(user)
        assert user_of(key_of(user)) == user and type(user_of(key_of(user))) is type(user)
        assert len(key_of(user)) <= 511 and key_of(user) > b"\0about"
    numbers = [user for user in users if isinstance(user, int)]
    assert sorted(numbers) == sorted(numbers, key=key_of)


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("é" * 256, "has 512 bytes: at most 510 fit"),
        (b"x" * 511, "has 511 bytes"),
        ("\ud800", "is no Unicode text: surrogates"),
        (2**63, "is a int"),
        (None, "is a NoneType"),
    ],
)
def test_users_that_make_no_key_are_named(user, message):
    with pytest.raises(ValueError, match=message):
        check_user(user)


def test_rows_come_back_and_users_are_listed(tmp_path):
    rows = filled(tmp_path / "a" / "b.lmdb", [*range(-1500, 1500), "ann", b"ann", "", b""])
    base = Database(tmp_path / "a" / "b.lmdb", ABOUT)
    assert len(base) == len(rows) and base.about == ABOUT
    assert base.read([*rows, "nobody"]) == rows
    listed = list(base.users())
    assert set(listed) == set(rows) and len(listed) == len(rows)
    assert [user for user in listed if isinstance(user, int)] == list(range(-1500, 1500))
    base.commit({5: None, "ann": row(9), "new": row(8), "nobody": None})
    assert 5 not in base and base.read(["ann", "new"]) == {"ann": row(9), "new": row(8)}
    base.commit({1: row(1)}, clear=True)
    assert list(base.users()) == [1] and base.about == ABOUT
    base.close()


def test_users_are_listed_once_while_they_are_removed(tmp_path):
    """The last user of a full chunk is the last of all, and is gone when the next one begins."""
    filled(tmp_path, range(1024))
    base = Database(tmp_path, ABOUT)
    listed = []
    for user in base.users():
        base.commit({user: None}) if user % 64 == 63 else None
        listed.append(user)
    assert listed == list(range(1024)) and len(base) == 1008
    base.close()


def test_the_map_grows_and_readers_of_other_processes_follow(tmp_path):
    base = Database(tmp_path, ABOUT, map_size=1 << 16)
    base.commit({0: row()})
    code = """
        import sys
        from rmjax.serve.database import Database
        base = Database(sys.argv[1], readonly=True, map_size=1 << 16)
        for line in sys.stdin:
            user = int(line)
            print(len(base), base.read([user])[user].payload[:4].hex(), flush=True)
        base.close()
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", "\n".join(line[8:] for line in code.split("\n")), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin and reader.stdout
    for user in (0, 300, 600):
        base.commit({k: row(k, 4000) for k in range(1, user + 1)})
        reader.stdin.write(f"{user}\n")
        reader.stdin.flush()
        expected = base.read([user])[user]
        assert isinstance(expected, Row)
        assert reader.stdout.readline() == f"{user + 1} {expected.payload[:4].hex()}\n"
    reader.communicate()
    assert (tmp_path / "data.mdb").stat().st_size > 600 * 4000
    base.close()


def test_a_second_writer_is_refused_and_a_reader_needs_a_database(tmp_path):
    base = Database(tmp_path / "a", ABOUT)
    with pytest.raises(RuntimeError, match=f"held by pid {os.getpid()} .* this process: close"):
        Database(tmp_path / "a", ABOUT)
    base.close()
    Database(tmp_path / "a", ABOUT).close()
    with pytest.raises(FileNotFoundError, match="none holds no database of streams"):
        open_readonly(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_every_truncated_database_is_named(tmp_path):
    filled(tmp_path, range(40), size=5000)
    file = tmp_path / "data.mdb"
    content = file.read_bytes()
    for size in (*range(0, len(content), 4096), 1, 100, 5000, len(content) - 1):
        file.write_bytes(content[:size])
        for readonly in (False, True):
            with pytest.raises(ValueError, match=r"data\.mdb is (truncated|no LMDB)"):
                Database(tmp_path, None if readonly else ABOUT, readonly=readonly)
    file.write_bytes(content)
    base = open_readonly(tmp_path)
    assert len(base) == 40
    base.close()


def test_a_file_that_lacks_free_pages_alone_is_complete(tmp_path):
    """LMDB never writes pages that one commit takes and gives up. Free pages have no content."""
    short, shorter = 0, 0
    for seed in range(12):
        rng, path = random.Random(seed), tmp_path / str(seed)
        rows = filled(path, range(200), 270)
        base, file = Database(path, ABOUT), path / "data.mdb"
        for _ in range(2):
            gone = rng.sample(range(200), rng.randint(60, 195))
            base.commit(dict.fromkeys(gone))
            rows = {user: kept for user, kept in rows.items() if user not in gone}
        for k in range(4 * (seed % 2)):  # these use free pages, and free later ones
            base.commit({0: row(k, 270)})
            rows[0] = row(k, 270)
        needed = (base._env.info()["last_pgno"] + 1) * 4096
        base.close()
        content = file.read_bytes()
        short += len(content) < needed
        assert checked_size(file) == needed
        for cut in range(4096, len(content), 4096)[-12:]:
            file.write_bytes(content[:cut])
            try:
                checked_size(file)
            except ValueError:
                continue
            shorter += 1
            file.write_bytes(content[:cut] + b"\xaa" * (len(content) - cut))
            base = open_readonly(path)
            assert base.read(range(200)) == rows, "no page behind the cut was needed"
            base.close()
        file.write_bytes(content)
        base = Database(path, ABOUT)
        base.commit({200 + k: row(k, 270) for k in range(60)})
        assert base.read(range(200)) == rows and len(base) == len(rows) + 60
        base.close()
    assert short >= 3 and shorter >= 3


def test_foreign_files_and_other_models_are_named(tmp_path):
    filled(tmp_path / "streams")
    with pytest.raises(ValueError, match=r"another model \(machine 'abc', this model has 'xyz'\)"):
        Database(tmp_path / "streams", ABOUT | {"machine": "xyz"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("hello" * 9999)
    with pytest.raises(ValueError, match=r"data\.mdb is no LMDB database, or is damaged"):
        Database(tmp_path / "text", ABOUT)
    with lmdb.open(str(tmp_path / "cats")) as env, env.begin(write=True) as transaction:
        transaction.put(b"cat", b"mouse")
    with pytest.raises(ValueError, match="holds no streams of format 1"):
        Database(tmp_path / "cats", ABOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--store=.*file cannot be written to \(it is a file\)"):
        Database(tmp_path / "file", ABOUT)
    with pytest.raises(ValueError, match="store=gs://b/x is an address"):
        Database("gs://b/x", ABOUT)
    assert (tmp_path / "text" / "data.mdb").read_text() == "hello" * 9999


def test_a_kill_while_a_database_is_made_leaves_none_or_an_empty_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr("rmjax.io.atomic.sync", killed)
        patch.setattr("pathlib.Path.rename", killed)
        Database(tmp_path, ABOUT)
    assert not (tmp_path / "data.mdb").exists() and (tmp_path / "making").exists()
    assert filled(tmp_path)
    assert not (tmp_path / "making").exists()


def poison(path, user, at: int = -1) -> None:
    """Changes one bit of a row."""
    with lmdb.open(str(path)) as env, env.begin(write=True) as transaction:
        value = bytearray(transaction.get(key_of(user)))
        value[at] ^= 1
        transaction.put(key_of(user), bytes(value))


def test_every_byte_of_a_row_counts(tmp_path):
    rows = filled(tmp_path)
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as transaction:
        transaction.put(key_of("other"), transaction.get(key_of(7)))
    for place in range(32 + 40):
        poison(tmp_path, "ann", place)
        base = open_readonly(tmp_path)
        read = base.read(["ann", 7, b"ann", "other"])
        base.close()
        poison(tmp_path, "ann", place)
        assert isinstance(read["ann"], Damaged) and read["ann"].user == "ann"
        assert read[7] == rows[7] and read[b"ann"] == rows[b"ann"]
        assert isinstance(read["other"], Damaged), "a row is bound to its key"
    base = open_readonly(tmp_path)
    assert base.read(rows) == rows
    base.close()


def test_a_full_disk_is_named_and_nothing_has_changed(tmp_path):
    rows = filled(tmp_path)
    base = Database(tmp_path, ABOUT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (base._file.stat().st_size, limits[1]))
    try:
        cause = r"data\.mdb: [\d,]+ bytes could not be written \(the file is too large\): free"
        for _ in range(3):
            with pytest.raises(OSError, match=cause):
                base.commit({k: row(k, 5000) for k in range(100)} | {"ann": None})
            assert base.read(["ann", 1, 7]) == {"ann": rows["ann"], 7: rows[7]}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    base.commit({1: row(1, 5000)})
    assert base.read([1]) == {1: row(1, 5000)}
    base.close()
    base = open_readonly(tmp_path)
    assert len(base) == 4
    base.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    message = r"--store=.* cannot be written to \(Read-only file system\): name another directory"
    with pytest.raises(OSError, match=message):
        Database(tmp_path, ABOUT)


def test_without_lmdb_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rmjax\[serve\]'"):
        Streams(TASK, PARAMS, **SHAPES, capacity=4, store=tmp_path)
    assert not list(tmp_path.iterdir())


# The store over a database.


def test_a_damaged_row_stops_its_user_alone(tmp_path):
    store, histories = streams(store=tmp_path), {"ann": [1, 2], "bob": [3], "cy": [4] * 9}
    store.write(list(histories), list(histories.values()))
    store.close()
    poison(tmp_path, "bob")
    store = streams(store=tmp_path)
    hold = threading.Event()
    block = store.answer_soon(["ann"], [[1]])
    block.add_done_callback(lambda _: hold.wait(10))  # so that the worker merges what follows
    answers = [store.answer_soon([user], [[5, 6]]) for user in ("ann", "bob", "cy")]
    both = store.answer_soon(["ann", "bob"], [[5], [6]])
    writes = [store.write_soon([user], [[7]]) for user in ("ann", "bob", "cy")]
    mixed = store.write_soon(["ann", "bob"], [[8], [8]])
    hold.set()
    for future in (answers[1], both, writes[1], mixed):
        with pytest.raises(
            Damaged, match="user 'bob': the row in .* does not fit its checksum"
        ) as e:
            future.result()
        assert e.value.user == "bob"
    assert writes[0].result() == [3] and writes[2].result() == [10]
    histories = {"ann": [1, 2, 7], "cy": [4] * 9 + [7]}
    same(store, histories)
    for act in (store.info, store.memory, lambda user: store.fork(user, ["dan"])):
        with pytest.raises(Damaged):
            act("bob")
    with pytest.raises(Damaged):
        store.save(tmp_path / "saved")
    assert "bob" in store and "dan" not in store and len(store) == 3
    store.reset(["bob"])
    store.write(["bob"], [[9]])
    same(store, histories | {"bob": [9]})


@pytest.mark.parametrize("sync", ["each", "group"])
def test_a_failed_commit_takes_its_writes_back_and_the_store_goes_on(tmp_path, monkeypatch, sync):
    store, histories = streams(store=tmp_path, sync=sync), {"ann": [1, 2], "bob": [3]}
    store.write(list(histories), list(histories.values()))
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(store._cache.database, "commit", full)
        writes = [store.write_soon([user], [[5]]) for user in ("ann", "eve", "ann")]
        for future in writes:
            with pytest.raises(OSError, match="No space left"):
                future.result()
        same(store, histories | {"eve": []})
        for act in (
            lambda: store.reset(["ann"]),
            lambda: store.fork("ann", ["copy"]),
            lambda: store.write(["ann", "bob", "x", "y"], [[1]] * 4),
        ):
            with pytest.raises(OSError, match="No space left"):
                act()
            assert len(store) == 2 and store.info("ann").length == 2
    assert store.write(["ann", "eve"], [[6], [7]], expected_lengths=[2, 0]) == [3, 1]
    histories |= {"ann": [1, 2, 6], "eve": [7]}
    same(store, histories)
    store.close()
    same(streams(store=tmp_path), histories)


def test_writes_that_returned_before_a_failed_commit_are_reported(tmp_path, monkeypatch, caplog):
    store = streams(store=tmp_path, sync="none")
    store.write(["ann"], [[1]])
    store.flush()
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(store._cache.database, "commit", full)
        assert store.write(["ann"], [[2]]) == [2]
        with pytest.raises(OSError, match="No space left"):
            store.flush()
        assert "writes that had returned are lost" in caplog.text
        same(store, {"ann": [1]})
        store.write(["ann"], [[2]])
        with pytest.raises(OSError, match="No space left"):
            store.close()
    same(streams(store=tmp_path), {"ann": [1]})


@pytest.mark.parametrize("sync", ["each", "group", "none"])
def test_no_write_returns_before_its_commit(tmp_path, monkeypatch, sync):
    """Commits are stopped at their beginning and at their end."""
    store = streams(store=tmp_path, sync=sync)
    commit, begin, end = store._cache.database.commit, threading.Event(), threading.Event()

    def slow(*given, **named):
        assert begin.wait(20)
        commit(*given, **named)
        assert end.wait(20)

    monkeypatch.setattr(store._cache.database, "commit", slow)
    for _ in range(3):
        writes = [store.write_soon([user], [[1]]) for user in ("ann", "bob", "ann")]
        retry = store.write_soon(["ann"], [[1]], expected_lengths=[0])
        store.answer(["ann"], [[1]])  # the worker has applied the writes
        for event in (begin, end):
            if sync != "none":
                assert not any(future.done() for future in [*writes, retry])
            event.set()
        lengths = [future.result() for future in writes]
        assert [n - lengths[0][0] for (n,) in lengths] == [0, lengths[1][0] - lengths[0][0], 1]
        with pytest.raises(ValueError, match="0 were expected"):
            retry.result()
        begin.clear(), end.clear()
    begin.set(), end.set()
    store.close()


def test_more_users_than_rows_on_the_device(tmp_path):
    """A cache of 4 rows answers as a store that keeps all 50 users on the device."""
    small = streams(store=tmp_path, sync="none")
    large, rng = streams(capacity=64), np.random.default_rng(3)
    for step in range(60):
        users = [int(user) for user in rng.integers(0, 50, rng.integers(1, 5))]
        items = [list(map(int, rng.integers(0, 50, rng.integers(0, 9)))) for _ in users]
        assert small.write(users, items) == large.write(users, items)
        asked = [int(user) for user in rng.integers(0, 60, 7)]
        queries = [[1, 2, 3]] * 7
        for one, other in zip(
            small.answer(asked, queries), large.answer(asked, queries), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        if step % 20 == 9:
            copy = f"copy {step}"
            small.fork(users[0], [copy])
            large.fork(users[0], [copy])
            assert small.info(copy)[::2] == large.info(copy)[::2]
        if step % 20 == 19:
            small.reset(users[:1])
            large.reset(users[:1])
            assert users[0] not in small
    assert len(small) == len(large) > 40
    assert set(small.users()) == set(large.users())
    assert len(small._cache._entries) <= 4
    with pytest.raises(ValueError, match="5 users in one write, but capacity is 4"):
        small.write(range(5), [[]] * 5)
    small.close()
    again = streams(store=tmp_path)
    assert all(again.info(user).length == large.info(user).length for user in large.users())


def test_the_least_recently_used_rows_leave_the_device(tmp_path):
    store = streams(store=tmp_path)
    for user in range(4):
        store.write([user], [[user]])
    store.answer([0, 1], [[1], [1]])
    store.write([0, 4], [[5], [6]])
    assert set(store._cache._entries) == {0, 1, 3, 4}
    store.answer([2, 5], [[1], [1]])
    assert set(store._cache._entries) == {0, 1, 2, 4}, "a user without a stream takes no row"
    same(store, {0: [0, 5], 1: [1], 2: [2], 3: [3], 4: [6]})


def test_options_out_of_range_are_named(tmp_path):
    for options, message in (
        ({"store": tmp_path, "capacity": 3}, "capacity = 3: with a store .* largest batch, 4"),
        ({"sync": "never"}, "sync = 'never': must be one of each, group, none"),
        ({"delay": -1.0}, "need delay >= 0"),
        ({"queue": 0}, "queue >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Streams(TASK, PARAMS, **(SHAPES | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("free", "words"), [(999, "no space is left"), (1001, "Input/output")])
def test_an_error_of_a_disk_without_room_says_so(tmp_path, monkeypatch, free, words):
    """LMDB gives EIO, not ENOSPC, where a part of its pages still fits."""
    filled(tmp_path)
    base, disk = Database(tmp_path, ABOUT), Mock(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    monkeypatch.setattr(base, "_apply", Mock(side_effect=OSError(errno.EIO, "short write")))
    with pytest.raises(OSError, match=words):
        base.commit({"new": row(size=1000 - 32)})
    base.close()


def test_a_database_that_cannot_be_opened_again_says_so_until_it_can(tmp_path, monkeypatch):
    rows = filled(tmp_path)
    base = Database(tmp_path, ABOUT)
    with monkeypatch.context() as patch:
        patch.setattr(base, "_apply", Mock(side_effect=lmdb.MapFullError("full")))
        patch.setattr(base, "_opened", Mock(side_effect=ValueError("cannot be opened")))
        patch.setattr(base, "_map_size", 1 << 62)  # `set_mapsize` refuses it
        with pytest.raises(OSError, match="bytes could not be written"):
            base.commit({1: row(1)})
        for act in (lambda: base.read(["ann"]), lambda: len(base), lambda: base.commit({})):
            with pytest.raises(OSError, match="cannot be opened"):
                act()
    assert base.read(["ann"]) == {"ann": rows["ann"]}
    base.commit({1: row(1)})
    assert 1 in base
    base.close()
    with pytest.raises(OSError, match="cannot be read"):
        base.read(["ann"])


def test_pages_of_killed_readers_are_used_before_the_map_grows(tmp_path, monkeypatch):
    filled(tmp_path)
    base = Database(tmp_path, ABOUT)
    apply, size = base._apply, base._map_size
    full = Mock(side_effect=[lmdb.MapFullError("full"), None, lmdb.MapFullError("full"), None])
    env = Mock(wraps=base._env, reader_check=Mock(side_effect=[1, 0]))
    monkeypatch.setattr(base, "_env", env)
    monkeypatch.setattr(base, "_apply", full)
    env.begin = base._env._mock_wraps.begin
    base.commit({1: row(1)})
    assert base._map_size == size and full.call_count == 2
    base.commit({1: row(1)})
    assert base._map_size == 2 * size and full.call_count == 4
    monkeypatch.setattr(base, "_apply", apply)
    base.commit({1: row(1)})
    assert 1 in base
    base.close()


def test_an_error_of_lmdb_itself_does_not_blame_the_disk(tmp_path, monkeypatch):
    filled(tmp_path)
    base = Database(tmp_path, ABOUT)
    monkeypatch.setattr(base, "_apply", Mock(side_effect=lmdb.CorruptedError("bad page")))
    with pytest.raises(OSError, match=r"bad page.*: open the database again; if it stays, restore"):
        base.commit({1: row(1)})
    base.close()
