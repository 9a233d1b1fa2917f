"""A user's own stories and questions as JSON lines.

A line is one story:

    {"story": ["Mary went to the hall.", "She took a map."],
     "questions": [{"question": "Where is Mary?", "answer": "hall", "after": 1}]}

story      a list of sentences, or one text, which `rmjax.data.stories.text.split_text` splits
question   a sentence
answer     a text; blanks at its ends do not count
after      the number of sentences before the question; without it the question comes at the end
choices    the answers to choose from, in every question of the data or in none

Without choices the classes are the answers of the training stories. Any other answer in 'valid' or
'test' counts as wrong. Further keys are left out. Choices whose words are all rare become the same
unknown word; they are counted for each split, and need a smaller data.min_count.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from ml_collections import ConfigDict

from rmjax.data import records
from rmjax.data.shares import warn_of_shares
from rmjax.data.source import SPLITS, Source, hash64
from rmjax.data.stories.text import (
    Story,
    TextBuilder,
    TextRecords,
    equal_pair,
    sentences_of,
    split_text,
    tokenize,
)
from rmjax.io import paths
from rmjax.registry import at_least, inside, setting

OF_STORY, OF_QUESTION = ("story", "questions"), ("question", "answer", "after", "choices")
ADVICE = (
    "Set data.dir to a .jsonl file, or to a folder with train.jsonl (valid.jsonl and test.jsonl "
    'are optional). A line is {"story": ["a sentence", ...], "questions": [{"question": "...", '
    '"answer": "..."}, ...]}'
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The stories of splits without a file, and the part of a story that is read."""

    asks_in_words: ClassVar[bool] = True
    valid_fraction: float = setting(0.1, inside(0, 1), "share of stories, without valid.jsonl")
    test_fraction: float = setting(0.1, inside(0, 1), "share of stories, without test.jsonl")
    max_sentences: int = setting(0, at_least(0), "last sentences kept of a story; 0: all")

    def sentences(self, story: str | Sequence[str], segment_length: int) -> list[list[str]]:
        """The words that a model reads of a story, see `registry.Sources`."""
        return sentences_of(story)[-self.max_sentences :]


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Builds the source, see `open_stories`."""
    return open_stories(
        common.dir,
        common.cache_dir,
        seed,
        segment_length=common.segment_length,
        min_count=common.min_count,
        buckets=common.buckets,
        **vars(settings),
    )


def open_stories(
    directory: str,
    cache_dir: str,
    seed: int = 0,
    *,
    segment_length: int = 20,
    min_count: int = 2,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    max_sentences: int = 0,
    buckets: int = 6,
) -> TextRecords:
    """Opens the source; the first call prepares the data.

    A story is one example. A split without a file gets a part of the training stories, drawn by a
    hash of (seed, story). Equal stories come into the same split.

    Args:
      directory: a folder with train.jsonl and, perhaps, valid.jsonl and test.jsonl; or one file.
      cache_dir: folder for prepared data, see `records.prepare`.
      seed: draws the stories of splits without a file.
      segment_length: most words of a segment. A segment is a sentence, or a part of a longer one.
      min_count: words with fewer occurrences in 'train' become '<unk>'.
      valid_fraction: share of the stories that become 'valid', if there is no file.
      test_fraction: share of the stories that become 'test', if there is no file.
      max_sentences: as in `TextRecords`.
      buckets: as in `TextRecords`.

    Returns:
      The source. Its metadata count the questions of each split. They also count those whose
      answer is no class ('outside'), and those with choices of the same word ids ('alike').

    Raises:
      FileNotFoundError: there is no training file.
      ValueError: a line is malformed; names the file, line and field. Or there are too few stories
        to draw a split from, or the folder has a .jsonl file of another name.
    """
    files = _find_files(directory)
    splits = [file.stem for file in files] if len(files) > 1 else ["train"]
    parameters = dict(
        seed=seed,
        min_count=min_count,
        fractions={"valid": valid_fraction, "test": test_fraction},
        splits=splits,
        choices=_has_choices(files[0]),
    )
    stored = records.prepare(StoriesBuilder, cache_dir, files=files, parameters=parameters)
    source = TextRecords(
        stored,
        segment_length=segment_length,
        metric="accuracy",
        positions_at_end=records.open_records(stored)[0]["at_end"],
        max_sentences=max_sentences,
        buckets=buckets,
    )
    names = dict(zip(splits, (file.name for file in files), strict=True))
    _report(source, names, min_count)
    asked = {"valid": valid_fraction, "test": test_fraction}
    asked = {split: share for split, share in asked.items() if split not in names}
    sizes = {split: source.size(split) for split in ("train", *asked)}  # of the training file
    keys = ", ".join(f"config.data.stories.{split}_fraction" for split in asked)
    cure = "there are few different stories. Add some, or give each split a file of its own"
    warn_of_shares("stories", sizes, asked, keys, cure)
    return source


def _report(source: TextRecords, names: dict[str, str], min_count: int) -> None:
    """Logs the sizes and files of the splits, and warns of answers that cannot be right."""
    for split, counts in source.metadata["counts"].items():
        drawn = f"from {names[split]}" if split in names else f"drawn from {names['train']}"
        size = source.size(split)
        message = "%s: %d stories with %d questions, %s."
        logging.info(message, split, size, counts["questions"], drawn)
        if counts["outside"]:
            message = "%s: the answers to %d of %d questions are not among the %d of the training "
            message += "stories; they count as wrong."
            sizes = counts["outside"], counts["questions"], len(source.classes)
            logging.warning(message, split, *sizes)
        if counts["alike"]:
            message = "%s: %d of %d questions have choices that the model cannot tell apart: words "
            message += "with fewer occurrences in 'train' than data.min_count = %d become '<unk>'."
            logging.warning(message, split, counts["alike"], counts["questions"], min_count)
    if pair := equal_pair([name for name in source.classes if tokenize(name)]):
        message = "the answers %r and %r have the same words, but they are two classes: write "
        logging.warning(message + "them in one way if they mean the same.", *pair)


def _find_files(directory: str) -> tuple[Path, ...]:
    """The files of the splits, 'train' first."""
    path = paths.resolve(directory, "config.data.dir")
    if directory and path.is_file():
        return (path,)
    named = {file.stem: file for file in paths.visible(path, "*.jsonl")} if directory else {}
    if "train" not in named:
        raise FileNotFoundError(
            f"train.jsonl not found in {paths.lacks(directory, 'train.jsonl')}. {ADVICE}"
        )
    for name, file in named.items():
        if name not in SPLITS:
            names = "train.jsonl, valid.jsonl and test.jsonl"
            raise ValueError(f"{file}: the files of a folder are {names}: rename it, or move it")
    return tuple(named[split] for split in SPLITS if split in named)


def _has_choices(path: Path) -> bool:
    """Whether the first question of a file has choices; the complete file is checked later."""
    for _, entry in records.read_json_lines(path):
        questions = entry.get("questions")
        first = questions[0] if isinstance(questions, list) and questions else None
        return isinstance(first, dict) and "choices" in first
    return False


class StoriesBuilder(TextBuilder):
    """Stores the stories in the order of the files."""

    name = "stories"
    VERSION = tfds.core.Version("1.2.0")

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        """The fields of a record, see `TextBuilder`."""
        chosen = self.choice_fields if self.builder_config.parameters["choices"] else ()
        return (*TextBuilder.fields, *chosen)

    def stories(self) -> dict[str, list[Story]]:
        """See `TextBuilder.stories`."""
        options = self.builder_config.parameters
        files = dict(zip(options["splits"], self.builder_config.files, strict=True))
        parts = {split: read_stories(file, options["choices"]) for split, file in files.items()}
        absent = {k: v for k, v in options["fractions"].items() if k not in parts}
        parts |= draw(parts["train"], absent, options["seed"], files["train"])
        classes: dict[str, int] = {}
        if not options["choices"]:
            for question in _questions(parts["train"]):
                classes.setdefault(question.answer, len(classes))
        counts = {}
        for split in SPLITS:
            answers = [question.answer for question in _questions(parts[split])]
            outside = 0 if options["choices"] else sum(answer not in classes for answer in answers)
            counts[split] = dict(questions=len(answers), outside=outside, alike=0)
        lines = [line for split in SPLITS for line in parts[split]]
        at_end = all(q.after == len(line.sentences) for line in lines for q in line.questions)
        self.info.metadata.update(classes=list(classes), counts=counts, at_end=at_end)
        return {split: [_story(line, classes) for line in parts[split]] for split in SPLITS}

    def check_ids(self, splits: Mapping[str, list[Story]], ids: Mapping[str, int]) -> None:
        """Counts the questions with choices that have the same ids, see `TextBuilder.check_ids`."""
        for split, stories in splits.items():
            for story in stories:
                pool = [tuple(ids.get(word, 0) for word in words) for words in story.candidates]
                alike = [len({pool[c] for c in row}) < len(row) for row in story.choices]
                self.info.metadata["counts"][split]["alike"] += sum(alike)


class Question(NamedTuple):
    """A question as it was read."""

    words: list[str]
    answer: str
    after: int  # sentences before it
    choices: tuple[str, ...]  # () without choices


class Line(NamedTuple):
    """A story as it was read."""

    sentences: list[list[str]]
    questions: list[Question]  # by rising `after`


def _questions(lines: list[Line]) -> list[Question]:
    return [question for line in lines for question in line.questions]


def _story(line: Line, classes: dict[str, int]) -> Story:
    """The story with numbers in the place of answers; an answer that is no class has the last."""
    pool: dict[tuple[str, ...], int] = {}
    questions = line.questions
    if not classes:
        target = [question.choices.index(question.answer) for question in questions]
    else:
        target = [classes.get(question.answer, len(classes)) for question in questions]
    return Story(
        sentences=line.sentences,
        questions=[question.words for question in questions],
        position=[question.after for question in questions],
        target=target,
        choices=[
            [pool.setdefault(tuple(tokenize(choice)), len(pool)) for choice in question.choices]
            for question in questions
        ],
        candidates=list(pool),
    )


def draw(
    lines: list[Line], fractions: dict[str, float], seed: int, path: Path
) -> dict[str, list[Line]]:
    """Divides stories among 'train' and further splits.

    A story's place depends on a hash of (seed, sentences), so equal stories stay together.

    Args:
      lines: the stories.
      fractions: {split: share of the different stories}; at least one story is taken.
      seed: of the hash.
      path: the file of the stories, for the error.

    Returns:
      {'train': the stories that are left, split: its stories}.

    Raises:
      ValueError: no story is left to train on.
    """
    keys = [json.dumps(line.sentences) for line in lines]
    different = sorted(set(keys))
    checksums = np.array([zlib.crc32(key.encode()) for key in different])
    order = np.argsort(hash64("stories split", seed, checksums), kind="stable")
    split_of, begin = dict.fromkeys(different, "train"), 0
    for split, fraction in fractions.items():
        end = begin + max(1, round(fraction * len(different)))
        split_of |= {different[i]: split for i in order[begin:end]}
        begin = end
    if begin >= len(different):
        splits = " and ".join(map(repr, fractions))
        cause = f"{len(different)} different stories, and {begin} are needed for {splits}"
        raise ValueError(f"{path}: {cause}: add stories, lower the fractions, or give the files")
    divided: dict[str, list[Line]] = {split: [] for split in ("train", *fractions)}
    for key, line in zip(keys, lines, strict=True):
        divided[split_of[key]].append(line)
    return divided


def read_stories(path: Path, choices: bool) -> list[Line]:
    """Reads a file of stories.

    Args:
      path: the file.
      choices: whether every question must have choices; otherwise none may have any.

    Returns:
      The stories.

    Raises:
      ValueError: a line is malformed, or the file is empty; names the line and field.
    """
    lines = []
    for number, entry in records.read_json_lines(path):
        wrong = functools.partial(records.malformed, path, number)
        _check_keys(entry, "", OF_STORY, wrong)
        sentences = _sentences(entry.get("story"), wrong)
        asked = entry.get("questions")
        if not isinstance(asked, list) or not asked:
            raise wrong("questions", "a list of one question or more", _shown(entry, "questions"))
        questions = [
            _question(question, f"questions[{i}]", len(sentences), choices, wrong)
            for i, question in enumerate(asked)
        ]
        lines.append(Line(sentences, sorted(questions, key=lambda question: question.after)))
    if not lines:
        raise records.malformed(path, 1, "line", "a story", "an empty file")
    return lines


def _sentences(story: Any, wrong: Any) -> list[list[str]]:
    """The words of each sentence of the field 'story'."""
    if isinstance(story, str):
        sentences = split_text(story)
        if not sentences:
            raise wrong("story", "a text with words", story)
        return sentences_of(sentences)
    if not isinstance(story, list) or not story:
        raise wrong("story", "a text, or a list of one sentence or more", _json(story))
    for i, sentence in enumerate(story):
        if not isinstance(sentence, str) or not tokenize(sentence):
            raise wrong(f"story[{i}]", "a sentence with words", _json(sentence))
    return sentences_of(story)


def _question(entry: Any, field: str, sentences: int, choices: bool, wrong: Any) -> Question:
    """One entry of the field 'questions'."""
    if not isinstance(entry, dict):
        raise wrong(field, "an object with a question and an answer", _json(entry))
    _check_keys(entry, f"{field}.", OF_QUESTION, wrong)
    for key in ("question", "answer"):
        if not isinstance(entry.get(key), str):
            raise wrong(f"{field}.{key}", "a string", _shown(entry, key))
    words, answer = tokenize(entry["question"]), _answer(entry["answer"])
    if not words:
        raise wrong(f"{field}.question", "a sentence with words", entry["question"])
    if not answer:
        raise wrong(f"{field}.answer", "a text that is not empty", entry["answer"])
    after = entry.get("after", sentences)
    if type(after) is not int or not 0 <= after <= sentences:
        expected = f"a number of sentences from 0 to {sentences}, those of the story"
        raise wrong(f"{field}.after", expected, _json(after))
    if choices != ("choices" in entry):
        expected = "choices, as" if choices else "no choices, as"
        raise wrong(
            f"{field}.choices", f"{expected} in the first question", _shown(entry, "choices")
        )
    chosen = _choices(entry["choices"], answer, field, wrong) if choices else ()
    return Question(words, answer, after, chosen)


def _choices(entries: Any, answer: str, field: str, wrong: Any) -> tuple[str, ...]:
    """The choices of a question."""
    right = isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
    if not right or len(entries) < 2:
        raise wrong(f"{field}.choices", "a list of two strings or more", _json(entries))
    choices = tuple(map(_answer, entries))
    if pair := equal_pair(choices):
        expected = f"choices that differ in their words, not in signs or case as {pair[0]!r}"
        raise wrong(f"{field}.choices", expected, pair[1])
    if answer not in choices:
        raise wrong(f"{field}.answer", f"one of the choices {', '.join(choices)}", answer)
    return choices


def _answer(text: str) -> str:
    """An answer without blanks at its ends, in NFC: composed and decomposed texts are equal."""
    return unicodedata.normalize("NFC", text.strip())


def _check_keys(entry: dict[str, Any], field: str, own: Sequence[str], wrong: Any) -> None:
    """Refuses misspelt keys, and keys of the other level; any other further key is left out."""
    for key in entry.keys() - set(own):
        if key in (*OF_STORY, *OF_QUESTION):
            place = "the object of the story" if key in OF_STORY else "an entry of 'questions'"
            raise wrong(f"{field}{key}", f"this key in {place}", _json(entry[key]))
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.8)
        if near and near[0] not in entry:
            raise wrong(f"{field}{key}", f"another name: did you mean {near[0]!r}?", key)


def _shown(entry: dict[str, Any], key: str) -> str:
    return _json(entry[key]) if key in entry else "no such key"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
