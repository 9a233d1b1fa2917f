"""The sources that the pipeline reads, and the one way of drawing numbers on the host."""

from __future__ import annotations

import abc
import dataclasses
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "valid", "test")
Examples = dict[str, np.ndarray]  # leading axis B; `Source.fetch` lists the keys


class Questions(NamedTuple):
    """How a source asks, and what counts as an answer.

    Attributes:
      query: the form of a question. "item": an item id. "kind": one of `kinds` fixed questions.
        "words": a sentence. Default "item".
      kinds: number of fixed questions; used by query = "kind". Default 0.
      words: size of the questions' vocabulary, if it is not the items' vocabulary. Default 0.
      answer: the form of an answer. "click": whether the item was clicked. "class": one of
        `classes`. "choice": one of the question's candidates. "item": the item that comes next,
        one of all items. Default "click".
      classes: number of classes; used by answer = "class". Default 0.
      metric: the metric of the final table, a name in `rmjax.registry.METRICS`: "auc",
        "accuracy", "mrr", "ndcg@10" and so on, or "error" (1 - accuracy, averaged over the groups).
        Default "auc".
      f1: whether the mean F1 over the classes is reported beside the accuracy. Default False.
      exclude_seen: answer = "item": whether the items of the stream before the question do not
        compete with the target. Default False: a user may come back to an item.
    """

    query: str = "item"
    kinds: int = 0
    words: int = 0
    answer: str = "click"
    classes: int = 0
    metric: str = "auc"
    f1: bool = False
    exclude_seen: bool = False


