"""Sorting (Martins et al. 2021; Memoria section 4.1): symbols by how often they came in a long sequence.

Frequencies drift from one drawn distribution to another along the sequence, so the last part alone does not tell them.
The sequence, a separator and all but the last of the sorted symbols are the stream; each of the last 20 tokens asks for
the next symbol (teacher forcing).
"""

# mypy: disable-error-code=override
# What `Source` has as attributes, the sizes of a world give as properties.

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.data.source import Examples, Questions, Source
from rmjax.registry import at_least, setting
from rmjax.types import Array, Key

SPLITS = ("train", "valid", "test")
_ITEMS_AT_ONCE = 2**20  # bounds what one call of `fetch` holds beside its result


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sequences, and how many in each split."""

    task: ClassVar[str] = "last tokens"

    segments: int = setting(4, at_least(1), "segments of a sequence")
    length: int = setting(
        0, at_least(0), "symbols of a sequence; 0: the thousands that fit its segments"
    )
    symbols: int = setting(20, at_least(2), "different symbols, all of them asked for")
    train: int = setting(80_000, at_least(1), "sequences to train on")
    valid: int = setting(800, at_least(1), "sequences to validate on")
    test: int = setting(800, at_least(1), "sequences to test on")


def make(settings: Settings, common: Any, seed: int) -> Source:
    options = dict(vars(settings))
    segments = options.pop("segments")
    options["length"] = settings.length or fitting(
        segments, common.segment_length, settings.symbols
    )
    return Sorting(seed=seed, segment_length=common.segment_length, **options)


def fitting(segments: int, segment_length: int, answers: int = 20) -> int:
    """Symbols of a sequence that fills so many segments, with the separator and all answers but the last; whole
    thousands where there are any, as published. Raises ValueError where there is no room.
    """
    room = segments * segment_length - answers
    length = room // 1000 * 1000 or room
    if length < 1:
        raise ValueError(
            f"{segments} segments of {segment_length} tokens have no room for a sequence and its {answers} answers: "
            "more of them, or longer ones (config.data.sorting.segments, config.data.segment_length)"
        )
    return length


@dataclasses.dataclass(frozen=True)
class Sorting(Source):
    """A source. A stream depends on (seed, split, index) alone. Raises ValueError naming the field.

    The answers are asked of the last `symbols` tokens, so `positions_at_end` speaks of those.
    """

    length: int = 1000  # of the sequence, without the separator and the answers
    seed: int = 0
    segment_length: int = 256  # what the references see
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
        """The symbols, and after them the separator."""
        return self.symbols + 1

    @property
    def max_items(self) -> int:
        return self.length + self.symbols

    @property
    def num_queries(self) -> int:
        return self.symbols

    @property
    def questions(self) -> Questions:
        return Questions(
            query="kind", kinds=1, answer="class", classes=self.symbols, metric="accuracy"
        )

    def size(self, split: str) -> int:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {SPLITS}")
        return int(getattr(self, split))

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """As `Source.fetch`; L = length + symbols, Q = symbols."""
        indices = np.asarray(indices)
        outside = indices[(indices < 0) | (indices >= self.size(split))]
        if outside.size:
            raise ValueError(
                f"indices={outside[:8].tolist()}: must be in [0, {self.size(split)}) for split {split!r}"
            )
        total = len(indices)
        chunk = max(1, min(total, _ITEMS_AT_ONCE // (self.length * self.symbols)))
        padded = np.pad(indices.astype(np.int32), (0, max(1, -(-total // chunk)) * chunk - total))
        parts = [
            jax.device_get(
                generate(self.length, self.symbols, self.seed, SPLITS.index(split), part)
            )
            for part in padded.reshape(-1, chunk)
        ]
        return {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Answers i32 [size, symbols] of readers that count in a part of the sequence, and know what was answered
        before: the most frequent of the symbols that are left.
        """
        first = (self.max_items - 1) // self.segment_length * self.segment_length
        starts = {
            "oracle, no counts": self.length,
            "oracle, last segment": first,
            "oracle, last two segments": first - self.segment_length,
            "oracle, all counts": 0,
        }
        answers: dict[str, np.ndarray] = {}
        size, chunk = (
            self.size(split),
            max(1, min(self.size(split), _ITEMS_AT_ONCE // (self.length * self.symbols))),
        )
        for begin in range(0, size, chunk):
            streams = self.fetch(split, np.arange(begin, begin + chunk) % size)
            sequence = jnp.asarray(streams["items"][:, : self.length])
            for name, start in starts.items():
                found = counted(sequence, streams["target"], max(start, 0), self.symbols)
                answers.setdefault(name, np.empty((size, self.symbols), np.int32))[
                    begin : begin + chunk
                ] = found[: size - begin]
        return answers


@functools.partial(jax.jit, static_argnums=(0, 1))
def generate(
    length: int, symbols: int, seed: Array | int, split_id: Array | int, indices: Array
) -> dict[str, Array]:
    """Streams `indices` [B]: the arrays of `Sorting.fetch`."""
    split_key = jax.random.fold_in(jax.random.key(seed), split_id)
    return jax.vmap(lambda i: _stream(length, symbols, jax.random.fold_in(split_key, i), i))(
        jnp.asarray(indices)
    )


def _stream(length: int, symbols: int, key: Key, index: Array) -> dict[str, Array]:
    ends_key, which_key, symbol_key = jax.random.split(key, 3)
    ends = jax.random.randint(ends_key, (2, symbols), 1, 10).astype(jnp.float32)
    below = jnp.cumsum(ends / ends.sum(1, keepdims=True), 1)[:, :-1]
    share = (jnp.arange(length) + 1) / length
    late = jax.random.uniform(which_key, (length,)) < share  # of which end a token is drawn
    sequence = (jax.random.uniform(symbol_key, (length, 1)) >= below[late.astype(jnp.int32)]).sum(
        1, dtype=jnp.int32
    )
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
    """Symbols [symbols] of a sequence [L] from `start` on, the most frequent first; of equally frequent ones that which
    came first, and those that did not come in rising order.
    """
    place = jnp.arange(len(sequence))
    seen = (sequence[:, None] == jnp.arange(symbols)) & (place >= start)[:, None]
    first = jnp.where(seen, place[:, None], len(sequence)).min(0)
    return jnp.lexsort((jnp.arange(symbols), first, -seen.sum(0))).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=3)
def counted(sequence: Array, target: Array, start: Array | int, symbols: int) -> Array:
    """Sequence [B, L], target [B, symbols] -> answers [B, symbols] of one who counts from `start` on."""

    def answers(sequence: Array, target: Array) -> Array:
        rank = jnp.argsort(by_frequency(sequence, start, symbols))
        told = (target[:, None] == jnp.arange(symbols)).cumsum(0) - (
            target[:, None] == jnp.arange(symbols)
        )
        return jnp.where(told > 0, symbols, rank).argmin(1).astype(jnp.int32)

    return jax.vmap(answers)(sequence, target)
