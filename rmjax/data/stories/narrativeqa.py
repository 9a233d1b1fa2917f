"""NarrativeQA (Kocisky et al. 2018), of the summaries, as a choice: which of a story's answers is the question's?

Candidates are the first answers to all questions of the story. Its second answer is right too where it is one of them.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmjax.data import records
from rmjax.data.source import Source
from rmjax.data.stories.text import Story, TextBuilder, TextRecords, tokenize
from rmjax.io import text as text_files
from rmjax.registry import at_least, setting

SETS = ("train", "valid", "test")
NAMES = ("documents.csv", "qaps.csv", "third_party/wikipedia/summaries.csv")
ADVICE = (
    "Clone https://github.com/google-deepmind/narrativeqa and set data.dir to its folder; the stories themselves "
    "(download_stories.sh) are not needed."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is read of a summary."""

    asks_in_words = True
    max_segments: int = setting(64, at_least(1), "segments kept of a summary")


def make(settings: Settings, common: Any, seed: int) -> Source:
    options = dict(
        segment_length=common.segment_length, min_count=common.min_count, buckets=common.buckets
    )
    return open_narrativeqa(common.dir, common.cache_dir, **options, **vars(settings))


def open_narrativeqa(
    directory: str,
    cache_dir: str,
    *,
    segment_length: int = 20,
    min_count: int = 2,
    max_segments: int = 64,
    buckets: int = 6,
) -> TextRecords:
    """The source. A story is a summary, a sentence a segment, or several of `segment_length` words; the first
    `max_segments` are kept.

    Questions come at the end. Every answer that some question of the story has first is a choice of each of them; equal
    ones, as words, are one. Words that are rarer than `min_count` in 'train' are '<unk>'. Groups are the kinds of
    document, 'gutenberg' and 'movie'.

    Raises:
      FileNotFoundError: `directory` has not all three files.
      ValueError: a malformed row, a question of an unknown document, or a set without a question.
    """
    files = records.find_files(directory, NAMES, (".",), ADVICE)
    parameters = dict(segment_length=segment_length, min_count=min_count, max_segments=max_segments)
    return TextRecords(
        records.prepare(NarrativeQABuilder, cache_dir, files=files, parameters=parameters),
        segment_length=segment_length,
        metric="mrr",
        positions_at_end=True,
        buckets=buckets,
    )


class NarrativeQABuilder(TextBuilder):
    """Stories in the order of documents.csv, those without a question left out."""

    name = "narrativeqa"
    fields = (*TextBuilder.fields, "group", "also", *TextBuilder.choice_fields)

    def stories(self) -> dict[str, list[Story]]:
        documents_csv, qaps_csv, summaries_csv = self.builder_config.files
        documents = {
            row["document_id"]: row
            for _, row in read_rows(documents_csv, ("document_id", "set", "kind"))
        }
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
                    raise records.malformed(
                        qaps_csv, line, "document_id", f"one that {path.name} has", name
                    )
            asked[name].append(row)
        kinds = sorted({row["kind"] for row in documents.values()})
        splits: dict[str, list[Story]] = {name: [] for name in SETS}
        for name, rows in asked.items():
            if rows:
                story = self._story(summaries[name], rows, kinds.index(documents[name]["kind"]))
                splits[documents[name]["set"]].append(story)
        for split, stories in splits.items():
            if not stories:
                raise ValueError(
                    f"{qaps_csv}: expected questions in every set, found none in {split!r}"
                )
        self.info.metadata.update(groups=kinds)
        return splits

    def _story(self, sentences: list[list[str]], rows: list[dict[str, str]], kind: int) -> Story:
        length, most = (
            self.builder_config.parameters[name] for name in ("segment_length", "max_segments")
        )
        segments = [
            words[i : i + length] for words in sentences for i in range(0, len(words), length)
        ][:most]
        pool: dict[tuple[str, ...], int] = {}
        target = [
            pool.setdefault(tuple(tokenize(row["answer1_tokenized"])), len(pool)) for row in rows
        ]
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
    """Sentences of tokenised text, where a full stop, '!' or '?' that ends one stands alone."""
    return [words for part in re.split(r"\s[.!?]+(?=\s|$)", text) if (words := tokenize(part))]


def read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line it begins at, row) of a CSV file with at least `columns`.

    Raises:
      ValueError: a row has too few or too many fields, or a quoted one that does not end; names the line
        and field.
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
                missing = next(
                    (name for name, value in row.items() if value is None), "after the last"
                )
                fields = ",".join(value for value in row.values() if isinstance(value, str))
                raise records.malformed(path, line, str(missing), f"{len(names)} fields", fields)
            if row.get("set", "train") not in SETS:
                raise records.malformed(path, line, "set", f"one of {', '.join(SETS)}", row["set"])
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise records.malformed(path, line, columns[0], "a row of CSV", str(error)) from error
