"""Each model does what its error says it can, and refuses the rest with that error."""

from __future__ import annotations

import functools

import pytest

from rmjax import tasks
from rmjax.data.source import Description, Questions
from rmjax.serve import Model
from rmjax.serve.abilities import ABILITIES
from tests.runs import PLAIN, compilations_kept, tiny
from tests.serve.test_generate import model_of
from tests.small import noise
from tests.tasks.test_sequences import SMALL

WORDS = Questions("words", answer="class", classes=2, metric="accuracy")
NAMES = dict(vocabulary=("<unk>", "ann", "went", "where"), classes=("mill", "barn"))
CLASSES = Questions("kind", 1, answer="class", classes=2, metric="accuracy")
KINDS = {  # name of the data: their description, and the abilities of a model of them
    "table": (Description(9, 40, 2, questions=Questions("kind", 1, answer="item")), "recommend"),
    "movielens": (Description(9, 40, 2), "streams"),
    "synthetic": (Description(9, 40, 2, questions=CLASSES, classes=NAMES["classes"]), "streams"),
    "stories": (Description(4, 40, 2, questions=WORDS, **NAMES), "ask"),
    "activitynet": (
        Description(0, 40, 2, questions=WORDS._replace(words=4), feature_width=3, **NAMES),
        "scores",
    ),
    "sorting": (Description(9, 40, 2, questions=CLASSES), "scores"),
    "hyperpartisan": (Description(9, 40, 1, questions=CLASSES, max_segments=3), "scores"),
    "books": (None, "generate"),
}
CALLS = {
    "recommend": lambda model: model.recommend([1, 2], k=3),
    "streams": lambda model: model.streams(capacity=2),
    "ask": lambda model: model.ask("Ann went.", "Where?"),
    "generate": lambda model: model.generate("abc", tokens=2),
    "stream": lambda model: model.stream("abc", tokens=2),
}
DOES = {"recommend": ("recommend", "streams"), "scores": (), "generate": ("generate", "stream")}


@pytest.fixture(autouse=True, scope="module")
def compiled(tmp_path_factory):
    with compilations_kept(tmp_path_factory.mktemp("compiled")):
        yield


@functools.cache
def model(name):
    if name == "books":
        return model_of("transformer")
    description, _ = KINDS[name]
    sequence = SMALL | {"model.kind": "bert" if name == "hyperpartisan" else "transformer"}
    keys = sequence if name in ("sorting", "hyperpartisan") else PLAIN | {"reason.head": "mlp"}
    config = tiny(**keys | {"data.name": name, "data.segment_length": 5})
    task = tasks.make_task(config, description)
    return Model(config, task, noise(task.init), description)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_answers_a_call_or_names_the_right_one(name, call):
    ability = KINDS[name][1]
    if call in DOES.get(ability, (ability,)):
        assert CALLS[call](model(name)) is not None
        return
    with pytest.raises(ValueError, match=f"a model of {name} cannot ") as error:
        CALLS[call](model(name))
    wanted = ABILITIES["generate" if call == "stream" else call]
    right = f"(model.task.{ability}(" if ability == "scores" else ABILITIES[ability].call
    assert f"cannot {wanted.words}. It can " in str(error.value)
    assert right in str(error.value) and f"configs/{wanted.card}.py" in str(error.value)
