"""What the pipeline reads from, and the one way of drawing numbers on the host."""

from __future__ import annotations

import abc
import dataclasses
import threading
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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


@dataclasses.dataclass(frozen=True)
class Description:
    """What a task, and a reader of its results, needs to know of the data. A run keeps it, and needs no data then.

    Attributes:
      num_items, max_items, num_queries, positions_at_end, questions, feature_width: as `Source` has them.
      vocabulary: the words, by id.
      classes: the answers, by number.
      numbering: what item ids stand for, see `Source`; ids from outside are a tuple.
      max_segments: of the longest stream, where streams come in segments.
      vector_width: of the word vectors that item features begin with; 0: there are none.
      endless: these are texts, whose rows are read on and on (`rmjax.data.texts.streams`).
      tokenizer: what makes the texts' tokenizer, see `rmjax.data.texts.tokenizers.unpacked`.
    """

    num_items: int
    max_items: int = 0
    num_queries: int = 0
    positions_at_end: bool = True
    questions: Questions = Questions()
    feature_width: int = 0
    vocabulary: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    numbering: tuple | str | None = None
    max_segments: int | None = None
    vector_width: int = 0
    endless: bool = False
    tokenizer: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return vars(self) | {"questions": self.questions._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Description:
        """The way back.

        Raises:
          TypeError, KeyError: the values are not those of a description.
        """
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | lists | {"questions": Questions(**values["questions"])})


class Source(abc.ABC):
    """Streams with their questions, read by index. Splits are 'train', 'valid' and 'test'.

    A subclass sets the first four attributes, gives `size` and `fetch`, and overrides what is not as below.

    Attributes:
      num_items: item ids are 0 .. num_items - 1; 0: items are features.
      max_items: L, the longest stream.
      num_queries: Q, the most questions of an example.
      positions_at_end: whether every question comes after the whole stream.
      questions: how the source asks.
      feature_width: F, where items are features and not ids.
      vocabulary: the words, by id, where items are words.
      classes: the answers, by number.
      numbering: what item ids stand for. Either ids from outside [num_items], such as movieIds; or a text that two
        sources have in common only if their ids mean the same. None: nobody knows.
      popularity: i64 [num_items], how often an item comes in the training part; None: it was not counted.
    """

    num_items: int
    max_items: int
    num_queries: int
    positions_at_end: bool
    questions: Questions = Questions()
    feature_width: int = 0
    vocabulary: Sequence[str] = ()
    classes: Sequence[str] = ()
    numbering: np.ndarray | str | None = None
    popularity: np.ndarray | None = None

    @abc.abstractmethod
    def size(self, split: str) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """Examples by index: a function of its arguments alone, called from several threads.

        Args:
          split: 'train', 'valid' or 'test'.
          indices: i64 [B].

        Returns:
          items i32 [B,L], length i32 [B], query i32 [B,Q], query_mask bool [B,Q], target i32 [B,Q], example_id i32 [B]
          (the index) and, unless positions_at_end, position i32 [B,Q], how many items come before the question.

          Streams that come in segments have items [B,T,N] (or f32 [B,T,N,F]) and item_mask bool [B,T,N] in place of
          length, and position counts segments. Further leaves of `Batch` (word_mask, candidates, ...) are as described
          there.
        """

    def stream_id(self, split: str) -> np.ndarray:
        """Which examples are cut from one stream.

        Returns:
          i64 [size], equal for those; without an override every example is a stream of its own.
        """
        return np.arange(self.size(split))

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]] | None:
        """Which examples may share a batch, for streams that come in segments of several numbers.

        Returns:
          i64 [size], the bucket of each example; and the segments T of each bucket, rising. A batch comes from one
          bucket, so there are as many shapes as buckets, or fewer. None: all examples have one shape.
        """
        return None

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """Parts of the questions that are also reported on their own.

        Returns:
          {name: bool [size, Q]}.
        """
        return {}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """What other readers answer: rows of the final table.

        Returns:
          {name: scores of clicks f [size, Q], or the chosen answers i [size, Q]}.
        """
        return {}

    def also(self, split: str) -> np.ndarray | None:
        """Second right choices.

        Returns:
          i [size, Q], -1 where a question has none; None: no question has one.
        """
        return None

    def describe(self) -> Description:
        """All that a task needs to know of the source, to be kept with what is trained on it."""
        buckets, ids = self.buckets("train"), self.numbering
        return Description(
            num_items=int(self.num_items),
            max_items=int(self.max_items),
            num_queries=int(self.num_queries),
            positions_at_end=bool(self.positions_at_end),
            questions=self.questions,
            feature_width=int(self.feature_width),
            vocabulary=tuple(self.vocabulary),
            classes=tuple(self.classes),
            numbering=ids
            if ids is None or isinstance(ids, str)
            else tuple(np.asarray(ids).tolist()),
            max_segments=None if buckets is None else int(buckets[1][-1]),
        )


class Wrapper(Source):
    """Another source; a subclass overrides what differs from it."""

    def __init__(self, source: Source):
        self._source = source
        self.num_items, self.max_items = source.num_items, source.max_items
        self.num_queries, self.positions_at_end = source.num_queries, source.positions_at_end
        self.questions, self.feature_width = source.questions, source.feature_width
        self.vocabulary, self.classes = source.vocabulary, source.classes
        self.numbering, self.popularity = source.numbering, source.popularity

    def size(self, split: str) -> int:
        return self._source.size(split)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        return self._source.fetch(split, indices)

    def stream_id(self, split: str) -> np.ndarray:
        return self._source.stream_id(split)

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]] | None:
        return self._source.buckets(split)

    def groups(self, split: str) -> dict[str, np.ndarray]:
        return self._source.groups(split)

    def references(self, split: str) -> dict[str, np.ndarray]:
        return self._source.references(split)

    def also(self, split: str) -> np.ndarray | None:
        return self._source.also(split)

    def describe(self) -> Description:
        return self._source.describe()


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
            state = mix(
                state + np.uint64(0x9E3779B97F4A7C15) ^ mix(value + np.uint64(0x9E3779B97F4A7C15))
            )
    return np.asarray(state)


def cached(source: Source, ram_bytes: int) -> Source:
    """`source` with every split that takes at most `ram_bytes` kept in RAM, from its first use."""
    return _Cached(source, ram_bytes)


class _Cached(Wrapper):
    def __init__(self, source: Source, ram_bytes: int):
        super().__init__(source)
        self._ram_bytes = ram_bytes
        self._splits: dict[str, Examples | None] = {}
        self._lock = threading.Lock()

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
        whole = {
            name: np.empty((size, *values.shape[1:]), values.dtype) for name, values in part.items()
        }
        for start in range(0, size, block):
            if start:
                part = self._source.fetch(split, np.arange(start, start + block) % size)
            for name, values in part.items():
                whole[name][start : start + block] = values[: size - start]
        return whole
