"""Questions in words: a story is written into a memory, and questions are answered from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from rmjax.data import settings_of
from rmjax.data.stories.text import UNKNOWN, cut, equal_pair, sentences_of, tokenize
from rmjax.registry import SOURCES
from rmjax.serve.abilities import Able, require
from rmjax.tasks.answers import questions_only
from rmjax.types import Array, Batch, Params


class Reader(Able, Protocol):
    """What is needed of a model to ask it in words, see `rmjax.Model`."""

    @property
    def params(self) -> Params:
        """The parameters of the task."""

    @property
    def scores(self) -> Callable[[Params, Batch], Array]:
        """`Task.scores`, compiled."""

    @property
    def word_ids(self) -> dict[str, int]:
        """The id of each word of the vocabulary."""


class Answer(NamedTuple):
    """One answer; the probabilities of all answers to a question add up to 1."""

    answer: str
    probability: float


class Reply(NamedTuple):
    """The reply to one question.

    Attributes:
      question: the question.
      answers: the best answers, by falling probability.
      unknown: words of the story, the question and the choices that the model does not know. It
        reads all of them as one word, '<unk>'.
    """

    question: str
    answers: tuple[Answer, ...]
    unknown: tuple[str, ...]


def ask(
    model: Reader,
    story: str | Sequence[str],
    questions: Sequence[str],
    choices: Sequence[str] | None = None,
    k: int = 5,
) -> list[Reply]:
    """Answers questions about a story, see `Model.ask`.

    Sizes are padded to powers of two, so stories of many lengths share a few compiled shapes.

    Args:
      model: a trained model.
      story: as in `Model.ask`.
      questions: one question or more.
      choices: as in `Model.ask`.
      k: as in `Model.ask`.

    Returns:
      One reply for each question.

    Raises:
      ValueError: as `Model.ask`.
    """
    require(model, "ask")
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")
    if not questions:
        raise ValueError("no question: give a question, or a list of one or more")
    segments = read_story(model, story)
    asked = [_words(question, "a question") for question in _strings(questions, "question")]
    answers = list(model.description.classes) if choices is None else list(choices)
    _check_answers(model, choices)
    of_choices = model.description.questions.answer == "choice"
    # The builder of the training data stores a choice without words in the same way.
    pool = [tokenize(answer) or [UNKNOWN] for answer in answers] if of_choices else []
    logits = model.scores(model.params, _batch(model, segments, asked, pool))
    picked = np.asarray(logits, np.float64)[0, : len(asked)]
    if of_choices:
        picked = picked[:, : len(answers)]
    else:
        number = {name: i for i, name in enumerate(model.description.classes)}
        picked = picked[:, [number[answer] for answer in answers]]
    odds = np.exp(picked - picked.max(-1, keepdims=True))
    probabilities = odds / odds.sum(-1, keepdims=True)
    replies = []
    for question, words, row in zip(questions, asked, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:k]
        unknown = dict.fromkeys(
            word
            for part in (*segments, words, *pool)
            for word in part
            if word not in model.word_ids
        )
        chosen = tuple(Answer(answers[i], float(row[i])) for i in best)
        replies.append(Reply(question, chosen, tuple(unknown)))
    return replies


def read_story(model: Reader, story: str | Sequence[str]) -> list[list[str]]:
    """The words of each segment that a model reads of a story.

    Args:
      model: a trained model.
      story: as in `Model.ask`.

    Returns:
      The segments, each with one word or more.

    Raises:
      ValueError: the story has no words, or is no text.
    """
    story = story if isinstance(story, str) else _strings(story, "story")
    length = model.config.data.segment_length
    name = model.config.data.name
    settings: Any = settings_of(model.config.data) if SOURCES.asks_in_words(name) else None
    if hasattr(settings, "sentences"):
        sentences = settings.sentences(story, length)
    else:  # a source from outside of the package
        sentences = sentences_of(story)
    segments = cut(sentences, length)
    if not segments:
        raise ValueError(f"the story {story!r} has no words: give a text, or a list of sentences")
    return segments


def _strings(texts: Sequence[str], name: str) -> list[str]:
    """The texts as a list, if all of them are texts."""
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} has {text!r} in it: give a text, or a list of texts")
    return texts


def _words(text: str, name: str) -> list[str]:
    words = tokenize(text)
    if not words:
        raise ValueError(f"{name} without words: {text!r}")
    return words


def _check_answers(model: Reader, choices: Sequence[str] | None) -> None:
    """Raises ValueError unless the choices fit the answers of the model."""
    if isinstance(choices, str) or (choices is not None and not choices):
        raise ValueError(f"choices = {choices!r}: give a list of one answer or more")
    if model.description.questions.answer == "choice":
        if choices is None:
            raise ValueError("this model chooses among the answers it is given: give choices")
        if pair := equal_pair(_strings(choices, "choices")):
            cure = "give choices that differ in their words, not only in signs or case"
            raise ValueError(f"the choices {pair[0]!r} and {pair[1]!r} have the same words: {cure}")
        return
    for choice in choices or ():
        if choices is not None and list(choices).count(choice) > 1:
            raise ValueError(f"the choice {choice!r} is given twice: give it once")
        if choice not in model.description.classes:
            some = ", ".join(model.description.classes[:8])
            raise ValueError(f"the choice {choice!r} is no answer of this model, such as {some}")


def _batch(
    model: Reader, segments: list[list[str]], asked: list[list[str]], pool: list[list[str]]
) -> Batch:
    """A batch of one story; its questions come at the end and share their choices."""
    query, word_mask = _padded(model, asked)
    fields = {"word_mask": word_mask}
    if pool:
        candidates, candidate_mask = _padded(model, pool)
        shape = (1, query.shape[1], candidates.shape[1])
        numbers = jnp.arange(shape[2])
        fields |= dict(
            candidates=candidates,
            candidate_mask=candidate_mask,
            choices=jnp.broadcast_to(numbers, shape),
            choice_mask=jnp.broadcast_to(numbers < len(pool), shape),
        )
    batch = questions_only(query, word_mask.any(-1), **fields)
    items, item_mask = _padded(model, segments, model.config.data.segment_length)
    return dataclasses.replace(batch, items=items, item_mask=item_mask)


def _padded(model: Reader, rows: list[list[str]], width: int = 0) -> tuple[Array, Array]:
    """The ids i32 [1, rows, width] of words, and their mask; sizes are powers of two.

    A `width` that is not 0 is taken as it is.
    """
    shape = (_power(len(rows)), width or _power(max(map(len, rows))))
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, words in enumerate(rows):
        ids[i, : len(words)] = [model.word_ids.get(word, 0) for word in words]
        mask[i, : len(words)] = True
    return jnp.asarray(ids[None]), jnp.asarray(mask[None])


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
