"""A trained model, opened without the data that it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax import tasks
from rmjax.data.source import Description, id_array
from rmjax.io import paths
from rmjax.run import kept, parameters
from rmjax.run.description import description_of
from rmjax.serve.recommend import Best, Id, Names, Recommended, Recommender
from rmjax.serve.store import Streams, User
from rmjax.types import Array, Batch, Params, Task

if TYPE_CHECKING:
    from rmjax.data.texts.tokenizers import Tokenizer
    from rmjax.serve.ask import Reply


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model and the description of the data that it was trained on.

    A model never changes, so threads may share it. The stores that `streams` makes have their own
    rules for threads, see `Streams`.

    Attributes:
      config: the config of the run.
      task: the pure functions of the model, such as `memorize` and `answer`.
      params: the best parameters so far, f32 arrays on the device.
      description: the description of the data: number of items, vocabulary, kinds of question.
    """

    config: ConfigDict
    task: Task
    params: Params
    description: Description

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, in order of their ids; () if items are not words."""
        return self.description.vocabulary

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of a model of texts, which turns a text into ids; None for other models.

        Raises:
          ModuleNotFoundError: it is a tokenizer.json, and `tokenizers` is not installed.
        """
        from rmjax.data.texts.tokenizers import unpacked

        state = self.description.tokenizer
        return None if state is None else unpacked(state, self.vocabulary)

    @property
    def ids(self) -> np.ndarray | None:
        """The ids that the items had in the data, such as movieIds; None without such ids.

        An array [num_items] of integers, or of strings as objects.
        """
        numbering = self.description.numbering
        return id_array(numbering) if isinstance(numbering, tuple) else None

    @functools.cached_property
    def recommender(self) -> Recommender:
        """Recommends to many users at once; made on first use.

        Raises:
          ValueError: the model does not rank items.
        """
        return Recommender(self.task, self.params, self.names)

    @functools.cached_property
    def names(self) -> Names:
        """The ids of the items; their indices where the data had no ids."""
        return Names(np.arange(self.description.num_items) if self.ids is None else self.ids)

    def recommend(
        self,
        history: Sequence[Id] | Sequence[Sequence[Id]] = (),
        k: int = 10,
        exclude_seen: bool | None = None,
        *,
        store: Streams | None = None,
        users: Sequence[User] = (),
        exclude: Sequence[Sequence[Id]] | None = None,
    ) -> list[Recommended] | list[list[Recommended]]:
        """Recommends the next items, in the ids of the data.

        Items that the model does not know are left out of histories; a warning names them.

        Args:
          history: a user's items, the oldest first; or a list of such histories, one for each user.
            Lists, tuples, arrays and columns of data frames are taken. An empty list is the history
            of one user without items.
          k: how many items.
          exclude_seen: whether the items of a history are left out. None: as in the evaluation, see
            `description.questions.exclude_seen`. A store cannot do it, so it needs `exclude`.
          store: of live streams, in place of histories; made by `streams`, filled by `write`.
          users: of the store.
          exclude: for a store: the items that each user has, which are left out. A stream keeps no
            list of its items. None: no item is left out.

        Returns:
          The best items, each with its score, the best one first. A list of such lists for several
          histories or for users.

        Raises:
          ValueError: the model does not rank items, k is out of range, a history is a text, or
            histories and a store are given together.
        """
        ranked, entries = self.recommender, _listed(history)
        if store is not None:
            if entries:
                cure = "append items with model.write(store, users, histories) first"
                raise ValueError(f"history and store are given, but a store has its own: {cure}")
            if exclude_seen and exclude is None:
                cure = "give the items of each user as exclude=[[...], ...]"
                raise ValueError(f"exclude_seen: a store keeps no list of seen items: {cure}")
            seen = exclude if exclude is None else self._known(exclude)
            return ranked.named(Best(*store.recommend(users, k, seen)))
        if len(users) or exclude is not None:
            raise ValueError("users and exclude belong to a store: give store=... with them")
        several = bool(entries) and np.ndim(entries[0]) > 0
        known = self._known(entries if several else [entries])
        rows = ranked.named(ranked.best(known, k, exclude_seen))
        return rows if several else rows[0]

    def write(
        self,
        store: Streams,
        users: Sequence[User],
        histories: Sequence[Sequence[Id]],
        expected_lengths: Sequence[int | None] | None = None,
    ) -> list[int]:
        """Appends items to the streams of users, in the ids of the data.

        `Streams.write` takes indices of items instead. Items that the model does not know are left
        out; a warning names them.

        Args:
          store: made by `streams`.
          users: [n] users, as in `Streams.write`.
          histories: n lists of items, the oldest first.
          expected_lengths: as in `Streams.write`.

        Returns:
          n lengths, of each stream after its items.

        Raises:
          ValueError: a history is a text, or as `Streams.write`.
          OSError: as `Streams.write`.
          RuntimeError: as `Streams.write`.
        """
        return store.write(users, self._known(histories), expected_lengths)

    def _known(self, histories: Sequence[Sequence[Id]]) -> list[np.ndarray]:
        """The indices of the known items of each history; a warning names the others."""
        lists = [_listed(history) for history in histories]
        indices = [self.names.indices(ids) for ids in lists]
        unknown = [
            one
            for ids, places in zip(lists, indices, strict=True)
            for one, place in zip(ids, places.tolist(), strict=True)
            if place < 0
        ]
        if unknown:
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            text = "%d items are unknown to the model, so left out: %s"
            logging.warning(text, len(unknown), shown)
        return [places[places >= 0] for places in indices]

    def streams(self, **options: Any) -> Streams:
        """Opens a store of live streams of many users.

        Args:
          **options: the keyword arguments of `Streams`, such as store and capacity.

        Returns:
          The store: empty, or with the streams of the database `store`. It may be used from any
          thread, but not from a forked process.

        Raises:
          ValueError: an option or the database does not fit, see `Streams`.
          RuntimeError: another process writes to the database.
          OSError: the database cannot be written to.
        """
        return Streams(self.task, self.params, **options)

    @overload
    def ask(
        self,
        story: str | Sequence[str],
        question: str,
        choices: Sequence[str] | None = None,
        k: int = 5,
    ) -> Reply: ...

    @overload
    def ask(
        self,
        story: str | Sequence[str],
        question: list[str] | tuple[str, ...],
        choices: Sequence[str] | None = None,
        k: int = 5,
    ) -> list[Reply]: ...

    def ask(
        self,
        story: str | Sequence[str],
        question: str | list[str] | tuple[str, ...],
        choices: Sequence[str] | None = None,
        k: int = 5,
    ) -> Reply | list[Reply]:
        """Answers questions in words about a story in words.

            model.ask(["Mary went to the hall.", "She took a map."], "Where is Mary?")

        The answers are those of evaluation after the same story. The model reads the story as the
        source of its training data does. A text is split into sentences.

        Args:
          story: sentences, or a text.
          question: one question, or several, which are asked at the end of the story.
          choices: the answers to choose from. A model whose answers are classes takes all of its
            classes without them.
          k: most answers of a question.

        Returns:
          The reply, or the list of replies to several questions. A reply has the k best answers
          with their probabilities, and the words that the model does not know.

        Raises:
          ValueError: the model does not read words; the story or a question has no words; a choice
            is no class; or `k` is below 1.
        """
        from rmjax.serve.ask import ask

        if isinstance(question, str):
            return ask(self, story, [question], choices, k)[0]
        return ask(self, story, question, choices, k)

    @overload
    def generate(
        self,
        prompt: str,
        tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Continues a text with a language model.

            model.generate("It was", tokens=200, temperature=0.8, top_p=0.9)

        The memory is carried on from segment to segment, as in training. The token at position i of
        a text is drawn with fold_in(seed, i). So a text does not depend on the prompts beside it.

        Args:
          prompt: the first words of a text, or several such texts.
          tokens: number of tokens to draw.
          temperature: divides the logits before a draw; 0: always the likeliest token.
          top_p: draws among the likeliest tokens whose probabilities add up to this number
            (nucleus sampling, Holtzman et al. 2020); 1: among all.
          seed: of the draws.

        Returns:
          The text after the prompt, or the list of texts after several prompts. `stream` yields a
          text piece by piece.

        Raises:
          ValueError: the model is no language model; a prompt has no token, or has characters or
            words that the model does not know; or a number is out of range.
        """
        from rmjax.serve.sampling import complete

        options = tokens, temperature, top_p, seed
        if isinstance(prompt, str):
            return complete(self, [prompt], *options)[0]
        return complete(self, prompt, *options)

    def stream(
        self,
        prompt: str,
        tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continues a text as `generate` does, and yields it piece by piece.

        Args:
          prompt: as in `generate`, but one text.
          tokens: as in `generate`.
          temperature: as in `generate`.
          top_p: as in `generate`.
          seed: as in `generate`.

        Returns:
          An iterator of the next characters. A piece ends with a complete character.

        Raises:
          ValueError: as `generate`.
        """
        from rmjax.serve.sampling import stream

        return stream(self, prompt, tokens, temperature, top_p, seed)

    @functools.cached_property
    def scores(self) -> Callable[[Params, Batch], Array]:
        """`task.scores`, compiled."""
        return jax.jit(self.task.scores)

    @functools.cached_property
    def word_ids(self) -> dict[str, int]:
        """The id of each word of the vocabulary."""
        return {word: i for i, word in enumerate(self.vocabulary)}


def _listed(history: Any) -> list[Any]:
    """The entries of a list, an array or a column of a data frame.

    Raises:
      ValueError: it is one item.
    """
    if isinstance(history, str | int | np.integer):
        raise ValueError(f"a history is {history!r}: give a list of items, such as [{history!r}]")
    return list(history)


def open_model(workdir: str | Path, task: Task | None = None) -> Model:
    """Opens a trained model from its workdir, in any folder of any machine, without its data.

    A workdir of an earlier version has no data.json. This call then needs the data once, and writes
    data.json. Otherwise nothing is written, so threads and processes may open the same workdir.

    Args:
      workdir: where the model was trained; the run may still be writing to it.
      task: the task that `rmjax.fit` was given; None if the task follows from the config.

    Returns:
      The model, with the best parameters so far, on the default device.

    Raises:
      FileNotFoundError: the workdir has no trained model; or the data are needed and are missing.
      ValueError: a file of the workdir was changed or damaged; names the file. Or the workdir is a
        URL.
    """
    folder = paths.resolve_checkpoint(workdir, "workdir")
    config, _ = kept.read_config(folder)
    description = description_of(config, folder)
    made = tasks.make_task(config, description) if task is None else task
    return Model(config, made, jax.device_put(parameters.read_model(folder, made)), description)
