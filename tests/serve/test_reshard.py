"""Users have one shard in every process, and move between stores with the same streams."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from rmjax.serve import reshard
from rmjax.serve.database import Damaged, Database, Row, key_of
from rmjax.serve.reshard import Copied, copy, parsed
from rmjax.serve.shards import shard_of
from rmjax.serve.store import Streams
from tests.runs import compilations_kept
from tests.serve.test_streams import PARAMS, TASK
from tests.small import ITEMS

ABOUT = {"format": 1, "model": "a"}
USERS = ["ann", "7", 7, -1, 2**63 - 1, "", "ümlaut", b"ann", *range(100, 140)]


def expected_shard(user, shards):
    """By hand, from the bytes of the user and the borders of the ranges."""
    if isinstance(user, int):
        key = b"i" + np.array(user + 2**63, ">u8").tobytes()
    else:
        key = b"s" + user.encode() if isinstance(user, str) else b"b" + user
    share = int(hashlib.sha256(key).hexdigest()[:16], 16)
    borders = [-(-(k << 64) // shards) for k in range(shards + 1)]
    (one,) = [k for k in range(shards) if borders[k] <= share < borders[k + 1]]
    return one


def test_a_user_has_the_same_shard_in_every_process():
    chosen = [shard_of(user, 5) for user in USERS]
    assert chosen == [expected_shard(user, 5) for user in USERS]
    assert set(chosen) == set(range(5)) and {shard_of(user, 1) for user in USERS} == {0}
    assert len({(shard_of("7", n), shard_of(7, n), shard_of(b"7", n)) for n in (1, 2, 64)}) == 3
    code = f"from rmjax.serve.shards import shard_of; print([shard_of(u, 5) for u in {USERS!r}])"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(chosen)


@pytest.mark.parametrize("user, shards, message", [
    (True, 5, "user True is a bool"), (("a", 1), 5, "is a tuple"), ("ann", 0, "at least 1"),
])  # fmt: skip
def test_what_has_no_shard_is_refused(user, shards, message):
    with pytest.raises(ValueError, match=message):
        shard_of(user, shards)


def test_three_shards_become_five_with_the_same_answers(tmp_path):
    with compilations_kept(tmp_path / "compiled"):
        _three_become_five(tmp_path)


def _three_become_five(tmp_path):
    rng = np.random.default_rng(0)
    items = {user: rng.integers(0, ITEMS, rng.integers(1, 30)) for user in USERS}
    query, answers, infos = np.arange(3), {}, {}
    for shard in range(3):
        mine = [user for user in USERS if shard_of(user, 3) == shard]
        with contextlib.closing(opened(tmp_path / f"old{shard}")) as store:
            store.write(mine, [items[user] for user in mine])
            store.write(mine[:2], [[1], [2]])
            answers |= zip(mine, store.answer(mine, [query] * len(mine)), strict=True)
            infos |= {user: store.info(user) for user in mine}
    before = {user: row for k in range(3) for user, row in rows(tmp_path / f"old{k}").items()}
    copies = [
        copy(tmp_path / f"old{old}", tmp_path / f"new{new}", new, 5)
        for old in range(3)
        for new in range(5)
    ]
    assert sum(one.users for one in copies) == len(USERS)
    count = Counter()
    for shard in range(5):
        assert rows(tmp_path / f"new{shard}").items() <= before.items()
        with contextlib.closing(opened(tmp_path / f"new{shard}")) as store:
            mine = list(store.users())
            assert {shard_of(user, 5) for user in mine} <= {shard}
            for user, answer in zip(mine, store.answer(mine, [query] * len(mine)), strict=True):
                np.testing.assert_allclose(answer, answers[user], rtol=1e-4, atol=1e-6)
                assert store.info(user) == infos[user]
            count.update(mine)
    assert count == Counter(USERS)


def opened(path) -> Streams:
    shapes = dict(batches=(8,), segments=(4,), queries=(3,))
    return Streams(TASK, PARAMS, store=path, capacity=64, **shapes)


def database(path, rows, about=ABOUT):
    """Makes a database with rows {user: number}."""
    with contextlib.closing(Database(path, about)) as made:
        made.commit({user: Row(1, n, float(n), bytes([n] * 50)) for user, n in rows.items()})


def rows(path) -> dict:
    with contextlib.closing(Database(path)) as opened:
        return opened.read(list(opened.users()))


def test_an_interrupted_copy_leaves_complete_streams_and_is_continued(tmp_path, monkeypatch):
    database(tmp_path / "old", {user: n for n, user in enumerate(USERS)})
    commit = Database.commit

    def stops(self, changes):
        if len(self) >= 20:
            raise KeyboardInterrupt
        commit(self, changes)

    monkeypatch.setattr(reshard, "_MANY", 8)
    monkeypatch.setattr(Database, "commit", stops)
    with pytest.raises(KeyboardInterrupt):
        copy(tmp_path / "old", tmp_path / "new")
    monkeypatch.undo()
    old, new = rows(tmp_path / "old"), rows(tmp_path / "new")
    assert len(new) == 24 and new.items() <= old.items()
    assert copy(tmp_path / "old", tmp_path / "new") == Copied(len(USERS) - 24, 24, [])
    assert rows(tmp_path / "new") == old == rows(tmp_path / "old")


def test_a_user_of_the_target_is_not_overwritten(tmp_path):
    database(tmp_path / "old", {"ann": 1, "bob": 2, "cy": 3})
    database(tmp_path / "new", {"cy": 4, "dee": 5})
    before = rows(tmp_path / "new")
    message = r"user 'cy' has another stream in .*new than in .*old: nothing was copied"
    with pytest.raises(ValueError, match=message):
        copy(tmp_path / "old", tmp_path / "new")
    assert rows(tmp_path / "new") == before


def test_streams_of_another_model_are_refused(tmp_path):
    database(tmp_path / "old", {"ann": 1})
    database(tmp_path / "new", {}, ABOUT | {"model": "b"})
    with pytest.raises(ValueError, match=r"another model \(model 'b', this model has 'a'\)"):
        copy(tmp_path / "old", tmp_path / "new")
    assert not rows(tmp_path / "new")


def damage(path, user):
    """Flips a bit of the last byte of a user's row, as a bad disk would."""
    data = bytearray((path / "data.mdb").read_bytes())
    (row,) = (rows(path)[user],)
    place = data.rindex(key_of(user), 0, data.rindex(row.payload))
    data[data.index(row.payload, place) + len(row.payload) - 1] ^= 1
    (path / "data.mdb").write_bytes(data)


