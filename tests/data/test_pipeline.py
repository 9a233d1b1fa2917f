import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from rmjax.data import cached, make_source
from rmjax.data.clicks.movielens import open_movielens
from rmjax.data.pipeline import batches, epoch_order, eval_batches, partner_drawer, steps_per_epoch
from rmjax.data.source import Source
from tests import FIXTURES

ARGS = dict(seed=3, batch_size=8, segment_length=4, negatives=5)


class Made(Source):
    """The items of stream i are 1000 i, 1000 i + 1, ...; lengths differ, some streams are empty."""

    num_items, max_items, num_queries, positions_at_end = 10**6, 11, 2, False

    def __init__(self, size=21, users=None):
        self._size, self.fetched = size, 0
        if users:
            self.stream_id = lambda split: np.arange(size) % users

    def size(self, split):
        return self._size

    def fetch(self, split, indices):
        self.fetched += len(indices)
        indices = np.asarray(indices, np.int32)
        shape = (len(indices), 2)
        return {
            "items": indices[:, None] * 1000 + np.arange(11, dtype=np.int32),
            "length": indices % 12,
            "query": indices[:, None] + np.zeros(shape, np.int32),
            "query_mask": np.ones(shape, bool),
            "target": np.tile(np.array([1, 0], np.int32), (len(indices), 1)),
            "example_id": indices,
            "position": (indices % 12)[:, None] + np.zeros(shape, np.int32),
        }


class Long(Made):
    """Streams of 1,000 items."""

    max_items = 1000

    def fetch(self, split, indices):
        items = np.zeros((len(indices), 1000), np.int32)
        return super().fetch(split, indices) | {
            "items": items,
            "length": np.full(len(indices), 1000, np.int32),
        }


def assert_same(ours, theirs):
    for a, b in itertools.zip_longest(ours, theirs):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def joined(*batches):
    """Concatenates the rows of batches."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    options = dict(first=5, every=4, max_targets=3)
    return open_movielens(
        str(FIXTURES / "movielens"), str(tmp_path_factory.mktemp("cache")), 0, **options
    )


@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_a_start_at_a_later_step_gives_the_batches_of_an_uninterrupted_run(real, start):
    expected = list(batches(real, **ARGS, num_steps=12))
    assert len(expected) == 12
    assert_same(batches(real, **ARGS, num_steps=12, start_step=start), expected[start:])


@pytest.mark.parametrize("source", [Made(), Made(3), "real"])
def test_the_rows_of_all_processes_make_up_one_batch(source, real):
    source = real if source == "real" else source
    expected = batches(source, **ARGS, num_steps=5)
    of_process = [
        batches(source, **ARGS, num_steps=5, process_index=i, process_count=4) for i in range(4)
    ]
    assert_same(expected, (joined(*parts) for parts in zip(*of_process, strict=True)))


@pytest.mark.parametrize("prefetch", [1, 2, 9])
def test_prefetch_changes_nothing(real, prefetch):
    at_once = batches(real, **ARGS, num_steps=9, prefetch=0)
    assert_same(at_once, batches(real, **ARGS, num_steps=9, prefetch=prefetch))


def test_workers_change_nothing(real):
    with_workers = batches(real, **ARGS, num_steps=5, workers=2)
    got = list(with_workers)
    with_workers.close()
    assert_same(batches(real, **ARGS, num_steps=5), got)
    # The leaves are plain arrays, not the workers' shared memory.
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(got))


WORKERS = """
import contextlib
from tests import FIXTURES

def read():
    from rmjax.data.pipeline import batches
    from tests.data.test_pipeline import ARGS, Made
    with contextlib.closing(batches(Made(), **ARGS, num_steps=200, workers=2, prefetch=4)) as data:
        assert len(list(data)) == 200

if __name__ == "__main__":
    read()
