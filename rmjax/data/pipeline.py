"""Batches in one global order, positioned by step: the same on any number of threads, workers and processes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags

from rmjax.data.segments import position_in_segments, segment
from rmjax.data.source import Examples, Source, Wrapper, hash64
from rmjax.data.stories.text import bucket_boundaries
from rmjax.data.texts.streams import Texts
from rmjax.types import Batch


def batches(
    source: Source | Texts,
    split: str = "train",
    *,
    seed: int,
    batch_size: int,
    segment_length: int,
    negatives: int = 64,
    start_step: int = 0,
    num_steps: int,
    prefetch: int = 2,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """This process's part of the batches of steps start_step .. num_steps - 1, leaves in NumPy.

    Step s of all processes together has examples [s G, (s + 1) G), G = `batch_size`, of epoch after epoch, each in an
    order drawn from (seed, epoch). Of a source with buckets an epoch is whole batches of one bucket each, in a drawn
    order; small buckets join larger ones where that takes fewer cells, and the last batch of a bucket is filled up
    with its first examples. Of texts every row has a part of its own and reads on, see `Texts`. `prefetch` batches are
    made ahead, in threads, or in each of `workers` processes. `close()` the iterator when leaving early: it does not
    wait for batches under way.

    Raises:
      ValueError: the batch does not divide among the processes, or the split is empty.
    """
    rows = _rows(batch_size, process_index, process_count)
    if isinstance(source, Texts):
        read = functools.partial(source.batch, split, batch_size=batch_size, rows=rows)
        return _iterate(read, start_step, num_steps, prefetch, workers)
    size = source.size(split)
    if not size:
        raise ValueError(f"split {split!r} is empty")
    make = _batch_maker(source, split, seed, segment_length, negatives)

    def at_step(step: int) -> Batch:
        epoch, place = np.divmod(step * batch_size + rows, size)
        index = np.empty_like(place)
        for e in np.unique(epoch):
            index[epoch == e] = epoch_order(size, seed, int(e))[place[epoch == e]]
        return make(index, epoch)

    buckets = _buckets(source, split, batch_size, joined=True)

    def of_bucket(step: int) -> Batch:
        epoch, place = divmod(step, len(buckets))
        members, first, segments = buckets[epoch_order(len(buckets), seed, epoch)[place]]
        order = epoch_order(len(members), seed, epoch)
        index = members[order[(first + rows) % len(members)]]
        return make(index, np.full_like(index, epoch), segments)

    bucketed = source.buckets(split) is not None
    return _iterate(of_bucket if bucketed else at_step, start_step, num_steps, prefetch, workers)


def eval_batches(
    source: Source,
    split: str,
    *,
    seed: int,
    batch_size: int,
    segment_length: int,
    negatives: int = 64,
    prefetch: int = 2,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """The whole split once, in order (bucket by bucket): batches of one shape, or of one shape a bucket.

    Rows beyond the split have all masks false and an example_id of `size` or more.
    """
    size, rows = source.size(split), _rows(batch_size, process_index, process_count)
    make = _batch_maker(source, split, seed, segment_length, negatives)
    buckets = _buckets(source, split, batch_size)

    def at_step(step: int) -> Batch:
        members, first, segments = buckets[step]
        real = first + rows < len(members)
        index = members[np.where(real, first + rows, len(members) - 1)]
        batch = make(index, np.zeros_like(index), segments)
        return batch.replace(
            item_mask=batch.item_mask & real[:, None, None],
            query_mask=batch.query_mask & real[:, None],
            negative_mask=batch.negative_mask & real[:, None],
            example_id=np.where(real, index, size + step * batch_size + rows).astype(np.int32),
        )

    return _iterate(at_step, 0, len(buckets), prefetch, workers)


class Subset(Wrapper):
    """So many examples of a split, drawn from all of it; otherwise the source.

    Args:
      others: in the place of each example one of another stream is read, of the same bucket, or an empty stream where
        there is none.
    """

    def __init__(self, source: Source, split: str, count: int, seed: int, others: bool = False):
        order = np.argsort(hash64("subset", seed, np.arange(source.size(split))), kind="stable")
        super().__init__(source)
        self._rows = np.sort(order[:count])
        self._others = self._partners(split, seed) if others else None

    def _partners(self, split: str, seed: int) -> np.ndarray:
        """i64 [size], places in this subset, -1 where there is none."""
        places, partner = np.arange(len(self._rows)), np.full(len(self._rows), -1)
        buckets, streams = self.buckets(split), self.stream_id(split)
        bucket = np.zeros_like(places) if buckets is None else buckets[0]
        for inside in (np.flatnonzero(bucket == b) for b in np.unique(bucket)):
            drawn = partner_drawer(streams[inside])(
                np.arange(len(inside)), hash64("other", seed, self._rows[inside])
            )
            partner[inside] = np.where(drawn < 0, -1, inside[drawn])
        return partner

    def size(self, split: str) -> int:
        return len(self._rows)

    def stream_id(self, split: str) -> np.ndarray:
        return self._source.stream_id(split)[self._rows]

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]] | None:
        buckets = self._source.buckets(split)
        return None if buckets is None else (buckets[0][self._rows], buckets[1])

    def groups(self, split: str) -> dict[str, np.ndarray]:
        return {name: inside[self._rows] for name, inside in self._source.groups(split).items()}

    def references(self, split: str) -> dict[str, np.ndarray]:
        return {
            name: answers[self._rows] for name, answers in self._source.references(split).items()
        }

    def also(self, split: str) -> np.ndarray | None:
        also = self._source.also(split)
        return None if also is None else also[self._rows]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        if self._others is None:
            return self._source.fetch(split, self._rows[indices])
        place = self._others[indices]
        examples = self._source.fetch(split, self._rows[place])
        name = "item_mask" if "item_mask" in examples else "length"
        exists = (place >= 0).reshape(-1, *[1] * (examples[name].ndim - 1))
        return examples | {name: examples[name] * exists}


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Steps in which training sees every example of a source with buckets."""
    return len(_buckets(source, "train", batch_size, joined=True))


