"""A trained model, opened without the data that it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax import tasks
from rmjax.data.source import Description, id_array
from rmjax.io import paths
from rmjax.run import kept, parameters
from rmjax.run.description import description_of
from rmjax.serve.recommend import Best, Id, Recommended, Recommender
from rmjax.serve.store import Streams, User
from rmjax.types import Params, Task

if TYPE_CHECKING:
    from rmjax.data.texts.tokenizers import Tokenizer


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
        return Recommender(self.task, self.params, self.ids)

    def recommend(
        self,
        history: Sequence[Id] | Sequence[Sequence[Id]] = (),
        k: int = 10,
        exclude_seen: bool = True,
        *,
        store: Streams | None = None,
        users: Sequence[User] = (),
        exclude: Sequence[Sequence[Id]] | None = None,
    ) -> list[Recommended] | list[list[Recommended]]:
        """Recommends the next items, in the ids of the data.

        Items that the model does not know are left out of histories; a warning names them.

        Args:
          history: a user's items, the oldest first; or a list of such histories, one for each user.
          k: how many items.
          exclude_seen: whether the items of a history are left out.
          store: of live streams, in place of histories; made by `streams`.
          users: of the store.
          exclude: for a store: the items that each user has, which are left out. A stream keeps no
            list of its items. None: no item is left out.

        Returns:
          The best items, each with its score, the best one first. A list of such lists for several
          histories or for users.

        Raises:
          ValueError: the model does not rank items, or k is out of range.
        """
        ranked = self.recommender
        if store is not None:
            seen = exclude if exclude is None else [self._known(items) for items in exclude]
            return ranked.named(Best(*store.recommend(users, k, seen)))
        several = len(history) > 0 and not isinstance(history[0], str | int | np.integer)
        histories = [*history] if several else [history]
        known = [self._known(items) for items in cast("list[Sequence[Id]]", histories)]
        rows = ranked.named(ranked.best(known, k, exclude_seen))
        return rows if several else rows[0]

    def _known(self, ids: Sequence[Id]) -> np.ndarray:
        """The indices of the known items; a warning names the others."""
        known, unknown = self.recommender.indices(ids)
        if unknown:
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            logging.warning(
                "%d items are unknown to the model, so left out: %s", len(unknown), shown
            )
        return known

    def streams(self, **options: Any) -> Streams:
        """Opens a store of live streams of many users.

        Args:
          **options: the keyword arguments of `Streams`: capacity, batches, segments, queries,
            folder.

        Returns:
          The store: empty, or with the streams of `folder`. It may be used from any thread, but not
          from a forked process.

        Raises:
          ValueError: an option or the folder does not fit, see `Streams`.
          RuntimeError: another store owns the folder.
          OSError: the disk has no room for the rows.
        """
        return Streams(self.task, self.params, **options)


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