@pytest.mark.parametrize("where", ["old", "new"])
def test_a_damaged_row_is_named(tmp_path, where):
    database(tmp_path / "old", {"ann": 1, "bob": 2, "cy": 3})
    database(tmp_path / "new", {"bob": 2} if where == "new" else {})
    damage(tmp_path / where, "bob")
    if where == "new":
        with pytest.raises(Damaged, match="user 'bob': the row in .*new"):
            copy(tmp_path / "old", tmp_path / "new")
    else:
        assert copy(tmp_path / "old", tmp_path / "new") == Copied(2, 0, ["bob"])
        assert rows(tmp_path / "new").keys() == {"ann", "cy"}


@pytest.mark.parametrize("shard, message", [
    ("3", "--shard=3: give a shard and how many exist, such as 3/5"),
    ("-1/3", "--shard=-1/3: give"),
    ("3/3", "shard 3 of 3: shards have the numbers 0 to 2"),
])  # fmt: skip
def test_a_shard_that_does_not_exist_is_refused(tmp_path, shard, message):
    with pytest.raises(ValueError, match=message):
        copy(tmp_path / "old", tmp_path / "new", *parsed(shard))
    assert not any(tmp_path.iterdir())


def test_the_command(tmp_path):
    database(tmp_path / "old", dict(zip(USERS, range(len(USERS)), strict=True)))
    line = [sys.executable, "-m", "rmjax.reshard", "--shard=1/3"]
    line += [f"--source={tmp_path / 'old'}", f"--target={tmp_path / 'new'}"]
    count = sum(shard_of(user, 3) == 1 for user in USERS)
    done = subprocess.run(line, capture_output=True, text=True)
    assert f"new: users copied: {count}; users who had the same stream already: 0" in done.stderr
    with contextlib.closing(Database(tmp_path / "old")):  # as a service that runs
        again = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, again.returncode) == (0, 1)
    assert "old" in again.stderr and "Traceback" not in again.stderr
