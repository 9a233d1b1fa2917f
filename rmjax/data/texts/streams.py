"""Long texts for language models: every row of a batch reads a part of the text of its own, on and on.

Row b of B has the b-th of B equal parts; step s reads its next T segments of N tokens. What is remembered is carried
from step to step, so the order is that of the text, not a drawn one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rmjax.data.source import Description
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.documents import Documents, open_documents
from rmjax.data.texts.tokenizers import packed
from rmjax.registry import a_path, at_least, setting
from rmjax.types import Batch


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Keys of every corpus: how texts become tokens, and where memories begin anew."""

    section: ClassVar[str] = "text"
    task: ClassVar[str] = "every token"

    tokenizer: str = setting(
        "bytes", a_path, "texts: bytes, characters, words, or a tokenizer.json"
    )
    aligned: bool = setting(
        True, doc="documents are cut to whole segments; the rest of each is dropped"
    )
    reset_documents: bool = setting(
        False, doc="memories begin anew with every document; needs aligned"
    )
    reset_segments: int = setting(
        0, at_least(0), "training: memories begin anew after so many segments; 0: never"
    )
    reset_evaluation: bool = setting(False, doc="and in evaluation too")
    skip_first: bool = setting(False, doc="the first token of a segment is not predicted")


class Parts(NamedTuple):
    """How a split falls into the rows of a batch."""

    first: np.ndarray  # i64 [B], token where each row begins
    steps: int  # of T segments, to the end of the rows


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Splits of documents as streams of segments.

    Attributes:
      splits: 'train', 'valid' and 'test'.
      segment_length: N.
      step_segments: T, what a row reads in a step.
      aligned: documents are cut to whole segments, what is left over is dropped (as Memoria's experiments do), so that
        no segment has tokens of two.
      reset_documents: streams begin anew with every document; needs `aligned`.
      reset_segments: and, in training, after so many segments, where this is not 0.
      reset_evaluation: and in evaluation too; with `reset_segments` = 1, what a model does without any memory.
      skip_first: the first token of a segment is not predicted, as in released code of Memoria.

    Raises ValueError where a split is too short, or documents are to be told apart that are not aligned.
    """

    splits: dict[str, Documents]
    segment_length: int
    step_segments: int = 1
    aligned: bool = True
    reset_documents: bool = False
    reset_segments: int = 0
    reset_evaluation: bool = False
    skip_first: bool = False
    # What a `Source` has and texts have not: a class for an answer, ids from outside, counts of items.
    classes: ClassVar[tuple[str, ...]] = ()
    numbering: ClassVar[None] = None
    popularity: ClassVar[None] = None
    _segments: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.reset_documents and not self.aligned:
            raise ValueError(
                "reset_documents needs aligned: a segment with two documents cannot begin anew within"
            )

    @property
    def num_items(self) -> int:
        """Size of the vocabulary."""
        return self.splits["train"].tokenizer.size

    @property
    def vocabulary(self) -> list[str]:
        """The token of each id."""
        return self.splits["train"].tokenizer.vocabulary

    def size(self, split: str) -> int:
        """Tokens of a split."""
        return len(self.splits[split].tokens)

    def describe(self) -> Description:
        """As `Source.describe`."""
        tokenizer = self.splits["train"].tokenizer
        vocabulary = tuple(tokenizer.vocabulary)
        return Description(
            self.num_items, vocabulary=vocabulary, endless=True, tokenizer=packed(tokenizer)
        )

    def segments(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """i64 [S], where each segment begins; bool [S], whether a document does."""
        if split not in self._segments:
            self._segments[split] = self._find_segments(split)
        return self._segments[split]

    def _find_segments(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        documents, n = self.splits[split], self.segment_length
        ends = np.append(documents.starts[1:], len(documents.tokens))
        if not self.aligned:
            whole = (len(documents.tokens) - 1) // n
            return np.arange(whole) * n, np.arange(whole) == 0
        counts = np.maximum(ends - documents.starts, 0) // n
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(documents.starts, counts) + within * n, within == 0

    def parts(self, split: str, batch_size: int) -> Parts:
        """first: place of each row's first segment among all. Raises ValueError if a row has not one step."""
        number = len(self.segments(split)[0])
        steps = number // batch_size // self.step_segments
        if not steps:
            raise ValueError(
                f"split {split!r} has {number} segments of {self.segment_length} tokens: too few for {batch_size} rows "
                f"of {self.step_segments}; take a smaller batch (config.train.batch_size, eval_batch_size), shorter "
                "segments (config.data.segment_length) or more text (of pg19: config.data.text.train_share)"
            )
        return Parts(np.arange(batch_size) * (number // batch_size), steps)

    def batch(
        self,
        split: str,
        step: int,
        batch_size: int,
        rows: np.ndarray | slice = slice(None),
        reset_segments: int | None = None,
    ) -> Batch:
        """Batch `step` of all rows, or of some: epoch after epoch, every one of which begins anew. reset_segments: in
        place of the source's own.
        """
        every = self.reset_segments if reset_segments is None else reset_segments
        n, segments, (first, steps) = (
            self.segment_length,
            self.step_segments,
            self.parts(split, batch_size),
        )
        begins, of_document = self.segments(split)
        tokens = self.splits[split].tokens
        epoch, place = divmod(step, steps)
        number = place * segments + np.arange(segments)  # of a row's segments
        where = first[rows][:, None] + number
        index = begins[where][..., None] + np.arange(n + 1)
        read = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int32)
        asked = index[..., 1:] < len(tokens)
        if self.reset_documents:  # where one begins is not to be told from the one before
            asked[..., -1] &= ~np.isin(index[..., -1], self.splits[split].starts)
        if self.skip_first:
            asked[..., -1] = False
        reset = np.broadcast_to(number == 0, where.shape).copy()
        if self.reset_documents:
            reset |= of_document[where]
        if every:
            reset |= number % every == 0
        batch = len(where)
        ids = np.arange(batch_size)[rows]
        leaves: dict[str, Any] = dict(
            items=read[..., :-1],
            item_mask=np.ones(read[..., :-1].shape, bool),
            query=np.zeros((batch, 0), np.int32),
            query_mask=asked.reshape(batch, -1),
            target=read[..., 1:].reshape(batch, -1),
            negative_items=np.zeros((batch, 0), np.int32),
            negative_mask=np.zeros((batch, 0), bool),
            example_id=(ids + batch_size * step).astype(np.int32),
            reset=reset,
        )
        return Batch(**leaves)

    def evaluation(
        self, split: str, batch_size: int, rows: np.ndarray | slice = slice(None)
    ) -> Iterator[Batch]:
        """A split once, but for what does not fill a step of all rows; nothing begins anew but with documents, unless
        `reset_evaluation`.
        """
        every = self.reset_segments if self.reset_evaluation else 0
        for step in range(self.parts(split, batch_size).steps):
            yield self.batch(split, step, batch_size, rows, reset_segments=every)


def open_texts(
    name: str, corpus: Callable[[Path], Corpus], advice: str, settings: TextSettings, common: Any
) -> Texts:
    """The streams of a corpus.

    Args:
      name: of the corpus; prepared files go by it.
      corpus: the folder or file of the user -> which files each split has.
      advice: where the corpus is to be had, for errors.
      settings: of the corpus.
      common: the section `data` of the config.

    Raises:
      FileNotFoundError, ValueError, OSError, Stopped: as `documents`.
    """
    splits = open_documents(name, corpus, advice, common.dir, common.cache_dir, settings.tokenizer)
    options = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(TextSettings)
    }
    del options["tokenizer"]
    return Texts(splits, common.segment_length, common.segments, **options)
