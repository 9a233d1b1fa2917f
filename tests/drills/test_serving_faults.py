"""Drills: each fault from outside happens to a service once; it names the fault, the rest goes on.

python -m pytest tests/drills/test_serving_faults.py -m slow -n0
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import lmdb
import numpy as np
import pytest

from rmjax.serve.client import Client, ServiceError
from tests.serve.process import compiled, log_of, refused, served
from tests.serve.served import IDS

pytestmark = pytest.mark.slow
HISTORIES = {"ann": IDS[1:4], "bob": IDS[:25], 7: IDS[4:5] * 11}
QUERY = IDS[5:8]
mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk"
)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with patch.dict(os.environ, compiled(tmp_path_factory.mktemp("compiled"))):
        yield


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A store with `HISTORIES`; tests copy it."""
    store = tmp_path_factory.mktemp("filled") / "streams.lmdb"
    with served(store) as (_, client):
        client.write(list(HISTORIES), list(HISTORIES.values()))
    return store


@pytest.fixture
def store(tmp_path, filled) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "streams.lmdb"))


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Callable[[str], int]]:
    """Mounts a disk of a size; yields a function that mounts it again with other options."""
    path.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        yield lambda options: subprocess.check_call(["mount", "-o", f"remount,{options}", path])
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def failure(act: Callable, *args) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        act(*args)
    return caught.value


def answers(client: Client) -> dict:
    return {user: client.answer([user], [QUERY])[0].tolist() for user in HISTORIES}


@mounts
def test_a_full_disk(tmp_path):
    """The write that does not fit fails as a whole. Answers and small writes go on."""
    log = {}
    with small_disk(tmp_path / "disk", "600k") as remount:
        store = tmp_path / "disk" / "streams.lmdb"
        with served(store) as (process, client):
            client.write(list(HISTORIES), list(HISTORIES.values()))
            expected, k = answers(client), 0
            while True:
                users = [f"{k}-{i}" for i in range(64)]
                try:
                    client.write(users, [[IDS[k], IDS[i % 50]] for i in range(64)])
                except ServiceError as error:
                    assert error.status == 503 and "cannot be written" in str(error)
                    break
                log |= {user: 2 for user in users}
                k += 1
            words = log_of(store).read_text()
            assert re.search(
                "data.mdb: .* could not be written .no space is left.: free space", words
            )
            assert "Traceback" not in words
            assert k > 2 and not any(user in client for user in users)
            assert answers(client) == expected and process.poll() is None
            remount("size=20m")
            assert client.write(users, [IDS[:1]] * 64) == [1] * 64
            log |= dict.fromkeys(users, 1)
            assert client.write(["ann"], [IDS[9:10]]) == [4]
        with served(store) as (_, client):
            assert {user: client.length(user) for user in log} == log
            assert client.length("ann") == 4


@mounts
def test_a_disk_that_becomes_read_only(tmp_path, filled):
    with small_disk(tmp_path / "disk", "20m") as remount:
        store = Path(shutil.copytree(filled, tmp_path / "disk" / "streams.lmdb"))
        remount("ro")
        words = refused(store)
        assert str(store) in words and "cannot be written to" in words
        remount("rw")
        with served(store) as (_, client):
            client.write(["new"], [IDS[:1]])


def cut(size: float) -> Callable[[Path], None]:
    """Cuts a file to a size: bytes, or a part of the file."""

    def act(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: int(size if size > 1 else size * len(data))])

    return act


def foreign(file: Path) -> None:
    shutil.rmtree(file.parent)
    with lmdb.open(os.fspath(file.parent)) as env, env.begin(write=True) as transaction:
        transaction.put(b"key", b"value")


def of_sqlite(file: Path) -> None:
    file.unlink()
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("create table rows (key text)")


HARMS = {
    "half": (cut(0.5), "truncated"),
    "the last page": (cut(1 - 1e-6), "truncated"),
    "one page": (cut(4096), "truncated"),
    "100 bytes": (cut(100), "truncated or damaged"),
    "empty": (cut(0.0), "no LMDB database"),
    "noise": (lambda file: file.write_bytes(random.Random(0).randbytes(1 << 16)), "no LMDB"),
    "sqlite": (of_sqlite, "no LMDB database"),
    "another program's": (foreign, "holds no streams"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_truncated_or_foreign_database(store, harm):
    """It is refused, and not changed."""
    act, words = HARMS[harm]
    act(store / "data.mdb")
    before = (store / "data.mdb").read_bytes()
    error = refused(store)
    assert words in error and "data.mdb" in error, error
    assert (store / "data.mdb").read_bytes() == before


def test_a_store_of_another_model(store):
    error = refused(store, MODEL_SEED="5")
    assert "another model" in error and "this model has" in error
    with served(store) as (_, client):
        assert client.length("bob") == 25


def test_a_second_service_on_the_same_store(store):
    with served(store) as (first, client):
        error = refused(store)
        assert f"is held by pid {first.pid} on" in error
        assert client.write(["ann"], [IDS[:1]]) == [4]


@pytest.mark.parametrize("byte", [0, 10, 30, -1])
def test_a_damaged_row(store, byte):
    """Nobody gets an answer from it. A reset makes room for a new stream."""
    with served(store) as (_, client):
        expected = answers(client)
    with lmdb.open(os.fspath(store)) as env, env.begin(write=True) as transaction:
        value = bytearray(transaction.get(b"sbob"))
        value[byte] ^= 16
        transaction.put(b"sbob", bytes(value))
    with served(store) as (_, client):
        for act in (client.answer, client.write):
            error = failure(act, ["bob"], [QUERY])
            assert error.status == 500 and "stream of 'bob' is damaged: reset" in str(error)
            assert failure(act, ["ann", "bob"], [QUERY, QUERY]).body["user"] == "bob"
        assert client.answer(["ann"], [QUERY])[0].tolist() == expected["ann"]
        assert client.length("ann") == 3 and client.write([7], [IDS[:1]]) == [12]
        assert failure(client.fork, "bob", ["copy"]).status == 500
        assert "does not fit its checksum" in log_of(store).read_text()
        client.reset(["bob"])
        assert client.write(["bob"], [HISTORIES["bob"]]) == [25]
        np.testing.assert_allclose(client.answer(["bob"], [QUERY])[0], expected["bob"], atol=1e-5)


def test_a_row_of_one_user_under_the_key_of_another(store):
    with lmdb.open(os.fspath(store)) as env, env.begin(write=True) as transaction:
        transaction.put(b"sbob", transaction.get(b"sann"))
    with served(store) as (_, client):
        error = failure(client.answer, ["bob"], [QUERY])
        assert error.status == 500 and "stream of 'bob' is damaged: reset" in str(error)
