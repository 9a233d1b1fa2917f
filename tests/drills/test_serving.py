"""Drills of the service: it is killed under load, its calls of the system are traced.

    python -m pytest tests/drills/test_serving.py -m slow -n0 -s

A write of several users, and a long one, take several steps on the device. They must be kept whole.
"""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import chex
import numpy as np
import pytest

from rmjax.serve import Streams
from rmjax.serve.client import Client
from tests.serve.process import compiled, served
from tests.serve.served import IDS, SHAPES, model

pytestmark = pytest.mark.slow
KILLS, THREADS, USERS = 30, 8, 4  # of a drill; users of a thread


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with patch.dict(os.environ, compiled(tmp_path_factory.mktemp("compiled"))):
        yield


class Log:
    """What each user's stream must hold, by the acknowledgements of the service."""

    def __init__(self, seed: int):
        self.seed = seed
        self.streams = collections.defaultdict(list)  # {user: acknowledged items}
        self.pending: dict[int, dict] = {}  # {thread: {user: items}}, sent, not acknowledged
        self.acknowledged, self.wrong = 0, []

    def write(self, client: Client, thread: int, part: int) -> None:
        """Writes to the thread's own users until the service is gone."""
        rng = np.random.default_rng((self.seed, thread, part))
        users = [thread * USERS + i if thread % 2 else f"{thread}-{i}" for i in range(USERS)]
        while True:
            chosen = rng.permutation(USERS)[: rng.integers(1, USERS)]
            length = lambda: rng.integers(50, 100) if rng.random() < 0.05 else rng.integers(1, 10)
            sent = {users[i]: rng.integers(0, len(IDS), length()).tolist() for i in chosen}
            before = [len(self.streams[user]) for user in sent]
            self.pending[thread] = sent
            try:
                items = [[IDS[item] for item in items] for items in sent.values()]
                lengths = client.write(list(sent), items, before)
                for user, items in self.pending.pop(thread).items():
                    self.streams[user] += items
                self.acknowledged += 1
                assert lengths == [len(self.streams[user]) for user in sent]
                client.answer(list(sent), [IDS[:3]] * len(sent))
            except OSError:  # it was killed
                return
            except Exception as error:  # the main thread checks that there is none
                self.wrong.append(error)
                return


def check(log: Log, store: Streams, replayed: Streams) -> tuple[int, int]:
    """Compares a reopened store with the log.

    Returns:
      How many requests without an acknowledgement are in the store, and how many are not.
    """
    length = lambda user, streams=store: streams.info(user).length if user in streams else 0
    kept = []
    for sent in log.pending.values():
        more = [length(user) - len(log.streams[user]) for user in sent]
        kept.append(any(more))
        wanted = [len(items) if any(more) else 0 for items in sent.values()]
        assert more == wanted, f"a write is there in part: {more} of {wanted} items"
        for user, items in sent.items():
            log.streams[user] += items if any(more) else []
    log.pending.clear()
    streams = {user: items for user, items in log.streams.items() if items}
    assert set(store.users()) == set(streams)
    new = {user: items[length(user, replayed) :] for user, items in streams.items()}
    replayed.write(list(new), list(new.values()))
    for user, items in streams.items():
        assert length(user) == len(items), user
        chex.assert_trees_all_close(store.memory(user), replayed.memory(user), rtol=1e-6, atol=1e-6)
    return sum(kept), len(kept) - sum(kept)


@pytest.mark.parametrize("sync", ["each", "group"])
def test_a_service_killed_at_random_moments(tmp_path, sync):
    draw, log, path = random.Random(sync), Log(len(sync)), tmp_path / "streams.lmdb"
    replayed, total = model().streams(**SHAPES), np.zeros(2, int)
    for part in range(KILLS):
        with served(path, f"--sync={sync}") as (process, client):
            threads = [
                threading.Thread(target=log.write, args=(client, thread, part))
                for thread in range(THREADS)
            ]
            before = log.acknowledged
            for thread in threads:
                thread.start()
            while log.acknowledged == before and not log.wrong:
                time.sleep(0.001)
            time.sleep(draw.random())
            process.kill()
            process.wait()
            for thread in threads:
                thread.join()
        assert not log.wrong, log.wrong
        store = model().streams(**SHAPES, store=path)
        total += check(log, store, replayed)
        store.close()
    items = sum(map(len, log.streams.values()))
    print(
        f"\n{sync}: {KILLS} of {KILLS} kills; {log.acknowledged} acknowledged writes of "
        f"{len(log.streams)} users, {items} items; without an acknowledgement: {total[0]} kept "
        f"whole, {total[1]} absent"
    )


CALLS = "recvfrom,recvmsg,read,sendto,sendmsg,write,writev,pwritev,pwrite64,fsync,fdatasync,msync"
_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_FILE = re.compile(r"\d+<([^>]*)>+")


def calls(trace: Path) -> Iterator[tuple[str, str, str, int, int]]:
    """Yields the calls of a trace: name, file, arguments, line of the start, line of the end."""
    begun: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(trace.read_text(errors="replace").splitlines()):
        matched = _LINE.match(line)
        if not matched:
            continue
        pid, resumed, name, rest = matched.groups()
        start = number
        if resumed:
            first, start = begun.pop(pid)
            name, rest = resumed, first + rest
        elif rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>"), number
            continue
        file = _FILE.match(rest)
        yield name, file[1] if file else "", rest, start, number


def early(trace: Path, database: str = "data.mdb") -> tuple[int, int]:
    """Counts acknowledgements of writes, and those that left before their commit.

    LMDB commits by fdatasync of the pages, and by a write of the meta page to a file that was
    opened with O_DSYNC. Both must begin after the last byte of the request came, and end before the
    acknowledgement begins.
    """
    arrivals, count, too_early = {}, 0, 0  # {connection: line of the arrival}
    synced, commits = [], []  # (start, end) of calls
    ordered = sorted(calls(trace), key=lambda call: call[4])
    for name, file, rest, start, end in ordered:
        if file.endswith(database):
            if name in ("fsync", "fdatasync", "msync"):
                synced.append((start, end))
            elif synced and "pwrite" in name and start > synced[-1][1]:
                commits.append((synced[-1][0], end))
        elif name in ("recvfrom", "recvmsg", "read") and file.startswith("socket"):
            more = file in arrivals and not re.search(r"= (0|-1\b.*)$", rest)
            if more or "POST /v1/write" in rest:
                arrivals[file] = end
        elif file in arrivals and "HTTP/1.1 200" in rest:
            arrival, count = arrivals.pop(file), count + 1
            too_early += not any(arrival < begin and done < start for begin, done in commits)
    return count, too_early


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("sync", ["each", "group", "none"])
def test_no_acknowledgement_leaves_before_its_commit(tmp_path, sync):
    """The trace finds early acknowledgements where they may be: with `none`."""
    trace = tmp_path / "trace"
    strace = "strace", "-f", "-y", "-s", "80", "-o", str(trace), "-e", f"trace={CALLS}"
    with served(tmp_path / "streams.lmdb", f"--sync={sync}", before=strace) as (_, client):

        def write(thread: int) -> None:
            for k in range(25):
                client.write([f"{thread}-{k % 3}"], [[IDS[k], IDS[thread]]])

        write(0)  # alone, so that its commits hold no other write
        threads = [threading.Thread(target=write, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    count, too_early = early(trace)
    print(f"\n{sync}: {count} acknowledgements, {too_early} before their commit")
    assert count == 25 * (1 + THREADS)
    assert too_early > count // 2 if sync == "none" else not too_early