def _buckets(
    source: Source, split: str, batch_size: int, joined: bool = False
) -> list[tuple[np.ndarray, int, int | None]]:
    """Of each batch of an epoch: its bucket's examples i64 [n], its first place among them, its segments T (None: all
    that the source gives). joined: small buckets go to larger ones where whole batches then are fewer cells, lest one
    long document fill a batch by itself. Not in evaluation, whose splits are to have the same few shapes.
    """
    buckets = source.buckets(split)
    if buckets is None:
        every = np.arange(source.size(split))
        return [(every, first, None) for first in range(0, len(every), batch_size)]
    bucket, segments = buckets
    if joined:
        sizes = np.take(segments, bucket)
        segments = bucket_boundaries(sizes, segments[-1], len(segments), batch_size)
        bucket = np.searchsorted(segments, sizes)
    members = [np.flatnonzero(bucket == b) for b in range(len(segments))]
    return [
        (m, first, T)
        for m, T in zip(members, segments, strict=True)
        for first in range(0, len(m), batch_size)
    ]


@functools.lru_cache(maxsize=64)  # of each bucket its own
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """i64 [size], a permutation drawn from (seed, epoch)."""
    return np.argsort(hash64("order", seed, epoch, np.arange(size)), kind="stable")


def partner_drawer(stream: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(index [B], draw u64 [B]) -> an example of another stream for each: i64 [B], -1 where there is none.

    `stream` i64 [size] names each example's stream. Uniform over the examples of all other streams.
    """
    order = np.argsort(stream, kind="stable")
    first, last = (np.searchsorted(stream[order], stream, side) for side in ("left", "right"))

    def partners(index: np.ndarray, draw: np.ndarray) -> np.ndarray:
        own = last[index] - first[index]
        others = len(stream) - own
        place = (draw % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
        place += np.where(
            place >= first[index], own, 0
        )  # the examples of the own stream lie together in `order`
        return np.where(others > 0, order[np.minimum(place, len(stream) - 1)], -1)

    return partners


def _batch_maker(
    source: Source, split: str, seed: int, segment_length: int, negatives: int
) -> Callable:
    """(index [B], epoch [B], segments T: None for all there are) -> Batch."""
    partners = partner_drawer(source.stream_id(split))

    def make(index: np.ndarray, epoch: np.ndarray, segments: int | None = None) -> Batch:
        partner = partners(index, hash64("partner", seed, epoch, index))
        both = np.arange(2 * len(index))
        fetched = source.fetch(split, np.concatenate([index, np.maximum(partner, 0)]))
        own, other = (
            {name: values[half] for name, values in fetched.items()} for half in np.split(both, 2)
        )
        cut = "item_mask" in own
        others = other["items"]
        if cut:
            others = others.reshape(len(index), -1, *others.shape[3:])
            there = other["item_mask"].reshape(len(index), -1)
            front = np.argsort(~there, 1, kind="stable")  # the valid ones first
            other["length"] = there.sum(1)
        length = np.where(partner < 0, 0, other["length"])[:, None]
        draw = hash64("negatives", seed, epoch[:, None], index[:, None], np.arange(negatives))
        place = (draw % np.maximum(length, 1).astype(np.uint64)).astype(np.int64)
        if cut:
            place = np.take_along_axis(front, place, 1)
            own |= {name: own[name][:, :segments] for name in ("items", "item_mask")}
        else:
            own["items"], own["item_mask"] = segment(
                own["items"], own.pop("length"), segment_length
            )
            if not source.positions_at_end:
                own["position"] = position_in_segments(own["position"], segment_length)
        leaves: dict[str, Any] = own | dict(
            negative_items=others[np.arange(len(index))[:, None], place],
            negative_mask=np.broadcast_to(length > 0, place.shape).copy(),
        )
        return Batch(**leaves)

    return make


def _rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Places in the global batch that are this process's."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} does not divide among {process_count} processes: change one"
        )
    return np.arange(batch_size).reshape(process_count, -1)[process_index]


def _iterate(
    at_step: Callable[[int], Batch], start: int, stop: int, prefetch: int, workers: int
) -> grain.DatasetIterator[Batch]:
    threads = grain.ReadOptions(
        num_threads=min(prefetch, 4) if not workers else 0, prefetch_buffer_size=prefetch
    )
    dataset = grain.MapDataset.range(start, stop).map(at_step).to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # a notebook; grain's workers have flags
            flags.FLAGS.mark_as_parsed()
        # Through pipes: grain frees shared memory in a thread that ends with the process, too early.
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, pipes)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, max(prefetch, 1)))
    return iter(dataset)
