"""Associative and joint recall: which value stood behind this key?

Associative recall follows MQAR (Arora et al. 2023, "Zoology", arXiv:2312.04927). A stream is a
series of pairs: key, value, key, value, ... Joint recall follows Zhan et al. 2025
(arXiv:2507.00449). There the value depends on a context and a key. Every key of a stream stands
in every context of the stream, so neither of them alone tells the value.

Both papers ask within the stream. Here all questions come after it, so that a memory answers them:

- MQAR draws how far a question lies behind its pair. Here this is the distance of a pair from the
  end of the stream, and blanks fill the rest (`Settings.power`, `Settings.length`).
- MQAR's values differ within a stream. Here they are independent, as in joint recall.
- Joint recall writes a context once before its keys. Here the context stands before every key, so
  that a segment holds all that it needs, and the order is random.
"""

# mypy: disable-error-code=override
# `Source` declares its sizes as attributes; here they are properties computed from the settings.

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rmjax.data.source import SPLITS, Examples, Questions, Source, hash64
from rmjax.registry import above, at_least, setting

_QUARTERS = ("0-25%", "25-50%", "50-75%", "75-100%")
_CELLS_AT_ONCE = 2**22  # bounds the memory of `references` beside its results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The streams, and the number of them in each split.

    The defaults are the smallest task of MQAR (4 pairs in 64 items, 8,192 ids). There are 20,000
    streams to train on. MQAR has 100,000.
    """

    pairs: str = setting(
        "4", doc="pairs in a stream, such as '4,8'; joint: contexts x keys, such as '2x4,4x4'"
    )
    key_ids: int = setting(4095, at_least(1), "kinds of key")
    value_ids: int = setting(4096, at_least(2), "kinds of value, the classes of an answer")
    context_ids: int = setting(0, at_least(0), "kinds of context; 0: the key alone gives the value")
    length: int = setting(
        64, at_least(0), "items of a stream; blanks fill it up; 0: pairs without blanks"
    )
    power: float = setting(
        0.01, above(0), "a in the odds g^(a-1) of distance g from the end; 1: all are equal"
    )
    questions: int = setting(0, at_least(0), "questions of a stream; 0: one for every pair")
    split: bool = setting(False, doc="whether the end of a segment may split a pair")
    train: int = setting(20_000, at_least(1), "training streams")
    valid: int = setting(500, at_least(1), "validation streams")
    test: int = setting(3000, at_least(1), "test streams")

    def conflicts(self, config: object = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        try:
            sizes = sizes_of(self.pairs)
        except ValueError:
            yield "{pairs}: must be numbers such as '4,8'; or contexts x keys, such as '2x4,4x4'"
            return
        if any((contexts > 0) != (self.context_ids > 0) for contexts, _ in sizes):
            yield "{pairs}: has the form contexts x keys if {context_ids} is above 0, and only then"
        elif max(contexts for contexts, _ in sizes) > self.context_ids:
            yield "{pairs}: a stream has at most {context_ids}"
        if max(keys for _, keys in sizes) > self.key_ids:
            yield "{pairs}: the keys of a stream differ, so it has at most {key_ids}"
        width = _width(self)
        if self.length % width:
            yield f"{{length}}: must be a multiple of {width}, the items of a pair"
        if self.length and max(map(_count, sizes)) * width > self.length:
            yield f"{{length}}: has no room for {{pairs}} of {width} items"


Size = tuple[int, int]  # (contexts, keys) of a stream; contexts = 0: the key alone counts


def sizes_of(pairs: str) -> list[Size]:
    """Reads the setting `pairs`: '4,8' gives [(0, 4), (0, 8)]; '2x4' gives [(2, 4)].

    Raises:
      ValueError: the text has another form, or a number is below 1.
    """
    sizes = []
    for text in pairs.split(","):
        *contexts, keys = (int(number) for number in text.split("x"))
        if len(contexts) > 1 or min([*contexts, keys]) < 1:
            raise ValueError(text)
        sizes.append((contexts[0] if contexts else 0, keys))
    return sizes


def _count(size: Size) -> int:
    """The pairs of a stream of a size."""
    return max(1, size[0]) * size[1]


def _width(settings: Settings) -> int:
    """Items of a pair."""
    return 3 if settings.context_ids else 2


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`. It is not cached, since drawing is fast."""
    width = _width(settings)
    if common.segment_length % width and not settings.split:
        raise ValueError(
            f"config.data.segment_length = {common.segment_length}: must be a multiple of {width}, "
            "so that no pair is split; or set config.data.recall.split"
        )
    return Recall(settings, seed)


