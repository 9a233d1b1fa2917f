"""TVQA (Lei et al. 2018) from the subtitles alone: of five answers about a clip, which is right?"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from rmjax.data import records
from rmjax.data.source import Source, hash64
from rmjax.data.stories.text import Story, TextBuilder, TextRecords, tokenize
from rmjax.io import text as text_files
from rmjax.registry import at_least, below, setting

ANSWERS = ("a0", "a1", "a2", "a3", "a4")
NAMES = ("tvqa_train.jsonl", "tvqa_val.jsonl", "tvqa_preprocessed_subtitles.jsonl")
ADVICE = (
    "The questions are in https://tvqa.cs.unc.edu/files/tvqa_qa_release.tar.gz, the subtitles in the folder data of "
    "https://github.com/jayleicn/TVRetrieval; set data.dir to one folder with all three files."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is read of a clip, and which clips validate."""

    asks_in_words = True
    max_words: int = setting(300, at_least(1), "words kept of a clip's subtitles")
    valid_fraction: float = setting(0.1, below(0, 1), "share of the training clips for validation")


def make(settings: Settings, common: Any, seed: int) -> Source:
    options = dict(
        segment_length=common.segment_length, min_count=common.min_count, buckets=common.buckets
    )
    return open_tvqa(common.dir, common.cache_dir, seed, **options, **vars(settings))


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
    """The source. An example is a clip: the first `max_words` words of its subtitles, speakers' names too, as one
    stream, and all its questions, at the end.

    'test' is the release's validation part, since its test has no answers; 'valid' is `valid_fraction` of the training
    clips, by a hash of (seed, clip). Words that are rarer than `min_count` in 'train' are '<unk>'. A clip without
    subtitles is an empty stream; metadata['without_subtitles'] {split: clips} counts them.

    Raises:
      FileNotFoundError: `directory` has not all three files.
      ValueError: a malformed line, or fewer than two training clips.
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
            logging.warning(
                "TVQA %s: %d of %d clips have no subtitles.", split, clips, source.size(split)
            )
    return source


class TVQABuilder(TextBuilder):
    """Clips in the order of their first questions; the subtitles are one sentence."""

    name = "tvqa"
    fields = (*TextBuilder.fields, *TextBuilder.choice_fields)

    def stories(self) -> dict[str, list[Story]]:
        train, val, subtitles = self.builder_config.files
        options = self.builder_config.parameters
        said = read_subtitles(subtitles, options["max_words"])
        asked, test = read_questions(train), read_questions(val)
        clips = sorted(asked)
        if len(clips) < 2:
            raise ValueError(
                f"{train}: expected two clips or more, to hold one out for 'valid', found {len(clips)}"
            )
        draw = hash64(
            "tvqa valid", options["seed"], np.array([zlib.crc32(clip.encode()) for clip in clips])
        )
        count = min(len(clips) - 1, max(1, round(options["valid_fraction"] * len(clips))))
        held_out = np.argsort(draw, kind="stable")[:count]
        chosen = {clips[i] for i in held_out}
        splits = {
            "train": {clip: rows for clip, rows in asked.items() if clip not in chosen},
            "valid": {clip: rows for clip, rows in asked.items() if clip in chosen},
            "test": test,
        }
        without = {
            split: sum(not said.get(clip) for clip in rows) for split, rows in splits.items()
        }
        self.info.metadata.update(without_subtitles=without)
        return {
            split: [_story(said.get(clip, []), questions) for clip, questions in of_clips.items()]
            for split, of_clips in splits.items()
        }


def _story(words: list[str], questions: list[dict[str, Any]]) -> Story:
    pool: dict[tuple[str, ...], int] = {}
    return Story(
        sentences=[words],
        questions=[tokenize(question["q"]) for question in questions],
        position=[1] * len(questions),
        target=[question["answer_idx"] for question in questions],
        choices=[
            [pool.setdefault(tuple(tokenize(q[a])), len(pool)) for a in ANSWERS] for q in questions
        ],
        candidates=list(pool),
    )


def read_questions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """{clip: its questions}, in the order of the file."""
    clips: dict[str, list[dict[str, Any]]] = {}
    for number, question in read_lines(path, ("vid_name", "q", *ANSWERS)):
        answer = question.get("answer_idx")
        if type(answer) is not int or not 0 <= answer < len(ANSWERS):
            raise records.malformed(
                path, number, "answer_idx", f"0 to {len(ANSWERS) - 1}", str(answer)
            )
        clips.setdefault(question["vid_name"], []).append(question)
    if not clips:
        raise records.malformed(path, 1, "q", "a question", "an empty file")
    return clips


def read_subtitles(path: Path, max_words: int) -> dict[str, list[str]]:
    """{clip: the first `max_words` words said in it}."""
    clips = {}
    for number, clip in read_lines(path, ("vid_name",)):
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


def read_lines(path: Path, strings: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line; ValueError names the line and the key that is wrong."""
    for number, line in text_files.read_lines(
        path, ended=False
    ):  # the release's last line has no end
        try:
            entry = text_files.parse_json(line, str(path))
        except ValueError as error:
            cause = getattr(error.__cause__, "msg", error.__cause__)
            raise records.malformed(
                path, number, "line", f"JSON ({cause})", line.strip()
            ) from error
        if not isinstance(entry, dict):
            raise records.malformed(path, number, "line", "a JSON object", line.strip())
        for key in strings:
            if not isinstance(entry.get(key), str):
                value = repr(entry[key]) if key in entry else "no such key"
                raise records.malformed(path, number, key, "a text", value)
        yield number, entry
