"""Long texts for language models: each row of a batch reads its own part of the text, step by step.

Row b of B reads the b-th of B equal parts; step s reads its next T segments of N tokens. The memory
is carried from step to step, so the order is the order of the text and not a drawn one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rmjax.data.source import Description
from rmjax.data.texts.corpora import Corpus
from rmjax.data.texts.documents import Documents, open_documents
from rmjax.data.texts.tokenizers import packed
from rmjax.registry import a_path, at_least, setting
from rmjax.types import Batch


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Settings of every corpus: how texts become tokens, and where memories are reset."""

    section: ClassVar[str] = "text"
    task: ClassVar[str] = "every token"

    tokenizer: str = setting(
        "bytes", a_path, "tokenizer: bytes, characters, words, or the path of a tokenizer.json"
    )
    aligned: bool = setting(True, doc="cut documents into full segments and drop what is left over")
    reset_documents: bool = setting(
        False, doc="reset memories at the start of every document; needs aligned"
    )
    reset_segments: int = setting(
        0, at_least(0), "number of segments after which training resets memories; 0: never"
    )
    reset_evaluation: bool = setting(False, doc="apply reset_segments in evaluation too")
    skip_first: bool = setting(False, doc="do not predict the first token of a segment")


class Parts(NamedTuple):
    """How a split is divided among the rows of a batch."""

    first: np.ndarray  # i64 [B] first segment of each row, among the segments of the split
    steps: int  # number of steps of T segments in a row


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Splits of documents as streams of segments.

    Attributes:
      splits: {split: its documents}, for 'train', 'valid' and 'test'.
      segment_length: N, tokens of a segment.
      step_segments: T, segments that a row reads in a step.
      aligned: whether documents are cut to full segments, as in Memoria's experiments. What is left
        over is dropped, and no segment has tokens of two documents.
      reset_documents: whether streams restart at every document; needs `aligned`.
      reset_segments: number of segments after which streams restart in training; 0: never.
      reset_evaluation: whether `reset_segments` holds in evaluation too. With `reset_segments` = 1
        the result is that of a model without any memory.
      skip_first: whether the first token of a segment is not predicted, as in Memoria's code.

    Raises:
      ValueError: `reset_documents` is set without `aligned`.
    """

    splits: dict[str, Documents]
    segment_length: int
    step_segments: int = 1
    aligned: bool = True
    reset_documents: bool = False
    reset_segments: int = 0
    reset_evaluation: bool = False
    skip_first: bool = False
    # A `Source` has these attributes; texts have no classes, outside ids or item counts.
    classes: ClassVar[tuple[str, ...]] = ()
    numbering: ClassVar[None] = None
    popularity: ClassVar[None] = None
    _segments: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.reset_documents and not self.aligned:
            raise ValueError(
                "reset_documents needs aligned: no reset is possible inside a segment, which could "
                "have two documents; set config.data.text.aligned=True"
            )

    @property
    def num_items(self) -> int:
        """The size of the vocabulary."""
        return self.splits["train"].tokenizer.size

    @property
    def vocabulary(self) -> list[str]:
        """The token of each id."""
        return self.splits["train"].tokenizer.vocabulary

    def size(self, split: str) -> int:
        """Counts the tokens of a split.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          The number of tokens.
        """
        return len(self.splits[split].tokens)

    def describe(self) -> Description:
        """See `Source.describe`."""
        tokenizer = self.splits["train"].tokenizer
        words, state = tuple(tokenizer.vocabulary), packed(tokenizer)
        return Description(self.num_items, vocabulary=words, endless=True, tokenizer=state)

    def segments(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Finds the S segments of a split.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          (first token of each segment i64 [S], whether a document begins with it bool [S]).
        """
        if split not in self._segments:
            self._segments[split] = self._find_segments(split)
        return self._segments[split]

    def _find_segments(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        documents, n = self.splits[split], self.segment_length
        ends = np.append(documents.starts[1:], len(documents.tokens))
        if not self.aligned:
            full = (len(documents.tokens) - 1) // n
            return np.arange(full) * n, np.arange(full) == 0
        counts = np.maximum(ends - documents.starts, 0) // n
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(documents.starts, counts) + within * n, within == 0

    def parts(self, split: str, batch_size: int) -> Parts:
        """Divides the segments of a split among rows.

        Args:
          split: 'train', 'valid' or 'test'.
          batch_size: B, rows of a batch over all processes.

        Returns:
          The first segment of each row, and the steps of a row.

        Raises:
          ValueError: the split is too short for one step of every row.
        """
        number = len(self.segments(split)[0])
        steps = number // batch_size // self.step_segments
        if not steps:
            raise ValueError(
                f"split {split!r} has {number} segments of {self.segment_length} tokens: too few "
                f"for {batch_size} rows of {self.step_segments}; take a smaller batch "
                "(config.train.batch_size, eval_batch_size), shorter segments "
                "(config.data.segment_length) or more text (pg19: config.data.text.train_share)"
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
        """Reads one step. Epoch follows epoch, and streams restart with each.

        Args:
          split: 'train', 'valid' or 'test'.
          step: the number of the step, from 0.
          batch_size: B, rows of a batch over all processes.
          rows: the rows of the batch to read; default all.
          reset_segments: replaces the attribute `reset_segments`; None: the attribute holds.

        Returns:
          A batch of NumPy arrays, whose targets are the next tokens.

        Raises:
          ValueError: the split is too short for one step of every row.
        """
        every = self.reset_segments if reset_segments is None else reset_segments
        n, segments = self.segment_length, self.step_segments
        first, steps = self.parts(split, batch_size)
        begins, of_document = self.segments(split)
        tokens = self.splits[split].tokens
        epoch, place = divmod(step, steps)
        number = place * segments + np.arange(segments)  # places among the segments of a row
        where = first[rows][:, None] + number
        index = begins[where][..., None] + np.arange(n + 1)
        read = tokens[np.minimum(index, len(tokens) - 1)].astype(np.int32)
        asked = index[..., 1:] < len(tokens)
        if self.reset_documents:  # the first token does not follow from the previous document
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
        """Reads a split once. A remainder that does not fill a step of all rows is left out.

        Streams restart with documents if `reset_documents`; `reset_segments` holds only if
        `reset_evaluation`.

        Args:
          split: 'train', 'valid' or 'test'.
          batch_size: B, rows of a batch over all processes.
          rows: the rows of the batch to read; default all.

        Yields:
          The batch of each step.

        Raises:
          ValueError: the split is too short for one step of every row.
        """
        every = self.reset_segments if self.reset_evaluation else 0
        for step in range(self.parts(split, batch_size).steps):
            yield self.batch(split, step, batch_size, rows, reset_segments=every)


def open_texts(
    name: str,
    corpus: Callable[[Path], Corpus],
    advice: str,
    settings: TextSettings,
    common: ConfigDict,
) -> Texts:
    """Opens the streams of a corpus.

    Args:
      name: the name of the corpus, which is part of the prepared folder's name.
      corpus: corpus(path) describes the user's folder or file.
      advice: where to get the corpus, for errors.
      settings: the settings of the corpus.
      common: the section `data` of the config.

    Returns:
      The texts.

    Raises:
      FileNotFoundError, ValueError, OSError, Stopped: as `open_documents`.
    """
    splits = open_documents(name, corpus, advice, common.dir, common.cache_dir, settings.tokenizer)
    names = {field.name for field in dataclasses.fields(TextSettings)} - {"tokenizer"}
    options = {name: getattr(settings, name) for name in names}
    return Texts(splits, common.segment_length, common.segments, **options)