class Drawn(NamedTuple):
    """What B streams hold: at most P pairs, in the order of the stream, and at most Q questions."""

    pairs: np.ndarray  # i64 [B], how many pairs each stream has
    length: np.ndarray  # i64 [B], items of each stream
    start: np.ndarray  # i64 [B, P], the first item of each pair
    context: np.ndarray  # i64 [B, P], from 0
    key: np.ndarray  # i64 [B, P], from 0
    value: np.ndarray  # i64 [B, P], from 0
    asked: np.ndarray  # i64 [B, Q], the pair that a question asks for
    exists: np.ndarray  # bool [B, Q], which questions exist


@dataclasses.dataclass(frozen=True)
class Recall(Source):
    """A source of streams of pairs. All questions come after the stream.

    Item ids: the keys, then the values, then the contexts, then the blank. Stream i has size
    i % number of sizes, so every split is balanced.

    Attributes:
      settings: the streams.
      seed: of the streams.
    """

    settings: Settings = Settings()
    seed: int = 0
    positions_at_end: bool = dataclasses.field(default=True, init=False)

    @property
    def sizes(self) -> list[Size]:
        """(contexts, keys) of the streams."""
        return sizes_of(self.settings.pairs)

    @property
    def width(self) -> int:
        """Items of a pair: key and value; in joint recall context, key and value."""
        return _width(self.settings)

    @property
    def num_items(self) -> int:
        """See `Source`."""
        s = self.settings
        return s.key_ids + s.value_ids + s.context_ids + (s.length > 0)

    @property
    def numbering(self) -> str:
        """The meaning of the ids."""
        s = self.settings
        return f"recall: {s.key_ids} keys, {s.value_ids} values, {s.context_ids} contexts, blank"

    @property
    def max_items(self) -> int:
        """See `Source`."""
        return self.settings.length or self.width * self.most

    @property
    def most(self) -> int:
        """P, the pairs of the largest stream."""
        return max(map(_count, self.sizes))

    @property
    def num_queries(self) -> int:
        """See `Source`."""
        return min(self.settings.questions or self.most, self.most)

    @property
    def questions(self) -> Questions:
        """See `Source`. A question is a key; in joint recall the two words context and key."""
        query = "words" if self.settings.context_ids else "item"
        return Questions(query, answer="class", classes=self.settings.value_ids, metric="accuracy")

    def size(self, split: str) -> int:
        """See `Source.size`.

        Raises:
          ValueError: `split` is not in SPLITS.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {SPLITS}")
        return int(getattr(self.settings, split))

    def draw(self, split: str, indices: np.ndarray) -> Drawn:
        """Draws what streams hold. A stream depends on (seed, split, index) alone.

        Args:
          split: one of `SPLITS`.
          indices: i64 [B].

        Returns:
          The pairs of B streams.

        Raises:
          ValueError: the split is unknown, or an index is outside of it.
        """
        s, row, P = self.settings, np.asarray(indices, np.int64)[:, None], self.most
        outside = row[(row < 0) | (row >= self.size(split))]
        if outside.size:
            must = f"must be in [0, {self.size(split)}) for split {split!r}"
            raise ValueError(f"indices={outside[:8].tolist()}: {must}")

        def draws(name: str, many: int) -> np.ndarray:
            return hash64("recall", name, self.seed, split, row, np.arange(many))

        contexts, keys = np.maximum(self.sizes, 1)[row % len(self.sizes)].transpose(2, 0, 1)
        count = contexts * keys  # [B, 1]
        # A stream is a shuffled table of its contexts and keys.
        cell = np.minimum(_shuffled(draws("order", P), count), count - 1)
        key = _shuffled(draws("key", int(keys.max(initial=1))), s.key_ids)
        context = _shuffled(draws("context", int(contexts.max(initial=1))), max(1, s.context_ids))
        asked = _shuffled(draws("question", P), count)[:, : self.num_queries]
        return Drawn(
            pairs=count[:, 0],
            length=np.full(len(row), s.length) if s.length else count[:, 0] * self.width,
            start=self.width * self._places(draws("place", s.length // self.width), count),
            context=np.take_along_axis(context, cell // keys, 1),
            key=np.take_along_axis(key, cell % keys, 1),
            value=(draws("value", P) % np.uint64(s.value_ids)).astype(np.int64),
            asked=np.minimum(asked, count - 1),
            exists=asked < count,
        )

    def _places(self, draws: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The places of pairs among pairs and blanks, rising: i64 [B, P].

        Args:
          draws: u64 [B, U], for the places; U = 0: there are no blanks.
          count: i64 [B, 1], pairs; places beyond are U.
        """
        pair = np.arange(self.most)
        many = draws.shape[1]
        if not many:
            return np.broadcast_to(pair, (len(count), self.most))
        # The first arrivals of exponential clocks are a weighted draw without replacement.
        odds = np.arange(many, 0, -1.0) ** (self.settings.power - 1)
        clock = -np.log(((draws >> np.uint64(11)) + 0.5) * 2.0**-53) / odds
        first = np.argsort(clock, 1)[:, : self.most]
        return np.sort(np.where(pair < count, first, many), 1)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`.

        Raises:
          ValueError: as `draw`.
        """
        s, drawn = self.settings, self.draw(split, indices)
        rows, L = np.arange(len(drawn.pairs))[:, None], self.max_items
        key, context = drawn.key, drawn.context + s.key_ids + s.value_ids
        parts = ([context] if s.context_ids else []) + [key, drawn.value + s.key_ids]
        items = np.full((len(rows), L + self.width), s.key_ids + s.value_ids + s.context_ids)
        start = np.where(np.arange(self.most) < drawn.pairs[:, None], drawn.start, L)
        for place, part in enumerate(parts):
            items[rows, start + place] = part
        query = key[rows, drawn.asked]
        exists = drawn.exists
        words: Examples = {}
        if s.context_ids:
            query = np.stack([context[rows, drawn.asked], query], -1)
            words["word_mask"] = np.repeat(exists[..., None], 2, -1)
        narrow = lambda x: x.astype(np.int32)
        return words | {
            "items": narrow(np.where(np.arange(L) < drawn.length[:, None], items[:, :L], 0)),
            "length": narrow(drawn.length),
            "query": narrow(np.where(words.get("word_mask", exists), query, 0)),
            "query_mask": exists,
            "target": narrow(np.where(exists, drawn.value[rows, drawn.asked], 0)),
            "example_id": narrow(np.asarray(indices)),
        }

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """Questions by the age of their pair, and by the number of pairs if it varies.

        The age is the distance of the pair from the end of the stream, in quarters of the stream.
        """
        drawn = self.draw(split, np.arange(self.size(split)))
        quarter, count = self._quarter(drawn), drawn.pairs[:, None]
        groups = {f"age {name}": (quarter == i) & drawn.exists for i, name in enumerate(_QUARTERS)}
        counts = np.unique(list(map(_count, self.sizes)))
        if len(counts) > 1:
            groups |= {f"{n} pairs": (count == n) & drawn.exists for n in counts}
        return groups

    def _quarter(self, drawn: Drawn) -> np.ndarray:
        """The quarter of the stream that each asked pair lies in, counted from the end: [B, Q]."""
        length = drawn.length[:, None]
        start = np.take_along_axis(drawn.start, drawn.asked, 1)
        return (length - start - self.width) * 4 // length

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Answers of readers that know parts of a stream.

        - oracle: the complete stream.
        - oracle, last half: pairs of the last half; it guesses a value of the stream elsewhere.
        - oracle, key alone (joint recall): the key, but not the context.
        - any value of the stream: neither of them.
        - chance: any value.
        """
        chunk = max(1, _CELLS_AT_ONCE // (self.most * self.num_queries))
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, self.size(split), chunk):
            rows = np.arange(start, min(start + chunk, self.size(split)))
            for name, chosen in self._answers(split, rows).items():
                parts.setdefault(name, []).append(chosen.astype(np.int32))
        return {name: np.concatenate(chosen) for name, chosen in parts.items()}

    def _answers(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The answers of `references` for some streams, i [B, Q]."""
        drawn = self.draw(split, indices)
        one, question, pair = np.ogrid[: len(indices), : self.num_queries, : self.most]
        lot = hash64("guess", self.seed, split, indices[one], question, pair)
        lot = np.where(pair < drawn.pairs[:, None, None], lot, np.uint64(0))
        pick = lambda lots: np.take_along_axis(drawn.value, lots.argmax(-1), 1)
        right, guess = np.take_along_axis(drawn.value, drawn.asked, 1), pick(lot)
        answers = {
            "oracle": right,
            "oracle, last half": np.where(self._quarter(drawn) < 2, right, guess),
        }
        if self.settings.context_ids:
            asked = np.take_along_axis(drawn.key, drawn.asked, 1)
            same = drawn.key[:, None] == asked[..., None]
            answers["oracle, key alone"] = pick(np.where(same, lot, np.uint64(0)))
        chance = lot[..., 0] % np.uint64(self.settings.value_ids)
        return answers | {"any value of the stream": guess, "chance": chance}


def _shuffled(draws: np.ndarray, kinds: np.ndarray | int) -> np.ndarray:
    """The first n of a random permutation of 0 .. kinds - 1 (Fisher and Yates).

    Args:
      draws: u64 [B, n].
      kinds: how many numbers are permuted, at least 1; i64 [B, 1], or the same for every row.

    Returns:
      i64 [B, n]. Entries after the first `kinds` are `kinds` or more.
    """
    rows, n = np.arange(len(draws)), draws.shape[1]
    many = np.broadcast_to(kinds, (len(draws), 1))[:, 0]
    pool = np.tile(np.arange(max(n, many.max(initial=0))), (len(draws), 1))
    for i in range(n):
        left = np.maximum(many - i, 1).astype(np.uint64)
        j = i + (draws[:, i] % left).astype(np.int64)
        pool[rows, i], pool[rows, j] = pool[rows, j], pool[rows, i]
    return pool[:, :n]
