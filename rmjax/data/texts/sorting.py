"""Sorting (Martins et al. 2021; Memoria section 4.1): symbols by frequency in a long sequence.

The frequencies drift from one drawn distribution to another along the sequence, so the last part
alone does not reveal them. A stream is the sequence, a separator, and all sorted symbols but the
last. Each of the last 20 tokens asks for the next symbol (teacher forcing).
"""

# mypy: disable-error-code=override
# `Source` declares attributes that are properties here, since they follow from other fields.

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rmjax.data.source import SPLITS, Examples, Generated, Questions, Source
from rmjax.registry import at_least, setting
from rmjax.types import Array, Key

_ITEMS_AT_ONCE = 2**20  # bounds the memory of `fetch` beside its result


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sequences, and the number of them in each split."""

    task: ClassVar[str] = "last tokens"

    segments: int = setting(4, at_least(1), "number of segments of a sequence")
    length: int = setting(
        0, at_least(0), "number of symbols of a sequence; 0: the thousands that fit the segments"
    )
    symbols: int = setting(
        20, at_least(2), "number of different symbols; all of them are asked for"
    )
    train: int = setting(80_000, at_least(1), "number of sequences in the training split")
    valid: int = setting(800, at_least(1), "number of sequences in the validation split")
    test: int = setting(800, at_least(1), "number of sequences in the test split")


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`."""
    options, N = dict(vars(settings)), common.segment_length
    segments = options.pop("segments")
    options["length"] = settings.length or fitting_length(segments, N, settings.symbols)
    return Sorting(seed=seed, segment_length=N, **options)


def fitting_length(segments: int, segment_length: int, answers: int = 20) -> int:
    """Computes the length of a sequence that fills a number of segments.

    The separator and all answers but the last need room too. The length is a multiple of 1,000 if
    there is room for one, as published.

    Args:
      segments: number of segments.
      segment_length: N, tokens of a segment.
      answers: number of answers.

    Returns:
      The number of symbols of the sequence.

    Raises:
      ValueError: the segments have no room for a sequence.
    """
    room = segments * segment_length - answers
    length = room // 1000 * 1000 or room
    if length < 1:
        raise ValueError(
            f"{segments} segments of {segment_length} tokens have no room for a sequence and its "
            f"{answers} answers: take more segments (config.data.sorting.segments), or longer ones "
            "(config.data.segment_length)"
        )
    return length