"""


def test_workers_leave_nothing_behind(tmp_path):
    (tmp_path / "reads.py").write_text(WORKERS)
    environment = os.environ | {"PYTHONPATH": str(FIXTURES.parents[1])}
    command = [sys.executable, tmp_path / "reads.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_batch_holds_its_examples():
    for batch in batches(Made(), **ARGS, num_steps=6):
        for row, i in enumerate(batch.example_id):
            items = batch.items[row][batch.item_mask[row]]
            assert items.tolist() == [i * 1000 + j for j in range(i % 12)]
            assert (batch.query[row] == i).all() and (batch.position[row] == i % 12 // 4).all()
        assert batch.items.shape == (8, 3, 4) and batch.negative_items.shape == (8, 5)


def test_each_epoch_is_a_permutation_of_its_own():
    size, steps = 21, 21
    made = batches(Made(size), **ARGS, num_steps=steps)
    ids = np.concatenate([batch.example_id for batch in made])
    epochs = ids[: len(ids) // size * size].reshape(-1, size)
    assert (np.sort(epochs, 1) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    for epoch, order in enumerate(epochs):
        np.testing.assert_array_equal(order, epoch_order(size, ARGS["seed"], epoch))
    assert (epoch_order(size, 0, 0) != epoch_order(size, 1, 0)).any()


@pytest.mark.parametrize("users", [None, 5])
def test_negatives_are_valid_items_of_another_stream(users):
    source, partners_of = Made(users=users), {}
    for batch in batches(source, **ARGS, num_steps=80):
        for row, i in enumerate(batch.example_id):
            (partner,) = set(batch.negative_items[row] // 1000)
            assert partner % (users or 21) != i % (users or 21)
            mask = batch.negative_mask[row]
            assert mask.all() == mask.any() == (partner % 12 > 0)
            if partner % 12:
                assert (batch.negative_items[row] % 1000 < partner % 12).all()
            partners_of.setdefault(int(i), set()).add(int(partner))
    assert min(map(len, partners_of.values())) > 5  # every epoch draws its own partners


def test_partners_are_even_over_the_other_streams():
    stream = np.array([7, 3, 3, 7, 3, 9])
    drawn = partner_drawer(stream)(np.full(300, 1), np.arange(300, dtype=np.uint64))
    assert np.bincount(drawn, minlength=6).tolist() == [100, 0, 0, 100, 0, 100]
    alone = partner_drawer(np.zeros(4))(np.arange(4), np.arange(4, dtype=np.uint64))
    assert alone.tolist() == [-1] * 4


def test_without_a_partner_there_are_no_negatives():
    for source in (Made(1), Made(users=1)):
        assert not any(batch.negative_mask.any() for batch in batches(source, **ARGS, num_steps=3))


@pytest.mark.parametrize("size, processes", [(16, 1), (21, 1), (21, 4), (3, 2)])
def test_evaluation_has_every_example_once_in_order(size, processes):
    args = ARGS | dict(process_count=processes)
    parts = [eval_batches(Made(size), "valid", **args, process_index=i) for i in range(processes)]
    made = [joined(*part) for part in zip(*parts, strict=True)]
    shapes = {jax.tree.map(np.shape, batch) for batch in made}
    assert len(made) == -(-size // 8) and len(shapes) == 1
    batch = joined(*made)
    real = batch.query_mask.any(1)
    assert batch.example_id[real].tolist() == list(range(size))
    assert len(set(batch.example_id)) == len(batch.example_id)
    assert batch.example_id[~real].min(initial=size) >= size
    for mask in (batch.query_mask, batch.item_mask, batch.negative_mask):
        assert not mask[~real].any()


class Cut(Made):
    """Streams in segments of up to three items. Buckets have 1, 2 and 4 segments, in turn."""

    T = (1, 2, 4)

    def buckets(self, split):
        return np.arange(self._size) % 3, [1, 2, 4]

    def fetch(self, split, indices):
        made = super().fetch(split, indices)
        ids, segments = made["example_id"], np.array(self.T)[made["example_id"] % 3, None]
        mask = np.arange(3) < 1 + (ids[:, None, None] + np.arange(4)[:, None]) % 3  # ragged
        mask &= (np.arange(4) < segments)[..., None]
        items = made["items"][:, :1, None] + np.arange(12, dtype=np.int32).reshape(4, 3)
        del made["length"]
        position = np.minimum(made["position"], segments)
        return made | {"items": items, "item_mask": mask, "position": position}


@pytest.mark.parametrize("size", [21, 40])
def test_a_batch_comes_from_one_bucket_and_an_epoch_has_every_example(size):
    source, per_epoch = Cut(size), sum(-(-len(range(b, size, 3)) // 8) for b in range(3))
    assert steps_per_epoch(source, 8) == per_epoch
    expected = list(batches(source, **ARGS, num_steps=2 * per_epoch))
    for batch in expected:
        (bucket,) = set(batch.example_id % 3)
        assert batch.items.shape == (8, Cut.T[bucket], 3) and batch.item_mask.any(-1).all()
        assert (batch.items // 1000 == batch.example_id[:, None, None]).all()
        position = source.fetch("train", batch.example_id)["position"]
        np.testing.assert_array_equal(batch.position, position)
    halves = expected[:per_epoch], expected[per_epoch:]
    epochs = [np.concatenate([b.example_id for b in half]) for half in halves]
    assert all(set(ids) == set(range(size)) for ids in epochs) and (epochs[0] != epochs[1]).any()
    first, second = ({tuple(b.example_id) for b in half} for half in halves)
    assert not first & second  # an epoch has its own order within a bucket too
    assert_same(batches(source, **ARGS, num_steps=2 * per_epoch, start_step=3), expected[3:])
    of_process = [
        batches(source, **ARGS, num_steps=3, process_index=i, process_count=2) for i in (0, 1)
    ]
    assert_same((joined(*parts) for parts in zip(*of_process, strict=True)), expected[:3])


def test_buckets_of_less_than_a_batch_join_a_larger_one():
    """Four streams each have 1, 2 and 4 segments.

    Two batches have the fewest cells. One has 1 segment, and each of its four streams twice. The
    other one has 4 segments, and the eight other streams.
    """
    assert steps_per_epoch(Cut(12), 8) == 2
    for batch in batches(Cut(12), **ARGS, num_steps=6):
        short = batch.items.shape[1] == 1
        assert batch.items.shape == (8, 1 if short else 4, 3)
        assert ((batch.example_id % 3 == 0) == short).all()
        assert len(set(batch.example_id)) == (4 if short else 8)


@pytest.mark.parametrize(
    ("shapes", "lengths"), [(0, {1, 2, 4}), (3, {1, 2, 4}), (2, {2, 4}), (1, {4})]
)
def test_batches_of_fewer_lengths_are_only_padded(shapes, lengths):
    read = lambda shapes: (
        list(batches(Cut(40), **ARGS, num_steps=8, shapes=shapes)),
        list(eval_batches(Cut(40), "valid", **ARGS, shapes=shapes)),
    )
    for plain, padded in zip(read(0), read(shapes), strict=True):
        assert {batch.items.shape[1] for batch in padded} == lengths
        for one, two in zip(plain, padded, strict=True):
            own = one.items.shape[1]
            assert not two.item_mask[:, own:].any()
            cut = dataclasses.replace(
                two, items=two.items[:, :own], item_mask=two.item_mask[:, :own]
            )
            assert_same([cut], [one])


def test_negatives_of_streams_in_segments_are_items_of_another():
    for batch in batches(Cut(), **ARGS, num_steps=4):
        owner, item = np.divmod(batch.negative_items, 1000)
        assert batch.negative_mask.all() and (owner == owner[:, :1]).all()
        assert (owner[:, 0] != batch.example_id).all()
        valid = Cut().fetch("train", owner[:, 0])["item_mask"].reshape(8, -1)
        assert np.take_along_axis(valid, item, 1).all()
    one, two = {}, {}  # negatives of two epochs
    for step, batch in enumerate(batches(Cut(40), **ARGS, num_steps=12)):
        for example, items in zip(batch.example_id, batch.negative_items, strict=True):
            (one if step < 6 else two)[int(example)] = items.tobytes()
    assert len(one) == len(two) == 40 and sum(one[example] != two[example] for example in one) > 30


def test_evaluation_of_buckets_has_every_example_once():
    expected = list(eval_batches(Cut(21), "valid", **ARGS))
    real = np.concatenate([b.example_id[b.query_mask.any(1)] for b in expected])
    assert sorted(real) == list(range(21)) and [b.items.shape[1] for b in expected] == [1, 2, 4]
    assert all(not b.item_mask[~b.query_mask.any(1)].any() for b in expected)


def test_leaving_early_does_not_hang():
    iterator = batches(Made(), **ARGS, num_steps=10**9)
    next(iterator)
    iterator.close()


def test_a_cached_split_is_read_once_if_it_fits(real):
    plain = Made()
    row = sum(values.nbytes for values in plain.fetch("train", np.arange(1)).values())
    for limit, kept in ((21 * row, True), (21 * row - 1, False)):
        source = Made()
        kept_source = cached(source, limit)
        assert_same(batches(plain, **ARGS, num_steps=9), batches(kept_source, **ARGS, num_steps=9))
        before = source.fetched
        kept_source.fetch("train", np.arange(4))
        assert source.fetched - before == (0 if kept else 4)
    again = pickle.loads(pickle.dumps(cached(real, 2**20)))
    assert_same(batches(real, **ARGS, num_steps=3), batches(again, **ARGS, num_steps=3))
    np.testing.assert_array_equal(again.stream_id("train"), real.stream_id("train"))


def test_a_cached_split_is_fast():
    args = ARGS | dict(batch_size=32, segment_length=20)
    iterator = batches(cached(Long(), 2**30), **args, num_steps=60, prefetch=0)
    next(iterator)
    start = time.perf_counter()
    steps = sum(1 for _ in iterator)
    assert (time.perf_counter() - start) / steps < 0.01


def test_refusals():
    with pytest.raises(ValueError, match="batch_size 8 does not divide among 3 processes"):
        batches(Made(), **ARGS, num_steps=1, process_count=3)
    with pytest.raises(ValueError, match="'train' is empty"):
        batches(Made(0), **ARGS, num_steps=1)
    assert list(eval_batches(Made(0), "test", **ARGS)) == []


def config(**changes):
    tiny = dict(clicks_min=100, clicks_max=100, train=20, valid=4, test=4)
    data = dict(name="simulated_clicks", dir="", cache_dir="", ram_bytes=2**20, simulated=tiny)
    return ml_collections.ConfigDict(data | changes)


def test_make_source(tmp_path):
    simulated = make_source(config(), 0)
    assert [simulated.size(split) for split in ("train", "valid", "test")] == [20, 4, 4]
    batch = next(batches(simulated, **ARGS, num_steps=1))
    assert batch.position is None and batch.items.shape == (8, 25, 4)
    stand_in = make_source(config(name="xlong"), 0)
    assert_same(batches(simulated, **ARGS, num_steps=2), batches(stand_in, **ARGS, num_steps=2))
    cache = dict(cache_dir=str(tmp_path))
    xlong = make_source(config(name="xlong", dir=str(FIXTURES / "xlong"), **cache), 0)
    assert xlong.num_items == 3_269_017
    options = dict(test_fraction=0.3, valid_fraction=0.2, first=5, every=4, max_targets=3)
    films = config(name="movielens", dir=str(FIXTURES / "movielens"), movielens=options, **cache)
    assert make_source(films, 0).num_queries == 6
    says = "config.data.name='taobao': no such source; there are simulated_clicks,"
    with pytest.raises(ValueError, match=says):
        make_source(config(name="taobao"), 0)
    with pytest.raises(FileNotFoundError, match="grouplens"):
        make_source(config(name="movielens", movielens=options), 0)
