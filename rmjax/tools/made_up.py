"""Random data of a given size, so that a bench needs no files, and the bench's sizes by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax.data import make_source
from rmjax.data.source import SPLITS, Examples, Generated, Questions
from rmjax.data.texts.documents import Documents
from rmjax.data.texts.streams import Texts
from rmjax.data.texts.tokenizers import Words
from rmjax.registry import SOURCES

CLICKS = Questions()
NEXT_ITEM = Questions("kind", 1, answer="item", metric="ndcg@10")
CLASSES = Questions(query="words", answer="class", classes=180, metric="accuracy")
CHOICES = Questions(query="words", answer="choice", metric="mrr")


@dataclasses.dataclass(frozen=True)
class RandomStreams(Generated):
    """Full streams of random items, cut into segments, with random questions after them.

    Attributes:
      num_items: number of item ids; 0: items are features.
      segments: T of each group of streams, rising; example i is in group i modulo their number.
      segment_length: N.
      questions: how the source asks.
      num_queries: Q.
      words: of a question, W.
      candidates: of an example, A, each of five words; used if a question has choices.
      feature_width: F, of items that are features.
    """

    num_items: int
    segments: tuple[int, ...]
    segment_length: int
    questions: Questions = CLICKS
    num_queries: int = 1
    words: int = 10
    candidates: int = 30
    feature_width: int = 0
    train: int = 256
    valid: int = 64
    test: int = 64
    positions_at_end: bool = True

    @property
    def max_items(self) -> int:  # type: ignore[override]
        """L, see `Source`."""
        return self.segments[-1] * self.segment_length

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Source`."""
        return tuple(map(str, range(self.questions.classes)))

    @property
    def popularity(self) -> np.ndarray | None:  # type: ignore[override]
        """See `Source`."""
        return np.ones(self.num_items, int) if self.questions.answer == "item" else None

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]]:
        """See `Source.buckets`."""
        return np.arange(self.size(split)) % len(self.segments), list(self.segments)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`; streams are in segments."""
        rng = np.random.default_rng([SPLITS.index(split), *np.asarray(indices).tolist()])
        rows, queries, asks = len(indices), self.num_queries, self.questions
        ids = lambda high, *shape: rng.integers(0, high, (rows, *shape), dtype=np.int32)
        yes = lambda *shape: np.ones((rows, *shape), bool)
        shape = (self.segments[-1], self.segment_length)
        own = np.take(self.segments, np.asarray(indices) % len(self.segments))
        items: np.ndarray
        if self.num_items:
            items = ids(self.num_items, *shape)
        else:
            items = rng.normal(size=(rows, *shape, self.feature_width)).astype(np.float32)
        mask = yes(*shape) & (np.arange(shape[0]) < own[:, None])[..., None]
        highest = {"click": 2, "class": asks.classes, "choice": self.candidates}
        examples = {
            "items": np.where(mask.reshape(mask.shape + (1,) * (items.ndim - 3)), items, 0),
            "item_mask": mask,
            "query": ids(self.num_items or 1, queries),
            "query_mask": yes(queries),
            "target": ids(highest.get(asks.answer, self.num_items), queries),
            "example_id": np.asarray(indices, np.int32),
        }
        if asks.query == "kind":
            examples["query"] = np.zeros((rows, queries), np.int32)
        if asks.query == "words":
            examples["query"] = ids(asks.words or self.num_items, queries, self.words)
            examples["word_mask"] = yes(queries, self.words)
        if asks.answer == "item":
            before = mask.sum((1, 2), dtype=np.int32)
            examples["items_before"] = np.repeat(before[:, None], queries, 1)
        if asks.answer == "choice":
            examples["candidates"] = ids(asks.words or self.num_items, self.candidates, 5)
            examples["candidate_mask"] = yes(self.candidates, 5)
            choices = np.arange(self.candidates, dtype=np.int32)
            examples["choices"] = np.tile(choices, (rows, queries, 1))
            examples["choice_mask"] = yes(queries, self.candidates)
        return examples


# {size: (changes of the default config, the stream)}; batches of 32, 64 and 16 streams.
_MACHINE = {"machine.slots": 20, "machine.layers": 3, "machine.heads": 4}
SIZES: dict[str, tuple[dict[str, Any], RandomStreams]] = {
    "xlong": (
        _MACHINE | {"data.name": "simulated_clicks", "machine.dim": 64, "teacher.dim": 64}
        | {"train.batch_size": 32},
        RandomStreams(100_000, (50,), 20),
    ),
    "babi": (
        _MACHINE | {"data.name": "babi", "machine.dim": 128, "teacher.dim": 128}
        | {"train.batch_size": 64, "machine.timescale": 0, "rehearsal.sampled_items": 0}
        | {"reason.hops": 2},
        RandomStreams(180, (20,), 15, CLASSES),
    ),
    "narrativeqa": (
        _MACHINE | {"data.name": "narrativeqa", "machine.dim": 256, "teacher.dim": 256}
        | {"train.batch_size": 16, "machine.timescale": 30, "rehearsal.sampled_items": 0}
        | {"reason.hops": 2, "reason.head": "mlp"},
        RandomStreams(20_000, (40,), 20, CHOICES),
    ),
}  # fmt: skip


def sized(name: str, changes: dict[str, Any] | None = None) -> tuple[ConfigDict, RandomStreams]:
    """The config and the data of a size.

    Args:
      name: a row of `SIZES`.
      changes: {key: value} of the config.

    Returns:
      The config, and a source of random streams.

    Raises:
      ValueError: there is no such size, or the config cannot be run; names the key.
    """
    if name not in SIZES:
        raise ValueError(f"--size={name}: no such size; there are {', '.join(SIZES)}")
    values, source = SIZES[name]
    config = configs.base()
    length = {"data.segment_length": source.segment_length}
    config.update_from_flattened_dict(values | length | (changes or {}))
    configs.validate(config)
    return config, source


# What streams of a card's data look like, where the data are files. Hyperpartisan's lengths are
# those of its articles in segments of 128.
_OF_DATA: dict[str, RandomStreams] = {
    "xlong": SIZES["xlong"][1],
    "movielens": RandomStreams(2_000, (20,), 10, num_queries=10),
    "table": RandomStreams(2_000, (20,), 10, NEXT_ITEM, 10),
    "babi": SIZES["babi"][1],
    "narrativeqa": SIZES["narrativeqa"][1],
    "stories": RandomStreams(2_000, (20,), 20, CHOICES, candidates=4),
    "tvqa": RandomStreams(10_000, (15,), 20, CHOICES, candidates=5),
    "activitynet": RandomStreams(
        0, (10,), 20, CLASSES._replace(classes=1000, words=5000), feature_width=512
    ),
    "hyperpartisan": RandomStreams(
        10_000, (3, 5, 7, 12, 21, 45), 128, Questions("kind", 1, 0, "class", 2, "accuracy", True)
    ),
}


def source_for(config: ConfigDict) -> Any:
    """Random data in the place of a card's files; sources that draw their data are opened.

    Args:
      config: of the card.

    Returns:
      The source.
    """
    name = config.data.name
    if SOURCES.task_of(name) == "every token":
        return _texts(config)
    if name not in _OF_DATA:
        return make_source(config.data, config.data.seed)
    source, length = _OF_DATA[name], config.data.segment_length
    segments = source.segments
    if name == "hyperpartisan":  # an article has the same words in segments of any length
        segments = tuple(-(-n * source.segment_length // length) for n in segments)
    return dataclasses.replace(source, segments=segments, segment_length=length)


def _texts(config: ConfigDict, vocabulary: int = 256) -> Texts:
    """Random tokens, enough for two steps."""
    data, rows = config.data, max(config.train.batch_size, config.train.eval_batch_size)
    tokens = 1 + 2 * (rows + 1) * data.segments * data.segment_length
    rng = np.random.default_rng(0)
    tokenizer = Words([f"w{i}" for i in range(vocabulary)])
    document = Documents(
        rng.integers(0, vocabulary, tokens).astype(np.uint16),
        np.zeros(1, np.int64),
        ["made up"],
        tokens,
        tokens,
        tokenizer,
    )
    return Texts(
        dict.fromkeys(SPLITS, document),
        data.segment_length,
        data.segments,
        reset_segments=data.text.reset_segments,
    )
