"""Batches in one global order, addressed by step.

The batch of a step does not depend on the number of threads, workers or processes.
"""

from __future__ import annotations

import dataclasses
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

_MakeBatch = Callable[..., Batch]  # see `_batch_maker`
_Planned = tuple[np.ndarray, int, int | None]  # a batch, see `_buckets`


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
    shapes: int = 0,
    prefetch: int = 2,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Reads this process's rows of the batches of steps start_step .. num_steps - 1.

    Step s reads examples [s G, (s + 1) G) of the global order, G = `batch_size`, over all
    processes. The global order is epoch after epoch, each in an order drawn from (seed, epoch).

    A source with buckets is read in batches of one bucket each, in a drawn order. A small bucket
    joins a larger one if the epoch then has fewer cells (rows times segments). The last batch of
    a bucket is filled with the first examples of the bucket again.

    Texts are read differently: each row continues with its own part of the text, see `Texts`.

    Call `close()` on the iterator to leave early; it does not wait for unfinished batches.

    Args:
      source: the examples.
      split: 'train', 'valid' or 'test'.
      seed: seed of the order and of the negatives.
      batch_size: G, rows of a batch over all processes.
      segment_length: N, items of a segment; unused if the source gives segments.
      negatives: P, items of another stream that each example gets.
      shapes: for a source with buckets: most lengths that batches have. Batches stay as they are,
        but some are padded further; 0: every bucket has its length.
      start_step: the first step to read.
      num_steps: the step after the last one.
      prefetch: number of batches that are made ahead, by threads or by each worker process.
      workers: number of worker processes; 0: threads make the batches.
      process_index: the index of this process.
      process_count: number of processes.

    Returns:
      An iterator over batches whose leaves are NumPy arrays with G / process_count rows.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`, or the split is empty.
    """
    rows = _rows(batch_size, process_index, process_count)
    if isinstance(source, Texts):
        read = functools.partial(source.batch, split, batch_size=batch_size, rows=rows)
        return _iterate(read, start_step, num_steps, prefetch, workers)
    if not source.size(split):
        raise ValueError(f"split {split!r} is empty: the source has no examples in it")
    make = _batch_maker(source, split, seed, segment_length, negatives)
    if source.buckets(split) is None:
        at_step = _example_reader(source.size(split), seed, batch_size, rows, make)
    else:
        buckets = _buckets(source, split, batch_size, shapes, joined=True)
        at_step = _bucket_reader(buckets, seed, rows, make)
    return _iterate(at_step, start_step, num_steps, prefetch, workers)


def _example_reader(
    size: int, seed: int, batch_size: int, rows: np.ndarray, make: _MakeBatch
) -> Callable[[int], Batch]:
    """Makes the function that reads a training step, for a source without buckets."""

    def at_step(step: int) -> Batch:
        epoch, place = np.divmod(step * batch_size + rows, size)
        index = np.empty_like(place)
        for e in np.unique(epoch):
            index[epoch == e] = epoch_order(size, seed, int(e))[place[epoch == e]]
        return make(index, epoch)

    return at_step


def _bucket_reader(
    buckets: list[_Planned], seed: int, rows: np.ndarray, make: _MakeBatch
) -> Callable[[int], Batch]:
    """Makes the function that reads a training step, for a source with buckets."""

    def at_step(step: int) -> Batch:
        epoch, place = divmod(step, len(buckets))
        members, first, segments = buckets[epoch_order(len(buckets), seed, epoch)[place]]
        order = epoch_order(len(members), seed, epoch)
        index = members[order[(first + rows) % len(members)]]
        return make(index, np.full_like(index, epoch), segments)

    return at_step


def eval_batches(
    source: Source,
    split: str,
    *,
    seed: int,
    batch_size: int,
    segment_length: int,
    negatives: int = 64,
    shapes: int = 0,
    prefetch: int = 2,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Reads a split once, in order, bucket by bucket.

    All batches of a bucket have one shape; all batches have one shape if there are no buckets.
    The last batch is filled with rows whose masks are false and whose example_id is at least
    `size`.

    Args:
      source: the examples.
      split: 'train', 'valid' or 'test'.
      seed: seed of the negatives.
      batch_size: rows of a batch over all processes.
      segment_length: N, items of a segment; unused if the source gives segments.
      negatives: P, items of another stream that each example gets.
      shapes: for a source with buckets: most lengths that batches have. Batches stay as they are,
        but some are padded further; 0: every bucket has its length.
      prefetch: number of batches that are made ahead, by threads or by each worker process.
      workers: number of worker processes; 0: threads make the batches.
      process_index: the index of this process.
      process_count: number of processes.

    Returns:
      An iterator over batches whose leaves are NumPy arrays.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`.
    """
    size, rows = source.size(split), _rows(batch_size, process_index, process_count)
    make = _batch_maker(source, split, seed, segment_length, negatives)
    buckets = _buckets(source, split, batch_size, shapes)

    def at_step(step: int) -> Batch:
        members, first, segments = buckets[step]
        real = first + rows < len(members)
        index = members[np.where(real, first + rows, len(members) - 1)]
        batch = make(index, np.zeros_like(index), segments)
        example_id = np.where(real, index, size + step * batch_size + rows)
        leaves: dict[str, Any] = dict(
            item_mask=batch.item_mask & real[:, None, None],
            query_mask=batch.query_mask & real[:, None],
            negative_mask=batch.negative_mask & real[:, None],
            example_id=example_id.astype(np.int32),
        )
        return dataclasses.replace(batch, **leaves)

    return _iterate(at_step, 0, len(buckets), prefetch, workers)


class Subset(Wrapper):
    """A random sample of a split.

    Args:
      source: the source to sample from.
      split: the split to sample from; read the subset with this split only.
      count: number of examples; at most the size of the split is used.
      seed: seed of the sample.
      others: whether `fetch` swaps streams. Each example is then replaced by one of another stream
        in the same bucket. It is an empty stream if the bucket has no other stream.
    """

    def __init__(self, source: Source, split: str, count: int, seed: int, others: bool = False):
        order = np.argsort(hash64("subset", seed, np.arange(source.size(split))), kind="stable")
        super().__init__(source)
        self._rows = np.sort(order[:count])
        self._others = self._partners(split, seed) if others else None

    def _partners(self, split: str, seed: int) -> np.ndarray:
        """Draws the swapped example for each example: places in this subset i64 [size], or -1."""
        places, partner = np.arange(len(self._rows)), np.full(len(self._rows), -1)
        buckets, streams = self.buckets(split), self.stream_id(split)
        bucket = np.zeros_like(places) if buckets is None else buckets[0]
        for members in (np.flatnonzero(bucket == b) for b in np.unique(bucket)):
            draw = hash64("other", seed, self._rows[members])
            drawn = partner_drawer(streams[members])(np.arange(len(members)), draw)
            partner[members] = np.where(drawn < 0, -1, members[drawn])
        return partner

    def size(self, split: str) -> int:
        """See `Source.size`."""
        return len(self._rows)

    def stream_id(self, split: str) -> np.ndarray:
        """See `Source.stream_id`."""
        return self._source.stream_id(split)[self._rows]

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]] | None:
        """See `Source.buckets`."""
        buckets = self._source.buckets(split)
        return None if buckets is None else (buckets[0][self._rows], buckets[1])

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """See `Source.groups`."""
        return {name: mask[self._rows] for name, mask in self._source.groups(split).items()}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """See `Source.references`."""
        references = self._source.references(split)
        return {name: answers[self._rows] for name, answers in references.items()}

    def also(self, split: str) -> np.ndarray | None:
        """See `Source.also`."""
        also = self._source.also(split)
        return None if also is None else also[self._rows]

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`."""
        if self._others is None:
            return self._source.fetch(split, self._rows[indices])
        place = self._others[indices]
        examples = self._source.fetch(split, self._rows[place])
        name = "item_mask" if "item_mask" in examples else "length"
        exists = (place >= 0).reshape(-1, *[1] * (examples[name].ndim - 1))
        return examples | {name: examples[name] * exists}


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Counts the training steps of one epoch.

    Args:
      source: the examples.
      batch_size: rows of a batch over all processes.

    Returns:
      The number of steps after which every example of a source with buckets was read.
    """
    return len(_buckets(source, "train", batch_size, joined=True))


def _buckets(
    source: Source, split: str, batch_size: int, shapes: int = 0, joined: bool = False
) -> list[_Planned]:
    """Lists the batches of an epoch.

    `joined` merges small buckets into larger ones if full batches then have fewer cells. Otherwise
    one long document could fill a batch with copies of itself. Evaluation does not merge, so that
    its splits share the same few shapes. `shapes`: see `batches`.

    Returns:
      For each batch: (examples of its bucket i64 [n], place of its first example among them,
      segments T, or None for all that the source gives).
    """
    buckets = source.buckets(split)
    if buckets is None:
        every = np.arange(source.size(split))
        return [(every, first, None) for first in range(0, len(every), batch_size)]
    bucket, segments = buckets
    # The lengths depend on the source's list alone, so all splits share them.
    lengths = bucket_boundaries(np.array(segments), segments[-1], shapes or len(segments))
    if joined:
        sizes = np.take(segments, bucket)
        segments = bucket_boundaries(sizes, segments[-1], len(segments), batch_size)
        bucket = np.searchsorted(segments, sizes)
    members = [np.flatnonzero(bucket == b) for b in range(len(segments))]
    padded = np.take(lengths, np.searchsorted(lengths, segments)).tolist()
    return [
        (m, first, T)
        for m, T in zip(members, padded, strict=True)
        for first in range(0, len(m), batch_size)
    ]


@functools.lru_cache(maxsize=64)  # each bucket has an entry
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Draws the order of an epoch.

    Args:
      size: number of examples.
      seed: seed of the order.
      epoch: the number of the epoch, from 0.

    Returns:
      A permutation i64 [size] that depends on the arguments alone.
    """
    return np.argsort(hash64("order", seed, epoch, np.arange(size)), kind="stable")


