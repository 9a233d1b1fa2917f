"""Stories of words: a builder that stores them, and a source that reads them.

Questions are asked along a story or at its end.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from rmjax.data import records
from rmjax.data.source import Examples, Questions, Source
from rmjax.io.progress import watch

UNKNOWN = "<unk>"  # id 0
_ASCII_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*", re.ASCII)
_SENTENCE_END = re.compile(  # escapes: the ellipsis, closing quotes, full stops of CJK
    "(?<=[.!?\u2026])[\"'\u2019\u201d\u00bb)\\]]*\\s+|(?<=[\u3002\uff01\uff1f])|\\n\\s*\\n"
)


def tokenize(text: str) -> list[str]:
    """Splits a text into words and numbers in lower case.

    A word is a run of letters, digits, combining marks and the joiners U+200C and U+200D. It begins
    with a letter or a digit. An apostrophe inside a word belongs to the word; other punctuation is
    dropped. Composed and decomposed texts give the same words.

    Args:
      text: any text, in any script.

    Returns:
      The words, interned.
    """
    if text.isascii():
        words = _ASCII_WORD.findall(text.lower())
    else:
        words = _word().findall(fold(text).replace("_", " "))
    return [sys.intern(word) for word in words]


def fold(text: str) -> str:
    """Puts a text into the form in which words are compared.

    The form is NFC in lower case, without soft hyphens, with "'" in place of U+2019. The dotted
    capital I becomes i: Unicode's lower case adds U+0307, which nobody writes.

    Args:
      text: any text.

    Returns:
      The folded text.
    """
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFC", text.replace("\u00ad", "")).lower()
    text = text.replace("i\u0307", "i").replace("\u2019", "'")
    # J with a caron is a single character in lower case only, so the text is composed again.
    return unicodedata.normalize("NFC", text)


@functools.cache
def _word() -> re.Pattern[str]:
    """The pattern of a word of any script, in text without "_". `re` has no class of marks."""
    marks = (point for point in range(0x300, 0xE01F0) if unicodedata.category(chr(point))[0] == "M")
    grouped = itertools.groupby(enumerate(marks), lambda pair: pair[1] - pair[0])
    runs = [list(run) for _, run in grouped]
    ranges = "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)
    run = rf"[^\W_][\w{ranges}\u200c\u200d]*"
    return re.compile(f"{run}(?:'{run})*")


def split_text(text: str) -> list[str]:
    """Splits a text into sentences.

    A sentence ends after '.', '!', '?' or an ellipsis before white space; closing quotes and
    brackets may stand between. It also ends after a full stop of Chinese and Japanese, and at an
    empty line. An abbreviation such as 'Mr.' ends a sentence too.

    Args:
      text: any text.

    Returns:
      The sentences that have words, in order.
    """
    return [part for part in _SENTENCE_END.split(text) if tokenize(part)]


def sentences_of(story: str | Sequence[str]) -> list[list[str]]:
    """The words of each sentence of a story; `split_text` splits a text."""
    return [tokenize(part) for part in (split_text(story) if isinstance(story, str) else story)]


def cut(sentences: Sequence[list[str]], segment_length: int) -> list[list[str]]:
    """Cuts sentences of more than `segment_length` words into several segments."""
    steps = ((words, range(0, len(words), segment_length)) for words in sentences)
    return [words[i : i + segment_length] for words, places in steps for i in places]


def equal_pair(texts: Sequence[str]) -> tuple[str, str] | None:
    """Finds two texts with the same words, such as "Mill" and "mill!".

    Args:
      texts: any texts.

    Returns:
      The first such pair; None if all texts differ.
    """
    before: dict[tuple[str, ...], str] = {}
    for text in texts:
        words = tuple(tokenize(text))
        if words in before:
            return before[words], text
        before[words] = text
    return None


def make_vocabulary(counts: Counter[str], min_count: int = 1) -> list[str]:
    """Lists the words that occur often enough.

    Args:
      counts: how often each word occurs.
      min_count: words that occur less often are left out.

    Returns:
      The words by id: '<unk>' first, then by falling count; words of equal count are sorted.
    """
    words = (word for word, count in counts.items() if count >= min_count)
    return [UNKNOWN, *sorted(words, key=lambda word: (-counts[word], word))]


class Story(NamedTuple):
    """One story in words, with S sentences and Q questions.

    The last four fields are empty where a data set does not have them.
    """

    sentences: list[list[str]]  # [S] words
    questions: list[list[str]]  # [Q] words
    position: list[int]  # [Q] number of sentences before the question
    target: list[int]  # [Q] the class of the answer, or the index of the right choice
    group: Sequence[int] = ()  # [Q] the group that the question is reported with
    also: Sequence[int] = ()  # [Q] a second right choice, or -1
    candidates: Sequence[Sequence[str]] = ()  # [A] words of the story's candidate answers
    choices: Sequence[Sequence[int]] = ()  # [Q] indices of the candidates to choose from


class TextBuilder(records.StreamBuilder):
    """A builder whose records are stories as word ids.

    A list of lists is stored as one flat list and a list of lengths. A subclass implements
    `stories`, and extends `fields` by what else its stories have. It may fill two entries of
    `info.metadata`: "classes" (the answers by number) and "groups" (the names by number).

    Attributes:
      fields: names of the arrays in a record.
      choice_fields: further fields of a data set with candidate answers.
      counted: splits whose words make the vocabulary.
    """

    fields: tuple[str, ...] = ("words", "sentences", "question_words", "question_lengths")
    fields += ("position", "target")
    choice_fields = ("candidate_words", "candidate_lengths", "choices", "choice_counts")
    counted: tuple[str, ...] = ("train",)
    VERSION = tfds.core.Version("1.1.0")

    def stories(self) -> dict[str, list[Story]]:
        """Returns the stories of each split."""
        raise NotImplementedError

    def check_ids(self, splits: Mapping[str, list[Story]], ids: Mapping[str, int]) -> None:
        """May look at the stories once the words have ids, to note in the metadata what it finds.

        Args:
          splits: {split: stories}.
          ids: {word: id}; other words have the id 0.
        """

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
        self.check_ids(splits, ids)
        return {split: self._generate_examples(stories, ids) for split, stories in splits.items()}

    def _generate_examples(
        self, stories: list[Story], ids: dict[str, int]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        def flat(sentences):
            return [ids.get(word, 0) for sentence in sentences for word in sentence]

        def lengths(lists):
            return [len(entries) for entries in lists]

        for key, story in enumerate(stories):
            # An answer of punctuation alone has no word. It becomes an unknown word, so that it
            # can still be chosen.
            questions = [words or [UNKNOWN] for words in story.questions]
            candidates = [words or [UNKNOWN] for words in story.candidates]
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
    """A source over the records of a `TextBuilder`, held in RAM.

    An example is a story with all its questions. A segment is a sentence; a sentence of more than
    `segment_length` words is cut into several segments. Every fetch has the same shapes, those of
    the largest story of all splits.

    Args:
      directory: folder that `records.prepare` returned.
      segment_length: most words of a segment, N.
      metric: name of the score in the final table.
      positions_at_end: whether every question comes after the last sentence.
      per_question: makes every question an example of its own, after the sentences before it.
      max_sentences: keeps only this many of the last sentences before the last question; 0 keeps
        all. A question that comes before all the kept sentences is asked of an empty memory.
      buckets: most sizes that streams are padded to.
      groups: keeps the stories of these groups; () keeps all. The vocabulary does not change.

    Attributes:
      metadata: what the builder stored beside the records.
      vocabulary: the words by id.
      classes: the answers by number; empty where a question has choices.
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
        classes = len(self.classes)
        self.questions = Questions(query="words", answer=answer, classes=classes, metric=metric)
        self._splits = {}
        for split, data in stored.items():
            rows = data.__getitems__(range(len(data)))
            rows = [row for row in rows if not kept or int(row["group"][0]) in kept]
            self._splits[split] = _Split(rows, segment_length, per_question, max_sentences)
        splits = list(self._splits.values())
        self.max_items = max(int(split.num_words().max()) for split in splits)
        self.num_queries = max(int(split.num_questions().max()) for split in splits)
        names = splits[0].ragged
        self._width = {name: max(split.ragged[name].width for split in splits) for name in names}
        self._width["items"] = segment_length
        longest = max(int(split.num_segments().max()) for split in splits)
        self._boundaries = bucket_boundaries(self._splits["train"].num_segments(), longest, buckets)
        self._num_candidates = max(int(split.num_candidates().max()) for split in splits)

    def size(self, split: str) -> int:
        """See `Source.size`."""
        return len(self._splits[split].story)

    def stream_id(self, split: str) -> np.ndarray:
        """i64 [size]: the story of each example."""
        return self._splits[split].story

    def buckets(self, split: str) -> tuple[np.ndarray, list[int]]:
        """See `Source.buckets`. The segments T of each bucket are the same for every split."""
        lengths = self._splits[split].num_segments()
        return np.searchsorted(self._boundaries, lengths), self._boundaries

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """{name: bool [size, Q]}: the questions of each group that has any."""
        names = self.metadata["groups"]
        if not names:
            return {}
        group, asked = self._question_values(split, "group", np.arange(self.size(split)))
        masks = {name: asked & (group == number) for number, name in enumerate(names)}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def also(self, split: str) -> np.ndarray:
        """Integers [size, Q]: a second right choice of each question, or -1."""
        if "also" not in self._splits[split].question_values:
            return np.full((self.size(split), self.num_queries), -1)
        also, asked = self._question_values(split, "also", np.arange(self.size(split)))
        return np.where(asked, also, -1)

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """See `Source.fetch`. The streams come in segments."""
        s, T, Q = self._splits[split], self._boundaries[-1], self.num_queries
        begin, end = s.first_sentence[indices], s.last_sentence[indices]
        items, item_mask = self._pad(s, "items", begin, end, T)
        first, last = s.first_question[indices], s.last_question[indices]
        query, word_mask = self._pad(s, "query", first, last, Q)
        target, query_mask = self._question_values(split, "target", indices)
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
            written, _ = self._question_values(split, "segments_before", indices)
            since = np.maximum(written - s.ragged["items"].rows[begin][:, None], 0)
            examples["position"] = np.where(query_mask, since, 0).astype(np.int32)
        if "choices" in s.ragged:
            story, A = s.story[indices], self._num_candidates
            bounds = s.candidates_before[story], s.candidates_before[story + 1]
            pool = self._pad(s, "candidates", *bounds, A)
            examples["candidates"], examples["candidate_mask"] = pool
            examples["choices"], examples["choice_mask"] = self._pad(s, "choices", first, last, Q)
        return examples

    def _pad(
        self, s: _Split, name: str, first: np.ndarray, last: np.ndarray, height: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return s.ragged[name].padded(first, last, height, self._width[name])

    def _question_values(
        self, split: str, name: str, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One value per question [B, Q], padded with 0, and the mask of the questions."""
        s = self._splits[split]
        place = s.first_question[indices][:, None] + np.arange(self.num_queries)
        asked = place < s.last_question[indices][:, None]
        return np.where(asked, s.question_values[name][np.where(asked, place, 0)], 0), asked


class _Split:
    """The records of one split as flat arrays, with the bounds of each of E examples in them.

    Bounds count sentences and questions from the start of the split. "last" is one past the end.
    """

    story: np.ndarray  # i64 [E], as all below
    first_sentence: np.ndarray
    last_sentence: np.ndarray
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

        def before(name):  # entries of `name` before each story, then the total
            return _starts(np.array([len(row[name]) for row in rows]))

        segments = -(-flat["sentences"] // segment_length)
        self.ragged = {
            "items": _Ragged(flat["words"], flat["sentences"], segments),
            "query": _Ragged(flat["question_words"], flat["question_lengths"]),
        }
        sentences, questions = before("sentences"), before("target")
        self.candidates_before = np.zeros_like(sentences)
        if "choices" in flat:
            self.ragged["candidates"] = _Ragged(flat["candidate_words"], flat["candidate_lengths"])
            self.ragged["choices"] = _Ragged(flat["choices"], flat["choice_counts"])
            self.candidates_before = before("candidate_lengths")
        story_of_question = np.repeat(np.arange(len(rows)), np.diff(questions))
        # Sentences of the split before each question.
        asked_at = sentences[story_of_question] + flat["position"]
        self.question_values: dict[str, np.ndarray] = {
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
            latest = self.last_sentence - max_sentences
            self.first_sentence = np.maximum(self.first_sentence, latest)

    def num_words(self) -> np.ndarray:
        """i64 [E]."""
        starts = self.ragged["items"].starts
        return starts[self.last_sentence] - starts[self.first_sentence]

    def num_questions(self) -> np.ndarray:
        """i64 [E]."""
        return self.last_question - self.first_question

    def num_segments(self) -> np.ndarray:
        """i64 [E], at least 1: an empty story has one empty segment."""
        rows = self.ragged["items"].rows
        return np.maximum(rows[self.last_sentence] - rows[self.first_sentence], 1)

    def num_candidates(self) -> np.ndarray:
        """i64 [stories]."""
        return np.diff(self.candidates_before)


class _Ragged:
    """Lists of numbers, stored one after another.

    In a padded array a list fills one row, or several rows where `rows` says so.
    """

    def __init__(self, values: np.ndarray, lengths: np.ndarray, rows: np.ndarray | None = None):
        self.values, self.width = values, int(lengths.max(initial=1))
        self.starts = _starts(lengths)  # values before each list, then the total
        rows = np.ones_like(lengths) if rows is None else rows
        self.rows = _starts(rows)  # rows before each list, then the total
        self.place = np.arange(len(values)) - np.repeat(self.starts[:-1], lengths)
        self.row = np.repeat(self.rows[:-1], lengths)

    def padded(
        self, first: np.ndarray, last: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pads the lists from `first` [B] to before `last` [B].

        A list longer than `width` continues in its next row.

        Returns:
          i32 [B, height, width] and its mask.
        """
        start, count = self.starts[first], self.starts[last] - self.starts[first]
        example = np.repeat(np.arange(len(first)), count)
        index = np.arange(len(example)) + (start - _starts(count)[:-1])[example]
        row = (self.row[index] - self.rows[first][example]) + example * height
        cell = row * width + self.place[index]
        shape = (len(first), height, width)
        array, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        array.reshape(-1)[cell], mask.reshape(-1)[cell] = self.values[index], True
        return array, mask


def bucket_boundaries(
    lengths: np.ndarray, longest: int, buckets: int, batch_size: int = 1
) -> list[int]:
    """Chooses the bucket sizes that minimise padding.

    A stream is padded to the next size. The copies that fill the last batch of each bucket count
    as padding. Among equally good choices one with the fewest sizes is taken.

    Args:
      lengths: integers [n], segments of each stream.
      longest: the largest size, at least the maximum of `lengths`.
      buckets: most sizes.
      batch_size: examples of a batch.

    Returns:
      At most `buckets` sizes, rising to `longest`.
    """
    sizes, counts = np.unique(np.append(lengths, longest), return_counts=True)
    counts[-1] -= 1
    places, number = np.arange(len(sizes)), _starts(counts)
    # cost[i, j]: cells of one bucket with all streams above sizes[i - 1] and up to sizes[j];
    # with i = 0 there is no lower bound.
    cost = -(-(number[1:] - number[:-1, None]) // batch_size) * batch_size * sizes.astype(float)
    cost = np.where(places[:, None] <= places, cost, np.inf)
    # best[j]: least cells of all streams up to sizes[j]. Every round allows one bucket more.
    best, chosen, total_cost = cost[0], [], [cost[0, -1]]
    for _ in range(min(buckets, len(sizes)) - 1):
        through = np.append(np.inf, best[:-1])[:, None] + cost
        chosen.append(through.argmin(0))
        best = through.min(0)
        total_cost.append(best[-1])
    last, boundaries = len(sizes) - 1, [longest]
    for split in reversed(chosen[: int(np.argmin(total_cost))]):
        last = split[last] - 1
        boundaries.append(int(sizes[last]))
    return boundaries[::-1]


def _starts(counts: np.ndarray) -> np.ndarray:
    """i64 [n + 1]: the sum of the counts before each entry, then the sum of all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
