"""Stories of words with questions asked along them or at their end: how they are written, and the source over them."""

from __future__ import annotations

import functools
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from rmjax.data import records
from rmjax.data.source import Examples, Questions, Source
from rmjax.io.progress import watch

UNKNOWN = "<unk>"  # id 0
_ASCII_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*", re.ASCII)


def tokenize(text: str) -> list[str]:
    """Words and numbers in lower case; an apostrophe counts inside a word, other punctuation goes.

    A word is a run of letters, digits, combining marks and the joiners U+200C and U+200D. It begins
    with a letter or a digit. Composed and decomposed texts give the same words.
    """
    if text.isascii():
        words = _ASCII_WORD.findall(text.lower())
    else:
        words = _word().findall(fold(text).replace("_", " "))
    return [sys.intern(word) for word in words]


def fold(text: str) -> str:
    """`text` as words are compared: in NFC and lower case, without soft hyphens, with "'" for U+2019.

    The dotted capital I becomes i. Its lower case in Unicode adds U+0307, which nobody writes.
    """
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFC", text.replace("\u00ad", "")).lower()
    text = text.replace("i\u0307", "i").replace("\u2019", "'")
    return unicodedata.normalize(
        "NFC", text
    )  # only the lower case of J with a caron is one character


@functools.cache
def _word() -> re.Pattern[str]:
    """The pattern of a word of any script, in text without "_". `re` has no class of marks."""
    marks = (point for point in range(0x300, 0xE01F0) if unicodedata.category(chr(point))[0] == "M")
    runs = [
        list(run) for _, run in itertools.groupby(enumerate(marks), lambda pair: pair[1] - pair[0])
    ]
    ranges = "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)
    run = rf"[^\W_][\w{ranges}\u200c\u200d]*"
    return re.compile(f"{run}(?:'{run})*")


def make_vocabulary(counts: Counter[str], min_count: int = 1) -> list[str]:
    """Words that occur `min_count` times or more, the most frequent first, then by the alphabet; '<unk>' is id 0."""
    words = (word for word, count in counts.items() if count >= min_count)
    return [UNKNOWN, *sorted(words, key=lambda word: (-counts[word], word))]


class Story(NamedTuple):
    """One story in words. The last three lists are empty where a data set has no such thing."""

    sentences: list[list[str]]
    questions: list[list[str]]
    position: list[int]  # of each question: how many sentences come before it
    target: list[int]  # of each question: its class, or which of its choices is right
    group: Sequence[int] = ()  # of each question: which part it is reported with
    also: Sequence[int] = ()  # of each question: a second right choice, or -1
    candidates: Sequence[Sequence[str]] = ()
    choices: Sequence[Sequence[int]] = ()  # of each question: candidates to choose from


