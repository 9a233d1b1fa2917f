"""A store answers as each stream alone would, for any mix of requests, and keeps its streams."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.machines import make, memorize
from rmjax.serve import rows
from rmjax.serve.programs import Programs
from rmjax.serve.store import Streams
from tests.small import ITEMS, SLOTS, N, noise, recommendation

TASK = recommendation(make("rehearsal", ITEMS, **SLOTS))
PARAMS = noise(TASK.init)
SHAPES = dict(batches=(1, 4), segments=(1, 3), queries=(1, 3))


def streams(**options) -> Streams:
    """A small store; a database holds more users than the device."""
    capacity = 2 if options.get("store") is None else 4
    store = Streams(TASK, PARAMS, **({"capacity": capacity} | SHAPES | options))
    store._programs = programs()
    return store


@functools.cache
def programs() -> Programs:
    """The programs of all stores, so that each shape is compiled once."""
    return Programs(TASK, PARAMS)


def in_place(place: str, folder: Path) -> dict:
    """Options of a store on the device, or in a database."""
    return {"store": folder / "streams.lmdb", "sync": "each"} if place == "database" else {}


@functools.cache
def offline():
    """A function that evaluates one stream offline: items [n], query [Q] -> scores [Q]."""

    @jax.jit
    def scores(items, mask, query):
        memory = memorize(TASK.machine, PARAMS["machine"], items, mask).memory
        return TASK.answer(PARAMS, memory, query, jnp.ones(query.shape, bool))

    def answer(items, query):
        padded, asked = np.zeros(40 * N, np.int32), np.zeros(8, np.int32)
        padded[: len(items)], asked[: len(query)] = items, query
        mask = np.arange(len(padded)) < len(items)
        rows = scores(padded.reshape(1, -1, N), mask.reshape(1, -1, N), asked[None])
        return np.asarray(rows)[0, : len(query)]

    return answer


def same(store: Streams, histories: dict, seed: int = 0) -> None:
    """Asserts that a store answers as offline evaluation of {user: items} does."""
    rng = np.random.default_rng(seed)
    queries = [rng.integers(0, ITEMS, rng.integers(1, 8)) for _ in histories]
    answers = store.answer(list(histories), queries)
    for user, query, answer in zip(histories, queries, answers, strict=True):
        expected = offline()(histories[user], query)
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5, err_msg=str(user))


@pytest.mark.parametrize("place", ["device", "database"])
def test_a_mix_of_requests_is_answered_as_each_stream_alone(tmp_path, place):
    """Writes have 0 items to several parts, users occur twice, and users outnumber the capacity."""
    store = streams(**in_place(place, tmp_path))
    rng, histories = np.random.default_rng(0), {}
    most = 5 if place == "database" else 8  # its cache has 4 rows
    for _ in range(12):
        users = [int(user) for user in rng.integers(0, 11, rng.integers(1, most))]
        items = [
            list(rng.integers(0, ITEMS, rng.choice([0, 1, 3, N, 2 * N + 1, 3 * N + 2])))
            for _ in users
        ]
        store.write(users, items)
        for user, more in zip(users, items, strict=True):
            histories[user] = histories.get(user, []) + more
        same(store, histories)
    assert len(store) == len(histories) > 8 and max(map(len, histories.values())) < 40 * N
    same(store, histories | {"nobody": []})  # an unknown user has an empty stream
    assert "nobody" not in store


def test_forgotten_and_copied_streams():
    store, histories = streams(), {"a": [1, 2, 3, 4, 5], "b": [6, 7]}
    store.write(list(histories), list(histories.values()))
    store.fork("a", ["c", "d", "e", "f", "g", "d"])
    store.write(["c", "a"], [[9], [8, 8, 8]])
    histories |= {"c": [1, 2, 3, 4, 5, 9], "g": histories["a"], "a": [1, 2, 3, 4, 5, 8, 8, 8]}
    same(store, histories)
    store.reset(["a", "c"])
    assert "a" not in store and len(store) == 5
    store.write(["a"], [[30]])
    store.write(["new", "newer"], [[31, 32], [33]])
    histories = {"b": [6, 7], "a": [30], "new": [31, 32], "newer": [33]}
    same(store, histories | dict.fromkeys("defg", [1, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match="user 'g' has a stream already"):
        store.fork("b", ["x", "g"])
    for act in (lambda: store.fork("who", ["x"]), lambda: store.reset(["who"])):
        with pytest.raises(ValueError, match="user 'who' has no stream in this store"):
            act()


@pytest.mark.parametrize("place", ["device", "database"])
def test_rows_that_pad_a_batch_change_nobody(tmp_path, place):
    """The last slot has a user."""
    store = streams(**in_place(place, tmp_path) | {"capacity": 4, "batches": (4,)})
    histories = {"a": [1, 2], "b": [3], "c": [4, 5, 6], "d": [8]}
    store.write(list(histories), list(histories.values()))
    store.write(["a"], [[7] * 5])
    same(store, histories | {"a": [1, 2] + [7] * 5})


@pytest.mark.parametrize("place", ["device", "database"])
def test_saved_streams_go_on_after_a_load(tmp_path, place):
    store, histories = streams(), {"a": list(range(9)), 7: [3], "c": [], "d": [1] * 5, "e": [2] * 6}
    store.write(list(histories), list(histories.values()))
    store.save(tmp_path / "saved")
    other = streams(**in_place(place, tmp_path))
    other.write(["z", "a"], [[1, 1], [2]])
    other.load(tmp_path / "saved")
    assert len(other) == 5 and "z" not in other and 7 in other
    same(other, histories)
    other.write(["a"], [[4, 4, 4, 4]])
    same(other, histories | {"a": [*range(9), 4, 4, 4, 4]})
    other.load(tmp_path / "saved")
    same(other, histories)


def test_a_database_opens_as_it_was_closed(tmp_path):
    store, histories = streams(store=tmp_path), {"a": list(range(9)), "b": [3], b"c": [4, 5]}
    store.write(list(histories), list(histories.values()))
    store.reset(["b"])
    with pytest.raises(RuntimeError, match=f"held by pid {os.getpid()} .* this process: close"):
        streams(store=tmp_path)
    store.close()
    del histories["b"]
    again = streams(store=tmp_path)
    assert len(again) == 2 and "b" not in again and b"c" in again and "c" not in again
    again.write(["a", "new"], [[6], [7]])
    histories |= {"a": [*range(9), 6], "new": [7]}
    again.flush()
    same(again, histories)
    again.close()
    same(streams(store=tmp_path), histories)
    with pytest.raises(ValueError, match="on the device"):
        streams().flush()


def test_without_room_for_more_users_nothing_changes(monkeypatch):
    """The user without room stays unknown, and the next user gets an unused slot."""
    store, histories = streams(), {"ann": [1, 2], "bob": [3]}
    store.write(list(histories), list(histories.values()))
    with monkeypatch.context() as patch:
        full = Mock(side_effect=MemoryError("full"))
        patch.setattr(store._cache.rows, "grow", full)
        with pytest.raises(MemoryError):
            store.write(["eve"], [[9]])
    store.write(["dan"], [[5, 5]])
    store.write(["bob"], [[7]])
    same(store, {"ann": [1, 2], "bob": [3, 7], "dan": [5, 5], "eve": []})
    assert "eve" not in store


def test_impossible_ids_are_named_and_nothing_is_written(tmp_path):
    store = streams()
    store.write(["a"], [[1, 2]])
    message = f"user 'b': item {ITEMS} is outside the model's range 0 .. {ITEMS - 1}"
    with pytest.raises(ValueError, match=message):
        store.write(["a", "b"], [[3], [1, ITEMS]])
    same(store, {"a": [1, 2]})
    assert "b" not in store
    with pytest.raises(ValueError, match="user 'a': query -1 is outside"):
        store.answer(["a"], [[-1]])
    store.save(tmp_path / "saved")
    other = Streams(TASK, jax.tree.map(lambda x: x + 1, PARAMS), **SHAPES)
    with pytest.raises(ValueError, match="holds streams of another model .machine '"):
        other.load(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
    assert len(manifest["streams"]["users"]) == 1


def test_an_empty_store_is_saved_and_numpy_numbers_are_users(tmp_path):
    store = streams()
    store.save(tmp_path / "none")
    store.write(np.array([3, 4]), [[1], [2]])
    store.save(tmp_path / "two")
    store.load(tmp_path / "none")
    assert not len(store)
    store.load(tmp_path / "two")
    same(store, {3: [1], 4: [2]})
    with pytest.raises(ValueError, match="user 3: each item must be a whole number, got float64"):
        store.write([3], [[1.5]])
    with pytest.raises(ValueError, match="has no stream"):
        store.reset([3, 5])
    assert 3 in store
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        streams(capacity=0)
    with pytest.raises(ValueError, match="this model reads something else"):
        Streams(object(), PARAMS)


def test_every_shape_is_compiled_once():
    store = Streams(TASK, PARAMS, capacity=32, **SHAPES)
    store.compile()
    made = store._programs
    programs = (made.feed.func, made.answer.func, rows._take, rows._put)
    sizes = [program._cache_size() for program in programs]
    assert sizes[:2] == [4, 4]
    for users in (1, 3, 9):
        store.write(list(range(users)), [[1] * (user + 1) for user in range(users)])
        store.answer(list(range(users)), [[1] * (user % 4) for user in range(users)])
    assert [program._cache_size() for program in programs] == sizes
