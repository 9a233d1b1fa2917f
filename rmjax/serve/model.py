"""A trained model, opened without the data it was trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rmjax import tasks
from rmjax.data.source import Description
from rmjax.io import paths
from rmjax.run import kept, parameters
from rmjax.run.description import description_of
from rmjax.serve.store import Streams
from rmjax.types import Params, Task

if TYPE_CHECKING:
    from rmjax.data.texts.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """What a run has learned, and what it is about.

    Attributes:
      config: of the run.
      task: the functions, such as `memorize` and `answer`.
      params: the best parameters so far, on the device.
      description: of the data.
    """

    config: Any
    task: Task
    params: Params
    description: Description

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, by id; () where items are no words."""
        return self.description.vocabulary

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What makes ids of a text, of a model of texts.

        Raises:
          ModuleNotFoundError: it is a tokenizer.json, and `tokenizers` is not installed.
        """
        from rmjax.data.texts.tokenizers import unpacked

        state = self.description.tokenizer
        return None if state is None else unpacked(state, self.vocabulary)

    @property
    def ids(self) -> np.ndarray | None:
        """The ids from outside of the items, such as movieIds [num_items]; None where they have none."""
        numbering = self.description.numbering
        return np.array(numbering) if isinstance(numbering, tuple) else None

    def streams(self, **options: Any) -> Streams:
        """Live streams of many users.

        Args:
          **options: as of `Streams`.

        Raises:
          ValueError: as `Streams`.
        """
        return Streams(self.task, self.params, **options)


def open_model(workdir: str | Path, task: Task | None = None) -> Model:
    """A trained model, for any folder and any machine: it needs its workdir, and no data.

    A workdir of an earlier version has no data.json. Its data are then needed once, and data.json is written.

    Args:
      workdir: where it was trained; its run may still be writing there.
      task: of a run that `fit` was given a task for.

    Returns:
      The model, with the best parameters so far.

    Raises:
      FileNotFoundError: nothing was trained there, or the data are needed and are gone.
      ValueError: a file there was changed.
    """
    folder = paths.resolve_checkpoint(workdir, "workdir")
    config, _ = kept.read_config(folder)
    description = description_of(config, folder)
    made = tasks.make_task(config, description) if task is None else task
    return Model(config, made, jax.device_put(parameters.read_model(folder, made)), description)