def partner_drawer(stream: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Makes the function that draws an example of another stream.

    Args:
      stream: i64 [size], the stream of each example.

    Returns:
      partners(index i64 [B], draw u64 [B]) -> i64 [B]: an example of another stream for each
      index, uniform over the examples of all other streams; -1 if no other stream exists.
    """
    order = np.argsort(stream, kind="stable")
    first, last = (np.searchsorted(stream[order], stream, side) for side in ("left", "right"))

    def partners(index: np.ndarray, draw: np.ndarray) -> np.ndarray:
        own = last[index] - first[index]
        others = len(stream) - own
        place = (draw % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
        # The stream's own examples are adjacent in `order`: skip them.
        place += np.where(place >= first[index], own, 0)
        return np.where(others > 0, order[np.minimum(place, len(stream) - 1)], -1)

    return partners


def _batch_maker(
    source: Source, split: str, seed: int, segment_length: int, negatives: int
) -> _MakeBatch:
    """Makes make(index [B], epoch [B], segments T, or None for all segments) -> Batch."""
    partners = partner_drawer(source.stream_id(split))

    def make(index: np.ndarray, epoch: np.ndarray, segments: int | None = None) -> Batch:
        partner = partners(index, hash64("partner", seed, epoch, index))
        both = np.arange(2 * len(index))
        fetched = source.fetch(split, np.concatenate([index, np.maximum(partner, 0)]))
        own, other = (
            {name: values[half] for name, values in fetched.items()} for half in np.split(both, 2)
        )
        segmented = "item_mask" in own
        others = other["items"]
        if segmented:
            others = others.reshape(len(index), -1, *others.shape[3:])
            valid = other["item_mask"].reshape(len(index), -1)
            front = np.argsort(~valid, 1, kind="stable")  # valid items first
            other["length"] = valid.sum(1)
        length = np.where(partner < 0, 0, other["length"])[:, None]
        draw = hash64("negatives", seed, epoch[:, None], index[:, None], np.arange(negatives))
        place = (draw % np.maximum(length, 1).astype(np.uint64)).astype(np.int64)
        if segmented:
            place = np.take_along_axis(front, place, 1)
            own |= {name: own[name][:, :segments] for name in ("items", "item_mask")}
        else:
            items, lengths = own["items"], own.pop("length")
            if source.questions.answer == "item":  # a stream cut into segments says it itself
                every = np.broadcast_to(lengths[:, None], own["query_mask"].shape)
                own["items_before"] = every if source.positions_at_end else own["position"]
            own["items"], own["item_mask"] = segment(items, lengths, segment_length)
            if not source.positions_at_end:
                own["position"] = position_in_segments(own["position"], segment_length)
        leaves: dict[str, Any] = own | dict(
            negative_items=others[np.arange(len(index))[:, None], place],
            negative_mask=np.broadcast_to(length > 0, place.shape).copy(),
        )
        return Batch(**leaves)

    return make


def _rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Places in the global batch that belong to this process."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} does not divide among {process_count} processes: "
            "change one of the two numbers"
        )
    return np.arange(batch_size).reshape(process_count, -1)[process_index]


def _iterate(
    at_step: Callable[[int], Batch], start: int, stop: int, prefetch: int, workers: int
) -> grain.DatasetIterator[Batch]:
    """Makes the batches start .. stop - 1 ahead, by threads or by worker processes."""
    threads = grain.ReadOptions(
        num_threads=min(prefetch, 4) if not workers else 0, prefetch_buffer_size=prefetch
    )
    dataset = grain.MapDataset.range(start, stop).map(at_step).to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # as in a notebook; grain's workers read flags
            flags.FLAGS.mark_as_parsed()
        # Batches go through pipes: grain's thread that frees shared memory ends with the process,
        # which is too early.
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, pipes)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, max(prefetch, 1)))
    return iter(dataset)