class TextBuilder(records.StreamBuilder):
    """A record is a `Story` as word ids, its lists of lists as one list and the lengths.

    A subclass gives `stories`, adds to `fields` what else its stories have, and may fill `info.metadata`: classes
    (answers by number), groups (names by number).
    """

    fields: tuple[str, ...] = (
        "words",
        "sentences",
        "question_words",
        "question_lengths",
        "position",
        "target",
    )
    choice_fields = (
        "candidate_words",
        "candidate_lengths",
        "choices",
        "choice_counts",
    )  # for one with candidates
    counted: tuple[str, ...] = ("train",)  # splits the vocabulary is made of
    VERSION = tfds.core.Version("1.1.0")

    def stories(self) -> dict[str, list[Story]]:
        """The stories of each split."""
        raise NotImplementedError

    def _split_generators(self, dl_manager):
        self.info.metadata.update(classes=[], groups=[])
        splits = self.stories()
        counts: Counter[str] = Counter()
        for split in self.counted:
            for story in watch(splits[split], f"counting the words of {self.name}", "stories"):
                for sentence in (*story.sentences, *story.questions, *story.candidates):
                    counts.update(sentence)
        vocabulary = make_vocabulary(counts, self.builder_config.parameters.get("min_count", 1))
        self.info.metadata.update(vocabulary=vocabulary)
        ids = {word: i for i, word in enumerate(vocabulary)}
        return {split: self._generate_examples(stories, ids) for split, stories in splits.items()}

    def _generate_examples(
        self, stories: list[Story], ids: dict[str, int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        def flat(sentences):
            return [ids.get(word, 0) for sentence in sentences for word in sentence]

        def lengths(lists):
            return [len(entries) for entries in lists]

        for key, story in enumerate(stories):
            # An answer of punctuation alone is still one to choose: an unknown word.
            questions, candidates = (
                [words or [UNKNOWN] for words in s] for s in (story.questions, story.candidates)
            )
            record = dict(
                words=flat(story.sentences),
                sentences=lengths(story.sentences),
                question_words=flat(questions),
                question_lengths=lengths(questions),
                position=story.position,
                target=story.target,
                group=story.group,
                also=story.also,
                candidate_words=flat(candidates),
                candidate_lengths=lengths(candidates),
                choices=[choice for choices in story.choices for choice in choices],
                choice_counts=lengths(story.choices),
            )
            yield key, {name: np.array(record[name], np.int32) for name in self.fields}


class TextRecords(Source):
    """A `Source` over what a `TextBuilder` wrote, held in RAM: an example is a story with all its questions.

    A segment is a sentence; one of more than `segment_length` words is cut into several. `vocabulary` lists the words
    by id, `classes` the answers. With `per_question` each question is an example of its own, after the sentences before
    it. `max_sentences` (0: all) keeps the last sentences before the last question; one that is asked before any of them
    is asked of an empty memory. `groups` (none: all) keeps the stories of these parts, in the words of all. Every fetch
    has the same shapes, the largest of all splits.
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_length: int,
        metric: str,
        positions_at_end: bool,
        per_question: bool = False,
        max_sentences: int = 0,
        buckets: int = 6,
        groups: Sequence[str] = (),
    ):
        self.metadata, stored = records.open_records(directory)
        kept = {self.metadata["groups"].index(name) for name in groups}
        self.vocabulary: list[str] = self.metadata["vocabulary"]
        self.classes: list[str] = self.metadata["classes"]
        self.num_items = len(self.vocabulary)
        self.positions_at_end = positions_at_end or per_question
        answer = "class" if self.classes else "choice"
        self.questions = Questions(
            query="words", answer=answer, classes=len(self.classes), metric=metric
        )
        self._splits = {}
        for split, found in stored.items():
            rows = [
                row
                for row in found.__getitems__(range(len(found)))
                if not kept or int(row["group"][0]) in kept
            ]
            self._splits[split] = _Split(rows, segment_length, per_question, max_sentences)
        every = list(self._splits.values())
        self.max_items = max(int(split.num_words().max()) for split in every)
        self.num_queries = max(
            int((split.last_question - split.first_question).max()) for split in every
        )
        self._width = {
            name: max(split.ragged[name].width for split in every) for name in every[0].ragged
        }
        self._width["items"] = segment_length
        longest = max(int(split.num_segments().max()) for split in every)
        self._boundaries = bucket_boundaries(self._splits["train"].num_segments(), longest, buckets)
        self._num_candidates = max(int(split.num_candidates().max()) for split in every)

    def size(self, split: str) -> int:
        return len(self._splits[split].story)

    def stream_id(self, split: str) -> np.ndarray:
        """i64 [size]: the story each example is of."""
        return self._splits[split].story

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]]:
        """i64 [size] which bucket an example is in, and the segments T of each bucket, the same for every split."""
        return np.searchsorted(
            self._boundaries, self._splits[split].num_segments()
        ), self._boundaries

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """{name: bool [size, Q]}, the questions of each part."""
        rows = np.arange(self.size(split))
        if not self.metadata["groups"]:
            return {}
        group, asked = self._of_questions(split, "group", rows)
        parts = {
            name: asked & (group == number) for number, name in enumerate(self.metadata["groups"])
        }
        return {name: inside for name, inside in parts.items() if inside.any()}

    def also(self, split: str) -> np.ndarray:
        """I [size, Q]: a second right choice of a question, -1 where there is none."""
        if "also" not in self._splits[split].of_questions:
            return np.full((self.size(split), self.num_queries), -1)
        also, asked = self._of_questions(split, "also", np.arange(self.size(split)))
        return np.where(asked, also, -1)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """As `Source.fetch`, in segments."""
        s, T, Q = self._splits[split], self._boundaries[-1], self.num_queries
        first, last = s.first_question[indices], s.last_question[indices]
        items, item_mask = self._pad(
            s, "items", s.first_sentence[indices], s.last_sentence[indices], T
        )
        query, word_mask = self._pad(s, "query", first, last, Q)
        target, query_mask = self._of_questions(split, "target", indices)
        examples = {
            "items": items,
            "item_mask": item_mask,
            "query": query,
            "query_mask": query_mask,
            "word_mask": word_mask,
            "target": target,
            "example_id": np.asarray(indices, np.int32),
        }
        if not self.positions_at_end:
            written = self._of_questions(split, "segments_before", indices)[0]
            before = s.ragged["items"].rows[s.first_sentence[indices]]
            examples["position"] = np.where(
                query_mask, np.maximum(written - before[:, None], 0), 0
            ).astype(np.int32)
        if "choices" in s.ragged:
            story, A = s.story[indices], self._num_candidates
            of_story = (s.candidates_before[story], s.candidates_before[story + 1])
            examples["candidates"], examples["candidate_mask"] = self._pad(
                s, "candidates", *of_story, A
            )
            examples["choices"], examples["choice_mask"] = self._pad(s, "choices", first, last, Q)
        return examples

    def _pad(self, s: _Split, name: str, first: np.ndarray, last: np.ndarray, height: int):
        return s.ragged[name].padded(first, last, height, self._width[name])

    def _of_questions(
        self, split: str, name: str, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """[B, Q] of one value a question, padded with 0, and its mask."""
        s = self._splits[split]
        place = s.first_question[indices][:, None] + np.arange(self.num_queries)
        asked = place < s.last_question[indices][:, None]
        return np.where(asked, s.of_questions[name][np.where(asked, place, 0)], 0), asked


class _Split:
    """Records as flat arrays, and where each of E examples lies in them: all i64 [E], numbers within the split."""

    story: np.ndarray
    first_sentence: np.ndarray
    last_sentence: np.ndarray  # one past it, and so below
    first_question: np.ndarray
    last_question: np.ndarray
    candidates_before: np.ndarray  # i64 [stories + 1]

    def __init__(
        self,
        rows: Sequence[dict[str, np.ndarray]],
        segment_length: int,
        per_question: bool,
        max_sentences: int,
    ):
        flat = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

        def before(name):  # entries of `name` before each story, and all
            return _starts(np.array([len(row[name]) for row in rows]))

        segments = -(-flat["sentences"] // segment_length)
        self.ragged = {
            "items": _Ragged(flat["words"], flat["sentences"], segments),
            "query": _Ragged(flat["question_words"], flat["question_lengths"]),
        }
        if "choices" in flat:
            self.ragged["candidates"] = _Ragged(flat["candidate_words"], flat["candidate_lengths"])
            self.ragged["choices"] = _Ragged(flat["choices"], flat["choice_counts"])
        sentences, questions = before("sentences"), before("target")
        self.candidates_before = (
            before("candidate_lengths") if "choices" in flat else np.zeros_like(sentences)
        )
        story_of_question = np.repeat(np.arange(len(rows)), np.diff(questions))
        asked_at = (
            sentences[story_of_question] + flat["position"]
        )  # sentences of the split before each question
        self.of_questions: dict[str, np.ndarray] = {
            "segments_before": self.ragged["items"].rows[asked_at],
            **{name: flat[name] for name in ("target", "group", "also") if name in flat},
        }
        if per_question:
            self.story = story_of_question
            self.first_question = np.arange(len(story_of_question))
            self.last_question = self.first_question + 1
            self.last_sentence = asked_at
        else:
            self.story = np.arange(len(rows))
            self.first_question, self.last_question = questions[:-1], questions[1:]
            self.last_sentence = asked_at[questions[1:] - 1] if max_sentences else sentences[1:]
        self.first_sentence = sentences[self.story]
        if max_sentences:
            self.first_sentence = np.maximum(
                self.first_sentence, self.last_sentence - max_sentences
            )

    def num_words(self) -> np.ndarray:
        starts = self.ragged["items"].starts
        return starts[self.last_sentence] - starts[self.first_sentence]

    def num_segments(self) -> np.ndarray:
        """i64 [E], at least 1: an empty story is a segment of nothing."""
        rows = self.ragged["items"].rows
        return np.maximum(rows[self.last_sentence] - rows[self.first_sentence], 1)

    def num_candidates(self) -> np.ndarray:
        return np.diff(self.candidates_before)


class _Ragged:
    """Lists of numbers, one after another, each of which fills one row of a padded array or, cut, several."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray, rows: np.ndarray | None = None):
        self.values, self.width = values, int(lengths.max(initial=1))
        self.starts = _starts(lengths)  # values before each list, and all
        self.rows = _starts(
            np.ones_like(lengths) if rows is None else rows
        )  # rows before each list, and all
        self.place = np.arange(len(values)) - np.repeat(self.starts[:-1], lengths)
        self.row = np.repeat(self.rows[:-1], lengths)

    def padded(
        self, first: np.ndarray, last: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of lists first [B] .. last [B]: i32 [B, height, width] and its mask. A long list goes on in its next row."""
        start, count = self.starts[first], self.starts[last] - self.starts[first]
        example = np.repeat(np.arange(len(first)), count)
        index = np.arange(len(example)) + (start - _starts(count)[:-1])[example]
        cell = (
            (self.row[index] - self.rows[first][example]) + example * height
        ) * width + self.place[index]
        array, mask = (
            np.zeros((len(first), height, width), np.int32),
            np.zeros((len(first), height, width), bool),
        )
        array.reshape(-1)[cell], mask.reshape(-1)[cell] = self.values[index], True
        return array, mask


def bucket_boundaries(
    lengths: np.ndarray, longest: int, buckets: int, batch_size: int = 1
) -> list[int]:
    """At most `buckets` sizes, rising to `longest`, that pad `lengths` the least when each goes to the next size and
    the last batch of each is filled up; of several such choices one of the fewest sizes.
    """
    sizes, counts = np.unique(np.append(lengths, longest), return_counts=True)
    counts[-1] -= 1
    places, number = np.arange(len(sizes)), _starts(counts)
    # cost[i, j]: of all above sizes[i - 1] (i = 0: of all) and up to sizes[j], in one bucket
    cost = -(-(number[1:] - number[:-1, None]) // batch_size) * batch_size * sizes.astype(float)
    cost = np.where(places[:, None] <= places, cost, np.inf)
    best, chosen, whole_cost = (
        cost[0],
        [],
        [cost[0, -1]],
    )  # of all up to sizes[j], in one bucket more every round
    for _ in range(min(buckets, len(sizes)) - 1):
        through = np.append(np.inf, best[:-1])[:, None] + cost
        chosen.append(through.argmin(0))
        best = through.min(0)
        whole_cost.append(best[-1])
    last, boundaries = len(sizes) - 1, [longest]
    for split in reversed(chosen[: int(np.argmin(whole_cost))]):
        last = split[last] - 1
        boundaries.append(int(sizes[last]))
    return boundaries[::-1]


def _starts(counts: np.ndarray) -> np.ndarray:
    """i64 [n + 1]: how many come before each, and in all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