@dataclasses.dataclass(frozen=True)
class Description:
    """What a task, and a reader of its results, needs to know of the data.

    A run stores it beside the checkpoints, so the trained model can be used without the data.

    Attributes:
      num_items: as in `Source`.
      max_items: as in `Source`. Default 0.
      num_queries: as in `Source`. Default 0.
      positions_at_end: as in `Source`. Default True.
      questions: as in `Source`. Default `Questions()`.
      feature_width: as in `Source`. Default 0.
      vocabulary: the word of each item id; () if items are not words.
      classes: the name of each class; () if answers are not classes.
      numbering: what item ids stand for, as in `Source`; an array of outside ids becomes a tuple.
      max_segments: number of segments of the longest stream, for sources with buckets;
        None for all others.
      vector_width: width of the word vectors that initialise the item features;
        0: the run uses none.
      endless: True for texts, whose rows are read without end (`rmjax.data.texts.streams`).
      tokenizer: the texts' tokenizer as JSON, see `rmjax.data.texts.tokenizers.unpacked`;
        None if items are not tokens.
      popularity: as in `Source`, where an item is the answer; () for all other questions.
    """

    num_items: int
    max_items: int = 0
    num_queries: int = 0
    positions_at_end: bool = True
    questions: Questions = Questions()
    feature_width: int = 0
    vocabulary: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    numbering: tuple[int, ...] | tuple[str, ...] | str | None = None
    max_segments: int | None = None
    vector_width: int = 0
    endless: bool = False
    tokenizer: dict[str, Any] | None = None
    popularity: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as values that JSON can hold."""
        return vars(self) | {"questions": self.questions._asdict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Description:
        """Rebuilds the description that `as_json` converted.

        Args:
          values: what `as_json` returned. Lists, which JSON makes of tuples, are accepted.

        Returns:
          An equal description.

        Raises:
          TypeError: a field is unknown, or num_items is missing.
          KeyError: `questions` is missing.
        """
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "questions": Questions(**values["questions"])})


class Source(abc.ABC):
    """Streams with their questions, read by index. The splits are 'train', 'valid' and 'test'.

    A subclass sets the first four attributes and implements `size` and `fetch`. Every other
    attribute and method has a default; override those that do not fit your data.

    Attributes:
      num_items: number of item ids, which are 0 .. num_items - 1; 0 if items are feature vectors.
      max_items: L, the number of items of the longest stream.
      num_queries: Q, the largest number of questions of an example.
      positions_at_end: whether every question comes after the complete stream.
      questions: how the source asks. Default `Questions()`: was this item clicked?
      feature_width: F, the width of items that are feature vectors. Default 0: items are ids.
      vocabulary: the word of each item id, where items are words. Default ().
      classes: the name of each class, where answers are classes. Default ().
      numbering: what item ids stand for. Either the outside id of each item, such as movieIds:
        i64 [num_items], or strings in an array of objects; or a text that two sources share only
        if their ids mean the same.
        Default None: unknown.
      popularity: i64 [num_items], how often each item occurs in the training part.
        Default None: not counted.
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
        """Counts the examples of a split.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          The number of examples; 0 for an empty split.
        """

    @abc.abstractmethod
    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """Reads examples by index.

        The result depends on the arguments alone. Several threads call this method at once.

        Args:
          split: 'train', 'valid' or 'test'.
          indices: i64 [B], each in [0, size(split)); an index may occur more than once.

        Returns:
          A dict of arrays, padded to the sizes L and Q that the attributes give:

          - items: i32 [B, L], item ids, 0 after the end of the stream.
          - length: i32 [B], items of each stream.
          - query: i32 [B, Q], the questions; i32 [B, Q, W] if they are sentences of W words.
          - query_mask: bool [B, Q], which questions exist.
          - target: i32 [B, Q], the answers. Clicks: 1 clicked, 0 not. Otherwise the number of
            the class, of the right choice, or of the item.
          - example_id: i32 [B], the index.
          - position: i32 [B, Q], number of items before each question. Absent if
            `positions_at_end`.

          Streams that are already cut into segments have items [B, T, N] (or f32 [B, T, N, F]).
          They have item_mask bool [B, T, N] in place of length. Their position counts segments.
          If an item is the answer, they add items_before i32 [B, Q]: the places before each
          question.

          Other fields of `rmjax.Batch` (word_mask, candidates, ...) may be added; their shapes
          are those of `rmjax.Batch`.
        """

    def stream_id(self, split: str) -> np.ndarray:
        """Names the stream that each example is cut from. Negatives never come from that stream.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          i64 [size], equal for examples of one stream. Default: each example is a stream.
        """
        return np.arange(self.size(split))

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]] | None:
        """Groups examples by number of segments, for streams that are cut into segments.

        A batch comes from one bucket, so batches have at most as many shapes as there are buckets.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          (bucket of each example i64 [size], number of segments T of each bucket, ascending).
          Default None: all examples have one shape.
        """
        return None

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """Names groups of questions whose scores are also reported separately.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          {name: bool [size, Q], which questions belong to the group}. Default {}.
        """
        return {}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Gives the answers of other readers, such as oracles. Each is a row of the final table.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          {name: answers}. If the source asks for clicks, answers are f [size, Q] scores. If an
          item is the answer, they are f [size, Q] ranks of the target. Otherwise they are
          i [size, Q] chosen classes or choices. Default {}.
        """
        return {}

    def also(self, split: str) -> np.ndarray | None:
        """Gives a second right choice, for questions that have two.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          i [size, Q], -1 where a question has one right choice only. Default None: no question
          has two.
        """
        return None

    def neighbours(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds what stands beside some items in the streams of the training part.

        A run that starts from another one begins the rows of new items with it, see
        `config.train.new_items`.

        Args:
          items: bool [num_items], the items in question.

        Returns:
          Pairs (item, neighbour), i64 [n] each. The neighbours are other items. Default: none.
        """
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def describe(self) -> Description:
        """Collects what a task needs to know of the source. A run stores it with the model.

        Returns:
          The attributes above, and the largest number of segments.
        """
        buckets, ids = self.buckets("train"), self.numbering
        counts = self.popularity if self.questions.answer == "item" else None
        numbering = ids if ids is None or isinstance(ids, str) else tuple(np.asarray(ids).tolist())
        return Description(
            num_items=int(self.num_items),
            max_items=int(self.max_items),
            num_queries=int(self.num_queries),
            positions_at_end=bool(self.positions_at_end),
            questions=self.questions,
            feature_width=int(self.feature_width),
            vocabulary=tuple(self.vocabulary),
            classes=tuple(self.classes),
            numbering=numbering,
            max_segments=None if buckets is None else int(buckets[1][-1]),
            popularity=() if counts is None else tuple(np.asarray(counts).tolist()),
        )


