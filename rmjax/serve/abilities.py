"""What a trained model can do; a call that it cannot answer names the calls that it can."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ml_collections import ConfigDict

from rmjax.data.source import Description
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Task


class Able(Protocol):
    """What is needed of a model to know what it can do, see `rmjax.Model`."""

    @property
    def config(self) -> ConfigDict:
        """The config of the run."""

    @property
    def task(self) -> Task:
        """The pure functions of the model."""

    @property
    def description(self) -> Description:
        """The description of the data."""


class Ability(NamedTuple):
    """One thing that some models can do."""

    words: str  # what it is
    call: str  # how to ask for it
    card: str  # a config that trains such a model


ABILITIES = {
    "recommend": Ability("recommend items", "model.recommend(history)", "clicks"),
    "streams": Ability(
        "keep live streams of items",
        "store = model.streams(), store.write(users, items), store.answer(users, queries)",
        "xlong",
    ),
    "ask": Ability("answer questions in words", "model.ask(story, question)", "stories"),
    "generate": Ability("continue a text", "model.generate(prompt)", "books"),
}


def abilities(model: Able) -> tuple[str, ...]:
    """What a model can do.

    Args:
      model: a trained model.

    Returns:
      Names in `ABILITIES`; () for a model that takes batches only.
    """
    data, task = model.description, model.task
    if data.endless:
        return () if data.tokenizer is None else ("generate",)
    if not isinstance(task, Reasoning):
        return ()
    if data.questions.query == "words":
        words = data.vocabulary and not (data.feature_width or data.questions.words)
        return ("ask",) if words else ()
    if task.table is None:
        return ()
    return ("streams",) if task.answers.ranking is None else ("recommend", "streams")


def require(model: Able, name: str) -> None:
    """Checks that a model can do something.

    Args:
      model: a trained model.
      name: in `ABILITIES`.

    Raises:
      ValueError: it cannot; names what it can do, the call, and a config for the other.
    """
    able = abilities(model)
    if name in able:
        return
    carries = model.task.carries
    call = "measure(model.params, carry, batch)" if carries else "scores(model.params, batch)"
    can = " and ".join(f"{ABILITIES[one].words} ({ABILITIES[one].call})" for one in able)
    can = can or f"answer the questions of a batch (model.task.{call})"
    words, _, card = ABILITIES[name]
    raise ValueError(
        f"a model of {model.config.data.name} cannot {words}. It can {can}. To {words}, train a "
        f"model with a config such as --config=configs/{card}.py"
    )
