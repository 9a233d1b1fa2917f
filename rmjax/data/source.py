"""What the pipeline reads from, and the one way of drawing numbers on the host."""

from __future__ import annotations

import threading
import zlib
from typing import Any, NamedTuple, Protocol

import numpy as np

Examples = dict[str, np.ndarray]  # leading axis B; the keys are listed at `Source.fetch`


class Questions(NamedTuple):
    """How a source asks, and what it takes for an answer."""

    query: str = "item"  # the id of an item | "kind": one of `kinds` | "words": a sentence
    kinds: int = 0
    words: int = 0  # vocabulary of the questions, where it is not that of the items
    answer: str = "click"  # was it clicked | "class": one of `classes` | "choice": one of the question's candidates
    classes: int = 0
    metric: str = "auc"  # of the final table; "accuracy", "error" (1 - accuracy, its mean over the groups) or "mrr"
    f1: bool = False  # with accuracy, of classes: the mean of their F1 is reported too


class Source(Protocol):
    """Streams with their questions, read by index. Splits are 'train', 'valid' and 'test'.

    A source may also have
      questions: how it asks; without it as `Questions()`.
      feature_width: F, where items are features and not ids (num_items is 0 then).
      stream_id(split) -> i64 [size], equal where two examples are cut from one stream.
      buckets(split) -> (i64 [size], which bucket an example is in; [T of each bucket]): a batch comes from one bucket,
        so that there are as many shapes as buckets, or fewer. For streams that come in segments.
      groups(split) -> {name: bool [size, Q]}: parts of the questions that are also reported on their own.
      references(split) -> {name: scores f [size, Q], or of other answers than clicks what is chosen, i [size, Q]},
        what other readers answer: rows of the final table.
      also(split) -> i [size, Q]: a second right choice of a question, -1 where there is none.
      vocabulary: the words, by id.
      numbering: what item ids stand for. Either ids from outside i64 [num_items], such as movieIds; or a text that two
        sources have in common only if their ids mean the same.
    """

    @property
    def num_items(self) -> int:
        """Item ids are 0 .. num_items - 1."""

    @property
    def max_items(self) -> int:
        """L, the longest stream."""

    @property
    def num_queries(self) -> int:
        """Q, the most questions of an example."""

    @property
    def positions_at_end(self) -> bool:
        """Whether every question comes after the whole stream."""

    def size(self, split: str) -> int:
        """Number of examples."""

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """Examples `indices` i64 [B]: items i32 [B,L], length i32 [B], query i32 [B,Q], query_mask bool [B,Q],
        target i32 [B,Q], example_id i32 [B] (the index) and, unless positions_at_end, position i32 [B,Q], how many
        items come before the question. A function of its arguments alone; called from several threads.

        Streams that come in segments have items [B,T,N] (or f32 [B,T,N,F]) and item_mask bool [B,T,N] in place of
        length, and position counts segments. Further leaves of `Batch` (word_mask, candidates, ...) are as there."""


def hash64(*parts: Any) -> np.ndarray:
    """u64 of the broadcast shape of `parts` (names, integers, integer arrays): SplitMix64's finalizer, chained.

    What the host draws, it draws from this: the same on every machine, for any order and any number of readers.
    """

    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            value = zlib.crc32(part.encode()) if isinstance(part, str) else part
            value = np.asarray(value, np.int64).astype(np.uint64)
            state = mix(state + np.uint64(0x9E3779B97F4A7C15) ^ mix(value + np.uint64(0x9E3779B97F4A7C15)))
    return np.asarray(state)


def cached(source: Source, ram_bytes: int) -> Source:
    """`source` with every split that takes at most `ram_bytes` kept in RAM, from its first use."""
    return _Cached(source, ram_bytes)


class _Cached:
    def __init__(self, source: Source, ram_bytes: int):
        self._source, self._ram_bytes = source, ram_bytes
        self._splits: dict[str, Examples | None] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __reduce__(self):  # another process fills its own
        return _Cached, (self._source, self._ram_bytes)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        with self._lock:
            if split not in self._splits:
                self._splits[split] = self._load(split)
        whole = self._splits[split]
        if whole is None:
            return self._source.fetch(split, indices)
        return {name: values[indices] for name, values in whole.items()}

    def _load(self, split: str) -> Examples | None:
        size = self._source.size(split)
        block = min(size, 256)  # always as many rows, so that a jitted generator compiles once
        part = self._source.fetch(split, np.arange(block))
        if size * sum(values[:1].nbytes for values in part.values()) > self._ram_bytes:
            return None
        whole = {name: np.empty((size, *values.shape[1:]), values.dtype) for name, values in part.items()}
        for start in range(0, size, block):
            if start:
                part = self._source.fetch(split, np.arange(start, start + block) % size)
            for name, values in part.items():
                whole[name][start : start + block] = values[: size - start]
        return whole