class Generated(Source):
    """A source whose examples are drawn, not read. A subclass has its sizes in fields.

    Attributes:
      train, valid, test: number of examples of each split.
    """

    train: int
    valid: int
    test: int

    def size(self, split: str) -> int:
        """See `Source.size`.

        Raises:
          ValueError: `split` is not in SPLITS.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {SPLITS}")
        return int(getattr(self, split))


class Wrapper(Source):
    """A source that behaves like another one. A subclass overrides what differs.

    Args:
      source: the source to read.
    """

    def __init__(self, source: Source):
        self._source = source
        self.num_items, self.max_items = source.num_items, source.max_items
        self.num_queries, self.positions_at_end = source.num_queries, source.positions_at_end
        self.questions, self.feature_width = source.questions, source.feature_width
        self.vocabulary, self.classes = source.vocabulary, source.classes
        self.numbering, self.popularity = source.numbering, source.popularity

    def __getattr__(self, name: str) -> Any:
        """What the source has beside the attributes of `Source`, such as `metadata`."""
        if name == "_source":  # not there yet, while a copy is unpickled
            raise AttributeError(name)
        return getattr(self._source, name)

    def size(self, split: str) -> int:
        """See `Source.size`."""
        return self._source.size(split)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`."""
        return self._source.fetch(split, indices)

    def stream_id(self, split: str) -> np.ndarray:
        """See `Source.stream_id`."""
        return self._source.stream_id(split)

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]] | None:
        """See `Source.buckets`."""
        return self._source.buckets(split)

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """See `Source.groups`."""
        return self._source.groups(split)

    def references(self, split: str) -> dict[str, np.ndarray]:
        """See `Source.references`."""
        return self._source.references(split)

    def also(self, split: str) -> np.ndarray | None:
        """See `Source.also`."""
        return self._source.also(split)

    def neighbours(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Source.neighbours`."""
        return self._source.neighbours(items)

    def describe(self) -> Description:
        """See `Source.describe`."""
        return self._source.describe()


def id_array(ids: Sequence[int] | Sequence[str]) -> np.ndarray:
    """Ids as an array: i64 of integers, objects of strings, whose lengths may differ much."""
    return np.array(ids, object if any(isinstance(id_, str) for id_ in ids) else None)


def hash64(*parts: str | int | np.integer | np.ndarray) -> np.ndarray:
    """Hashes names and integers to 64 bits: SplitMix64's finalizer, chained over the parts.

    The host draws all its random numbers from this hash. A draw is therefore the same on every
    machine, in any order and with any number of readers.

    Args:
      parts: names, integers or integer arrays, whose shapes broadcast.

    Returns:
      u64, of the broadcast shape.
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            value = zlib.crc32(part.encode()) if isinstance(part, str) else part
            value = np.asarray(value, np.int64).astype(np.uint64)
            state = mix(
                state + np.uint64(0x9E3779B97F4A7C15) ^ mix(value + np.uint64(0x9E3779B97F4A7C15))
            )
    return np.asarray(state)


def cached(source: Source, ram_bytes: int) -> Source:
    """Keeps the splits of a source in RAM from their first use.

    Args:
      source: the source to read.
      ram_bytes: largest size of a split that is kept; larger ones are read from `source`.

    Returns:
      A source with the same examples.
    """
    return _Cached(source, ram_bytes)


class _Cached(Wrapper):
    """The source that `cached` returns."""

    def __init__(self, source: Source, ram_bytes: int):
        super().__init__(source)
        self._ram_bytes = ram_bytes
        self._splits: dict[str, Examples | None] = {}
        self._lock = threading.Lock()

    def __reduce__(self):  # a copy in another process fills its own cache
        return _Cached, (self._source, self._ram_bytes)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        with self._lock:
            if split not in self._splits:
                self._splits[split] = self._load(split)
        examples = self._splits[split]
        if examples is None:
            return self._source.fetch(split, indices)
        return {name: values[indices] for name, values in examples.items()}

    def _load(self, split: str) -> Examples | None:
        """Reads a complete split; None if it is larger than `ram_bytes`."""
        size = self._source.size(split)
        block = min(size, 256)  # a constant size, so that a jitted generator compiles once
        part = self._source.fetch(split, np.arange(block))
        if size * sum(values[:1].nbytes for values in part.values()) > self._ram_bytes:
            return None
        examples = {k: np.empty((size, *v.shape[1:]), v.dtype) for k, v in part.items()}
        for start in range(0, size, block):
            if start:
                part = self._source.fetch(split, np.arange(start, start + block) % size)
            for name, values in part.items():
                examples[name][start : start + block] = values[: size - start]
        return examples