@dataclasses.dataclass(frozen=True)
class Sorting(Generated):
    """The source. A stream depends on (seed, split, index) alone.

    Attributes:
      length: number of symbols of the sequence, without the separator and the answers.
      seed: seed of the streams.
      segment_length: N; the references see the last one or two segments.
      symbols: number of different symbols.
      train: number of streams in 'train'.
      valid: number of streams in 'valid'.
      test: number of streams in 'test'.
      positions_at_end: see `Source`. The last `symbols` tokens, which ask, count as the end.

    Raises:
      ValueError: a field is out of range; names it.
    """

    length: int = 1000
    seed: int = 0
    segment_length: int = 256
    symbols: int = 20
    train: int = 80_000
    valid: int = 800
    test: int = 800
    positions_at_end: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in ("length", "segment_length", "train", "valid", "test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        if self.symbols < 2:
            raise ValueError(f"symbols={self.symbols!r}: must be at least 2")

    @property
    def num_items(self) -> int:
        """See `Source`; the separator follows the symbols."""
        return self.symbols + 1

    @property
    def max_items(self) -> int:
        """See `Source`."""
        return self.length + self.symbols

    @property
    def num_queries(self) -> int:
        """See `Source`."""
        return self.symbols

    @property
    def questions(self) -> Questions:
        """See `Source`."""
        return Questions("kind", 1, answer="class", classes=self.symbols, metric="accuracy")

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`; L = length + symbols, Q = symbols.

        Raises:
          ValueError: the split is unknown, or an index is outside it.
        """
        indices = np.asarray(indices)
        outside = indices[(indices < 0) | (indices >= self.size(split))]
        if outside.size:
            allowed = f"must be in [0, {self.size(split)}) for split {split!r}"
            raise ValueError(f"indices={outside[:8].tolist()}: {allowed}")
        total = len(indices)
        chunk = max(1, min(total, _ITEMS_AT_ONCE // (self.length * self.symbols)))
        padded = np.pad(indices.astype(np.int32), (0, max(1, -(-total // chunk)) * chunk - total))
        world = self.length, self.symbols, self.seed, SPLITS.index(split)
        parts = [jax.device_get(generate(*world, part)) for part in padded.reshape(-1, chunk)]
        return {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Answers as readers do that count symbols in a part of the sequence.

        A reader knows the earlier answers. It chooses the most frequent of the other symbols.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          {name of the reader: answers i32 [size, symbols]}.
        """
        first = (self.max_items - 1) // self.segment_length * self.segment_length
        starts = {
            "oracle, no counts": self.length,
            "oracle, last segment": first,
            "oracle, last two segments": first - self.segment_length,
            "oracle, all counts": 0,
        }
        answers: dict[str, np.ndarray] = {}
        size = self.size(split)
        chunk = max(1, min(size, _ITEMS_AT_ONCE // (self.length * self.symbols)))
        for begin in range(0, size, chunk):
            streams = self.fetch(split, np.arange(begin, begin + chunk) % size)
            sequence = jnp.asarray(streams["items"][:, : self.length])
            for name, start in starts.items():
                part = answers_by_count(sequence, streams["target"], max(start, 0), self.symbols)
                answers.setdefault(name, np.empty((size, self.symbols), np.int32))
                answers[name][begin : begin + chunk] = part[: size - begin]
        return answers


@functools.partial(jax.jit, static_argnums=(0, 1))
def generate(
    length: int, symbols: int, seed: Array | int, split_id: Array | int, indices: Array
) -> dict[str, Array]:
    """Draws streams.

    Args:
      length: number of symbols of the sequence.
      symbols: number of different symbols.
      seed: seed of the streams.
      split_id: index of the split in `SPLITS`.
      indices: i32 [B], the streams.

    Returns:
      The arrays of `Sorting.fetch`.
    """
    split_key = jax.random.fold_in(jax.random.key(seed), split_id)
    stream = lambda i: _stream(length, symbols, jax.random.fold_in(split_key, i), i)
    return jax.vmap(stream)(jnp.asarray(indices))


def _stream(length: int, symbols: int, key: Key, index: Array) -> dict[str, Array]:
    """Draws one stream."""
    ends_key, which_key, symbol_key = jax.random.split(key, 3)
    ends = jax.random.randint(ends_key, (2, symbols), 1, 10).astype(jnp.float32)
    below = jnp.cumsum(ends / ends.sum(1, keepdims=True), 1)[:, :-1]
    share = (jnp.arange(length) + 1) / length
    late = (
        jax.random.uniform(which_key, (length,)) < share
    )  # from which of the two a symbol is drawn
    above = jax.random.uniform(symbol_key, (length, 1)) >= below[late.astype(jnp.int32)]
    sequence = above.sum(1, dtype=jnp.int32)
    target = by_frequency(sequence, 0, symbols)
    return {
        "items": jnp.concatenate([sequence, jnp.full(1, symbols, jnp.int32), target[:-1]]),
        "length": jnp.int32(length + symbols),
        "query": jnp.zeros(symbols, jnp.int32),
        "query_mask": jnp.ones(symbols, bool),
        "target": target,
        "example_id": index,
    }


def by_frequency(sequence: Array, start: Array | int, symbols: int) -> Array:
    """Orders the symbols by frequency, the most frequent first.

    If symbols are equally frequent, the one that occurs first comes first. Symbols that do not
    occur come last, in ascending order.

    Args:
      sequence: i32 [L].
      start: the place from which symbols are counted.
      symbols: number of different symbols.

    Returns:
      i32 [symbols].
    """
    place = jnp.arange(len(sequence))
    seen = (sequence[:, None] == jnp.arange(symbols)) & (place >= start)[:, None]
    first = jnp.where(seen, place[:, None], len(sequence)).min(0)
    return jnp.lexsort((jnp.arange(symbols), first, -seen.sum(0))).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=3)
def answers_by_count(sequence: Array, target: Array, start: Array | int, symbols: int) -> Array:
    """Answers as a reader does that counts from a place on, and knows the earlier answers.

    Args:
      sequence: i32 [B, L].
      target: i32 [B, symbols], the right answers.
      start: the place from which symbols are counted.
      symbols: number of different symbols.

    Returns:
      i32 [B, symbols].
    """

    def answers(sequence: Array, target: Array) -> Array:
        rank = jnp.argsort(by_frequency(sequence, start, symbols))
        asked = target[:, None] == jnp.arange(symbols)
        earlier = asked.cumsum(0) - asked
        return jnp.where(earlier > 0, symbols, rank).argmin(1).astype(jnp.int32)

    return jax.vmap(answers)(sequence, target)
