"""NarrativeQA summaries (Kocisky et al. 2018), multiple choice: which answer fits a question?

The candidates are the first answers to all questions of a story. The second answer to a question is
right too, if it is one of the candidates.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.shares import log_source
from rmjax.data.source import Source
from rmjax.data.stories.text import Story, TextBuilder, TextRecords, cut, tokenize
from rmjax.io import text as text_files
from rmjax.registry import at_least, setting

SETS = ("train", "valid", "test")
NAMES = ("documents.csv", "qaps.csv", "third_party/wikipedia/summaries.csv")
ADVICE = (
    "Clone https://github.com/google-deepmind/narrativeqa and set data.dir to its folder; the full "
    "stories (download_stories.sh) are not needed."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of a summary that is read."""

    asks_in_words: ClassVar[bool] = True
    max_segments: int = setting(64, at_least(1), "segments kept of a summary")

    def sentences(self, story: str | Sequence[str], segment_length: int) -> list[list[str]]:
        """The words that a model reads of a story, see `registry.Sources`."""
        parts = split_sentences(story) if isinstance(story, str) else map(tokenize, story)
        return cut(list(parts), segment_length)[: self.max_segments]


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Builds the source, see `open_narrativeqa`."""
    return open_narrativeqa(
        common.dir,
        common.cache_dir,
        segment_length=common.segment_length,
        min_count=common.min_count,
        buckets=common.buckets,
        **vars(settings),
    )


def open_narrativeqa(
    directory: str,
    cache_dir: str,
    *,
    segment_length: int = 20,
    min_count: int = 2,
    max_segments: int = 64,
    buckets: int = 6,
) -> TextRecords:
    """Opens the source; the first call prepares the data.

    A story is a summary, and its questions come at the end. Every question may choose among the
    first answers to all questions of its story. Answers with equal words are one candidate. The
    groups are the kinds of document, 'gutenberg' and 'movie'.

    Args:
      directory: a clone of the release, with the three files of `NAMES`.
      cache_dir: folder for prepared data, see `records.prepare`.
      segment_length: most words of a segment. A segment is a sentence, or a part of a longer one.
      min_count: words with fewer occurrences in 'train' become '<unk>'.
      max_segments: the first segments of a summary that are kept.
      buckets: most sizes that streams are padded to.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory` does not have all three files.
      ValueError: a row is malformed, a question is about an unknown document, or a set has no
        question.
    """
    files = records.find_files(directory, NAMES, (".",), ADVICE)
    parameters = dict(segment_length=segment_length, min_count=min_count, max_segments=max_segments)
    source = TextRecords(
        records.prepare(NarrativeQABuilder, cache_dir, files=files, parameters=parameters),
        segment_length=segment_length,
        metric="mrr",
        positions_at_end=True,
        buckets=buckets,
    )
    log_source("NarrativeQA", source, "stories")
    return source


class NarrativeQABuilder(TextBuilder):
    """Stores the stories in the order of documents.csv, without those that have no question."""

    name = "narrativeqa"
    fields = (*TextBuilder.fields, "group", "also", *TextBuilder.choice_fields)

    def stories(self) -> dict[str, list[Story]]:
        """See `TextBuilder.stories`."""
        documents_csv, qaps_csv, summaries_csv = self.builder_config.files
        rows = read_rows(documents_csv, ("document_id", "set", "kind"))
        documents = {row["document_id"]: row for _, row in rows}
        summaries = {}
        for line, row in read_rows(summaries_csv, ("document_id", "summary", "summary_tokenized")):
            sentences = split_sentences(row["summary_tokenized"] or row["summary"])
            if not sentences:
                raise records.malformed(summaries_csv, line, "summary", "words", row["summary"])
            summaries[row["document_id"]] = sentences
        asked: dict[str, list[dict[str, str]]] = {name: [] for name in documents}
        columns = ("document_id", "question_tokenized", "answer1_tokenized", "answer2_tokenized")
        for line, row in read_rows(qaps_csv, columns):
            name = row["document_id"]
            for path, known in ((documents_csv, documents), (summaries_csv, summaries)):
                if name not in known:
                    expected = f"an id that {path.name} has"
                    raise records.malformed(qaps_csv, line, "document_id", expected, name)
            asked[name].append(row)
        kinds = sorted({row["kind"] for row in documents.values()})
        splits: dict[str, list[Story]] = {name: [] for name in SETS}
        for name, questions in asked.items():
            if questions:
                kind = kinds.index(documents[name]["kind"])
                splits[documents[name]["set"]].append(self._story(summaries[name], questions, kind))
        for split, stories in splits.items():
            if not stories:
                cause = f"expected questions in every set, found none in {split!r}"
                raise ValueError(f"{qaps_csv}: {cause}")
        self.info.metadata.update(groups=kinds)
        return splits

    def _story(self, sentences: list[list[str]], rows: list[dict[str, str]], kind: int) -> Story:
        parameters = self.builder_config.parameters
        length, most = parameters["segment_length"], parameters["max_segments"]
        segments = cut(sentences, length)[:most]
        pool: dict[tuple[str, ...], int] = {}
        first = [tuple(tokenize(row["answer1_tokenized"])) for row in rows]
        target = [pool.setdefault(answer, len(pool)) for answer in first]
        second = [pool.get(tuple(tokenize(row["answer2_tokenized"])), -1) for row in rows]
        return Story(
            sentences=segments,
            questions=[tokenize(row["question_tokenized"]) for row in rows],
            position=[len(segments)] * len(rows),
            target=target,
            group=[kind] * len(rows),
            also=[-1 if other == own else other for own, other in zip(target, second, strict=True)],
            candidates=list(pool),
            choices=[range(len(pool))] * len(rows),
        )


def split_sentences(text: str) -> list[list[str]]:
    """Splits a tokenised text into sentences.

    Args:
      text: a text in which a full stop, '!' or '?' at the end of a sentence stands alone.

    Returns:
      The words of each sentence that has any.
    """
    return [words for part in re.split(r"\s[.!?]+(?=\s|$)", text) if (words := tokenize(part))]


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Reads the rows of a CSV file.

    Args:
      path: the file.
      columns: the columns that the file must have.

    Yields:
      (number of the first line of the row, the row).

    Raises:
      ValueError: a column is missing, a row has too few or too many fields, or a quoted field does
        not end; names the line and field.
    """
    reader = csv.DictReader((f"{line}\n" for _, line in text_files.read_lines(path)), strict=True)
    line = 1
    try:
        names = reader.fieldnames or ()
        for column in columns:
            if column not in names:
                raise records.malformed(path, 1, column, "a column of this name", ",".join(names))
        line = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():
                empty = (name for name, value in row.items() if value is None)
                missing = str(next(empty, "after the last"))
                fields = ",".join(value for value in row.values() if isinstance(value, str))
                raise records.malformed(path, line, missing, f"{len(names)} fields", fields)
            if row.get("set", "train") not in SETS:
                raise records.malformed(path, line, "set", f"one of {', '.join(SETS)}", row["set"])
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise records.malformed(path, line, columns[0], "a row of CSV", str(error)) from error
