"""A store that is filled from a log equals one that the same events were written to, live."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rmjax import tasks
from rmjax.serve import Model, fill
from rmjax.serve.histories import Histories
from rmjax.serve.programs import Programs
from tests.runs import tiny
from tests.shop import Shop, ShopSource
from tests.small import noise

ITEMS, N = 40, 4
IDS = tuple(f"SKU-{(7 * k) % ITEMS:02d}" for k in range(ITEMS))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny(**{"machine.kind": "gru", "data.segment_length": N})
    config.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    source = ShopSource(Shop(users=6, items=ITEMS, shortest=4, longest=17))
    source.numbering = np.array(IDS, object)
    description = source.describe()
    task = tasks.make_task(config, description)
    made = Model(config, task, noise(task.init), description)
    PROGRAMS.append(Programs(task, made.params))  # each shape is compiled once
    return made


PROGRAMS: list[Programs] = []  # of the model


def log(sizes, seed=0):
    """{user: items} of users with so many events, and the table of them in a mixed order."""
    rng = np.random.default_rng(seed)
    histories = {f"u{k}": [IDS[i] for i in rng.integers(0, ITEMS, n)] for k, n in enumerate(sizes)}
    rows = [(u, item, t) for u, items in histories.items() for t, item in enumerate(items)]
    mixed = [rows[k] for k in rng.permutation(len(rows))]
    names = ("user_id", "item_id", "timestamp")
    return histories, dict(zip(names, map(list, zip(*mixed, strict=True)), strict=True))


def opened(model, **options):
    """A small store; all stores share the compiled programs."""
    store = model.streams(**dict(batches=(4,), segments=(2,), capacity=8) | options)
    (store._programs,) = PROGRAMS
    return store


def written(model, histories, **options):
    """A store that got the same events by `model.write`, in several writes."""
    store = opened(model, **options)
    for part in (slice(3), slice(3, None)):
        model.write(store, list(histories), [items[part] for items in histories.values()])
    return store


def same(model, store, other, users):
    """Asserts that two stores have the same memories, and recommend the same."""
    assert store.ends(users) is not None and len(store) == len(other)
    for user in users:
        assert store.info(user).length == other.info(user).length
        for one, wanted in zip(
            *map(jax.tree.leaves, (store.memory(user), other.memory(user))), strict=True
        ):
            np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-6)
    shown, expected = (model.recommend(store=s, users=users, k=5) for s in (store, other))
    for row, wanted in zip(shown, expected, strict=True):
        assert [one.item for one in row] == [one.item for one in wanted]


def test_a_filled_store_equals_live_writes(model, monkeypatch):
    monkeypatch.setattr(fill, "MANY", 2)
    histories, events = log([1, 4, 5, 8, 11, 23])
    events["item_id"][3] = "SKU-99"  # the model does not know it
    user, time = events["user_id"][3], events["timestamp"][3]
    histories[user][time : time + 1] = []
    store = opened(model)
    filled = fill.fill(Histories(model, events), store)
    assert filled == (len(histories), sum(map(len, histories.values())), 0)
    same(model, store, written(model, histories), list(histories))


def test_the_latest_events_and_the_latest_session_are_written(model):
    histories, events = log([6, 9])
    store = opened(model)
    fill.fill(Histories(model, events, latest=5), store)
    same(model, store, written(model, {u: h[-5:] for u, h in histories.items()}), list(histories))
    events["session"] = [time // 4 for time in events["timestamp"]]
    store = opened(model)
    fill.fill(Histories(model, events, columns={"session": "session"}), store)
    last = {u: h[(len(h) - 1) // 4 * 4 :] for u, h in histories.items()}
    same(model, store, written(model, last), list(histories))


@pytest.mark.parametrize("kept", [0, 3, 6])
def test_a_repeated_call_writes_the_users_that_are_missing(model, tmp_path, monkeypatch, kept):
    """A kill leaves the users of the first writes; also those whose last segment is full."""
    monkeypatch.setattr(fill, "MANY", 3)
    histories, events = log([4, 7, 8, 1, 12, 2])
    table = Histories(model, events)
    store = opened(model, store=tmp_path / "s.lmdb")
    write = store.write

    def limited(users, *args):
        if len(store) >= kept:
            raise KeyboardInterrupt
        return write(users, *args)

    if kept < 6:
        monkeypatch.setattr(store, "write", limited)
        with pytest.raises(KeyboardInterrupt):
            fill.fill(table, store)
        assert len(store) == kept
        monkeypatch.setattr(store, "write", write)
    else:
        fill.fill(table, store)
    count = sum(len(items) for items in list(histories.values())[kept:])
    assert fill.fill(table, store) == (6 - kept, count, kept)
    same(model, store, written(model, histories), list(histories))
    store.close()


def other_length(items):
    return items + items  # it ends as the history does


def other_end(items):
    return [*items[:-1], IDS[(IDS.index(items[-1]) + 1) % ITEMS]]


@pytest.mark.parametrize("place", ["device", "database"])
@pytest.mark.parametrize("change", [other_length, other_end])
@pytest.mark.parametrize("size", [3, 8])  # a part of a segment, and full segments
def test_a_user_with_another_stream_is_refused_before_anything_is_written(
    model, tmp_path, monkeypatch, place, change, size
):
    monkeypatch.setattr(fill, "MANY", 2)  # the user is not in the first write
    histories, events = log([5, 2, 9, size])
    options = dict(store=tmp_path / "s.lmdb") if place == "database" else {}
    store = opened(model, **options)
    model.write(store, ["u3", "visitor"], [change(histories["u3"]), []])
    with pytest.raises(ValueError, match=r"'u3' has a stream already.*new folder.*reset"):
        fill.fill(Histories(model, events), store)
    assert sorted(store.users()) == ["u3", "visitor"]
    store.reset(["u3"])
    assert fill.fill(Histories(model, events), store).users == 4
    store.close()


def test_an_empty_stream_is_filled(model, tmp_path):
    histories, events = log([5, 2])
    store = opened(model, store=tmp_path / "s.lmdb")
    model.write(store, ["u1"], [[]])
    assert fill.fill(Histories(model, events), store) == (2, 7, 0)
    same(model, store, written(model, histories), list(histories))
    store.close()


def test_integers_stay_integers_and_long_names_are_refused(model):
    _, events = log([2, 5])
    events["user_id"] = [int(user[1:]) for user in events["user_id"]]
    store = opened(model)
    fill.fill(Histories(model, events), store)
    assert sorted(store.users()) == [0, 1] and "0" not in store
    events["user_id"] = [f"{user}" + "x" * 600 * user for user in events["user_id"]]
    store = opened(model)
    with pytest.raises(ValueError, match="at most 510"):
        fill.fill(Histories(model, events), store)
    assert len(store) == 0
