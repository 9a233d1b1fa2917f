"""TVQA (Lei et al. 2018) from the subtitles alone: which of five answers about a clip is right?"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.shares import log_source
from rmjax.data.source import Source, hash64
from rmjax.data.stories.text import Story, TextBuilder, TextRecords, tokenize
from rmjax.registry import at_least, below, setting

ANSWERS = ("a0", "a1", "a2", "a3", "a4")
NAMES = ("tvqa_train.jsonl", "tvqa_val.jsonl", "tvqa_preprocessed_subtitles.jsonl")
ADVICE = (
    "The questions are in https://tvqa.cs.unc.edu/files/tvqa_qa_release.tar.gz. The subtitles are "
    "in the folder data of https://github.com/jayleicn/TVRetrieval. Set data.dir to one folder "
    "with all three files."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The words read of a clip, and the share of clips for validation."""

    asks_in_words: ClassVar[bool] = True
    max_words: int = setting(300, at_least(1), "words kept of a clip's subtitles")
    valid_fraction: float = setting(0.1, below(0, 1), "share of the training clips for validation")

    def sentences(self, story: str | Sequence[str], segment_length: int) -> list[list[str]]:
        """The words that a model reads of a story, see `registry.Sources`: one sentence."""
        words = tokenize(story if isinstance(story, str) else " ".join(story))
        return [words[: self.max_words]]


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Builds the source, see `open_tvqa`."""
    return open_tvqa(
        common.dir,
        common.cache_dir,
        seed,
        segment_length=common.segment_length,
        min_count=common.min_count,
        buckets=common.buckets,
        **vars(settings),
    )


def open_tvqa(
    directory: str,
    cache_dir: str,
    seed: int,
    *,
    segment_length: int = 20,
    max_words: int = 300,
    min_count: int = 2,
    valid_fraction: float = 0.1,
    buckets: int = 4,
) -> TextRecords:
    """Opens the source; the first call prepares the data.

    An example is a clip. Its stream is the subtitles, with the speakers' names; all its questions
    come at the end. A clip without subtitles is an empty stream, and
    metadata['without_subtitles'] {split: clips} counts such clips.

    'test' is the release's validation file, since the release's test file has no answers. 'valid'
    is a part of the training clips, drawn by a hash of (seed, clip).

    Args:
      directory: a folder with the three files of `NAMES`.
      cache_dir: folder for prepared data, see `records.prepare`.
      seed: draws the validation clips.
      segment_length: most words of a segment.
      max_words: the first words of the subtitles that are kept.
      min_count: words with fewer occurrences in 'train' become '<unk>'.
      valid_fraction: share of the training clips for validation.
      buckets: most sizes that streams are padded to.

    Returns:
      The source.

    Raises:
      FileNotFoundError: `directory` does not have all three files.
      ValueError: a line is malformed, or there are fewer than two training clips.
    """
    files = records.find_files(directory, NAMES, (".",), ADVICE)
    parameters = dict(
        seed=seed, max_words=max_words, min_count=min_count, valid_fraction=valid_fraction
    )
    source = TextRecords(
        records.prepare(TVQABuilder, cache_dir, files=files, parameters=parameters),
        segment_length=segment_length,
        metric="accuracy",
        positions_at_end=True,
        buckets=buckets,
    )
    for split, clips in source.metadata["without_subtitles"].items():
        if clips:
            size = source.size(split)
            logging.warning("TVQA %s: %d of %d clips have no subtitles.", split, clips, size)
    log_source("TVQA", source, "clips")
    return source


class TVQABuilder(TextBuilder):
    """Stores the clips in the order of their first questions; the subtitles are one sentence."""

    name = "tvqa"
    fields = (*TextBuilder.fields, *TextBuilder.choice_fields)

    def stories(self) -> dict[str, list[Story]]:
        """See `TextBuilder.stories`."""
        train, val, subtitles = self.builder_config.files
        options = self.builder_config.parameters
        words = read_subtitles(subtitles, options["max_words"])
        asked, test = read_questions(train), read_questions(val)
        clips = sorted(asked)
        if len(clips) < 2:
            expected = "expected two clips or more, since one is held out for 'valid'"
            raise ValueError(f"{train}: {expected}, found {len(clips)}")
        checksums = np.array([zlib.crc32(clip.encode()) for clip in clips])
        draw = hash64("tvqa valid", options["seed"], checksums)
        count = min(len(clips) - 1, max(1, round(options["valid_fraction"] * len(clips))))
        held_out = np.argsort(draw, kind="stable")[:count]
        chosen = {clips[i] for i in held_out}
        splits = {
            "train": {clip: rows for clip, rows in asked.items() if clip not in chosen},
            "valid": {clip: rows for clip, rows in asked.items() if clip in chosen},
            "test": test,
        }
        without = {
            split: sum(not words.get(clip) for clip in rows) for split, rows in splits.items()
        }
        self.info.metadata.update(without_subtitles=without)
        return {
            split: [_story(words.get(clip, []), questions) for clip, questions in rows.items()]
            for split, rows in splits.items()
        }


class Question(NamedTuple):
    """A question about a clip."""

    text: str
    answers: tuple[str, ...]  # five
    right: int  # index of the right answer


def _story(words: list[str], questions: list[Question]) -> Story:
    pool: dict[tuple[str, ...], int] = {}
    return Story(
        sentences=[words],
        questions=[tokenize(question.text) for question in questions],
        position=[1] * len(questions),
        target=[question.right for question in questions],
        choices=[
            [pool.setdefault(tuple(tokenize(answer)), len(pool)) for answer in question.answers]
            for question in questions
        ],
        candidates=list(pool),
    )


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Reads a file of questions.

    Args:
      path: a .jsonl file of the release.

    Returns:
      {clip: questions about it}, in the order of the file.

    Raises:
      ValueError: a line is malformed, or the file is empty; names the line and key.
    """
    clips: dict[str, list[Question]] = {}
    for number, row in records.read_json_lines(path, ("vid_name", "q", *ANSWERS)):
        right = row.get("answer_idx")
        if type(right) is not int or not 0 <= right < len(ANSWERS):
            expected = f"0 to {len(ANSWERS) - 1}"
            raise records.malformed(path, number, "answer_idx", expected, str(right))
        question = Question(row["q"], tuple(row[name] for name in ANSWERS), right)
        clips.setdefault(row["vid_name"], []).append(question)
    if not clips:
        raise records.malformed(path, 1, "q", "a question", "an empty file")
    return clips


def read_subtitles(path: Path, max_words: int) -> dict[str, list[str]]:
    """Reads the file of subtitles.

    Args:
      path: the .jsonl file.
      max_words: most words kept of a clip.

    Returns:
      {clip: the first `max_words` words of its subtitles}.

    Raises:
      ValueError: a line is malformed; names the line and key.
    """
    clips = {}
    for number, clip in records.read_json_lines(path, ("vid_name",)):
        lines = clip.get("sub")
        if not isinstance(lines, list):
            raise records.malformed(path, number, "sub", "a list", repr(lines))
        words: list[str] = []
        for line in lines:
            if not isinstance(line, dict) or not isinstance(line.get("text"), str):
                raise records.malformed(path, number, "sub", "lines that have a text", repr(line))
            words += tokenize(line["text"])
        clips[clip["vid_name"]] = words[:max_words]
    return clips
