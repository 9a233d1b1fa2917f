"""One mechanism for everything that comes in kinds: a name, its settings, and what makes it.

A kind is one file with a dataclass `Settings`, whose fields are `setting`s, and a function `make`; and one row
of a `Registry`. config.py makes flags of the settings of all kinds. Code outside this package registers its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Check(NamedTuple):
    """What values a field takes, and the words for it."""

    holds: Callable[[Any], bool]
    text: str


def names_in(names: str) -> list[str]:
    """What a key that names several kinds stands for: 'jsonl,wandb' -> ['jsonl', 'wandb']."""
    return [name.strip() for name in names.split(",") if name.strip()]


class KindOf(NamedTuple):
    """A check that the value names a kind of a registry, those included that are registered later.

    several: it names any number of different ones, with commas between.
    """

    registry: Mapping[str, Any]
    several: bool = False

    def holds(self, value: str) -> bool:
        """Whether every name is of a kind, and none comes twice."""
        names = names_in(value) if self.several else [value]
        return len({*names}) == len(names) and all(name in self.registry for name in names)

    @property
    def text(self) -> str:
        """The words for it."""
        return f"{'any' if self.several else 'one'} of {', '.join(self.registry)}"


class Field(NamedTuple):
    """One key. Its type is that of the default; an int will do for a float."""

    default: Any
    check: Check | KindOf
    doc: str


anything = Check(lambda value: True, "anything")


def at_least(low: float) -> Check:
    return Check(lambda value: value >= low, f"at least {low}")


def above(low: float) -> Check:
    return Check(lambda value: value > low, f"above {low}")


def between(low: float, high: float) -> Check:
    return Check(lambda value: low <= value <= high, f"from {low} to {high}")


def below(low: float, high: float) -> Check:
    return Check(lambda value: low <= value < high, f"from {low} to just below {high}")


def inside(low: float, high: float) -> Check:
    return Check(lambda value: low < value < high, f"above {low} and below {high}")


def one_of(*choices: str) -> Check:
    return Check(lambda value: value in choices, f"one of {', '.join(choices)}")


a_path = Check(
    lambda value: True, "the path of a file or folder"
)  # `config.validate` refuses addresses
a_workdir = Check(lambda value: True, "the path of a workdir")
a_seed = between(0, 2**32 - 1)  # JAX takes 32 bits of a seed: beyond, two seeds would be one


def kind_of(registry: Mapping[str, Any]) -> KindOf:
    """The name of a kind."""
    return KindOf(registry)


def kinds_of(registry: Mapping[str, Any]) -> KindOf:
    """Names of kinds, with commas between; none, too."""
    return KindOf(registry, several=True)


def setting(default: T, check: Check = anything, doc: str = "") -> T:
    """A field of a dataclass of settings: its default, what it may be, and what it means."""
    field: Any = dataclasses.field(default=default, metadata={"field": Field(default, check, doc)})
    return field


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Of kinds without keys of their own."""


def fields_of(settings: type) -> dict[str, Field]:
    """The fields of a dataclass of settings, by name."""
    return {field.name: field.metadata["field"] for field in dataclasses.fields(settings)}


def wrong(field: Field, value: Any) -> str | None:
    """What a value should have been, None where it is."""
    wanted = type(field.default)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if fits and (wanted is not float or math.isfinite(value)) and field.check.holds(value):
        return None
    return expected(field)


def expected(field: Field) -> str:
    """What a value is to be, in words."""
    kind = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}[
        type(field.default)
    ]
    return kind if field.check is anything else f"{kind}, {field.check.text}"


class Kind(NamedTuple):
    """What a name stands for."""

    settings: type
    make: Callable[..., Any]


class Registry(Mapping[str, Kind]):
    """Kinds by name. What is not asked for is not imported.

    Args:
      section: what its keys begin with in a config, such as 'machine'.
      rows: {name: module}; the module has `Settings` and `make`. Packages add rows by entry points of the group
        'rmjax.<section>'.
      maker: the name of that function, if it is another one.
    """

    def __init__(self, section: str, rows: Mapping[str, str], maker: str = "make"):
        self.section, self._maker = section, maker
        self._modules = {
            **rows,
            **{point.name: point.value for point in entry_points(group=f"rmjax.{section}")},
        }
        self._registered: dict[str, Kind] = {}

    def register(self, name: str, settings: type) -> Callable[[T], T]:
        """Decorates the `make` of a kind that is not part of this package.

        Raises:
          ValueError: the name is taken; or a field is no `setting`, or differs from another kind's of that name.
        """
        if name in self:
            raise ValueError(f"there is a {self.section} {name!r} already: take another name")
        bare = [
            field.name for field in dataclasses.fields(settings) if "field" not in field.metadata
        ]
        if bare:
            raise ValueError(
                f"{settings.__name__}.{bare[0]}: give it a default with rmjax.registry.setting(...)"
            )
        known = self.fields()
        for field, mine in fields_of(settings).items():
            if field in known and known[field].default != mine.default:
                theirs = f"config.{self.section}.{field} has the default {known[field].default!r} in another kind"
                raise ValueError(f"{settings.__name__}.{field}: {theirs}: take it, or another name")

        def add(make: T) -> T:
            self._registered[name] = Kind(settings, make)  # type: ignore[arg-type]
            return make

        return add

    def fields(self) -> dict[str, Field]:
        """The fields of all kinds; those of one name are one key."""
        return {
            name: field
            for kind in self.values()
            for name, field in fields_of(kind.settings).items()
        }

    def settings(
        self, name: str, values: Mapping[str, Any], prefix: str = "", config: Any = None
    ) -> Any:
        """The settings of a kind, from values among which there may be others.

        A dataclass of settings may have a method `conflicts(config)`, which yields what is wrong with values that are
        right one by one: "{heads} must divide {dim}".

        Args:
          prefix: stands before the names in errors, such as 'config.machine.'.
          config: of the whole run, where there is one.

        Raises:
          ValueError: no such kind; a value out of range, or in conflict with another.
        """
        settings, fields = self[name].settings, fields_of(self[name].settings)
        chosen = {field: values[field] for field in fields if field in values}
        for field, value in chosen.items():
            if must := wrong(fields[field], value):
                raise ValueError(f"{prefix}{field} = {value!r}: must be {must}")
        made = settings(**chosen)
        for message in made.conflicts(config) if hasattr(made, "conflicts") else ():
            raise ValueError(
                message.format(
                    **{field: f"{prefix}{field} = {getattr(made, field)}" for field in fields}
                )
            )
        return made

    def __getitem__(self, name: str) -> Kind:
        if name in self._registered:
            return self._registered[name]
        if name not in self._modules:
            near = difflib.get_close_matches(name, [*self], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self)}"
            raise ValueError(
                f"unknown {self.section} {name!r}; {hint} (one from outside: import its module, --import)"
            )
        module = importlib.import_module(self._modules[name])
        return Kind(module.Settings, getattr(module, self._maker))

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._registered

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._registered])

    def __len__(self) -> int:
        return len(self._modules) + len(self._registered)


class Sources(Registry):
    """Sources of data; the keys of each are a section of their own, such as data.babi.

    Its `Settings` may say `section`, the name of that section, if it is not that of the source; and `task`, what is
    asked: "questions" (a memory machine answers them), or, of a sequence model, "last tokens", "every token" or
    "documents". A `make` takes the settings, the section `data` of the config, and the seed.
    """

    def section_of(self, name: str) -> str:
        """Where the keys of a source are, in the section data."""
        return getattr(self[name].settings, "section", name)

    def task_of(self, name: str) -> str:
        """What is asked of a source's streams."""
        return getattr(self[name].settings, "task", "questions")

    def fields(self) -> dict[str, Field]:
        """The fields of all sources, as 'babi.subset'."""
        return {
            f"{self.section_of(name)}.{key}": field
            for name, kind in self.items()
            for key, field in fields_of(kind.settings).items()
        }


SOURCES = Sources(
    "data",
    {
        "simulated_clicks": "rmjax.data.clicks.simulated",
        "xlong": "rmjax.data.clicks.xlong",
        "movielens": "rmjax.data.clicks.movielens",
        "synthetic": "rmjax.data.stories.evidence",
        "babi": "rmjax.data.stories.babi",
        "narrativeqa": "rmjax.data.stories.narrativeqa",
        "tvqa": "rmjax.data.stories.tvqa",
        "activitynet": "rmjax.data.stories.activitynet",
        "sorting": "rmjax.data.texts.sorting",
        "wikitext": "rmjax.data.texts.wikitext",
        "pg19": "rmjax.data.texts.pg19",
        "enwik8": "rmjax.data.texts.enwik8",
        "books": "rmjax.data.texts.books",
        "hyperpartisan": "rmjax.data.texts.hyperpartisan",
    },
)

MACHINES = Registry(
    "machine",
    {
        "rehearsal": "rmjax.machines.rehearsal",
        "continual": "rmjax.machines.continual",
        "gru": "rmjax.machines.gru",
        "buffer": "rmjax.machines.buffer",
        "directly_reason": "rmjax.machines.directly_reason",
        "multihop_reason": "rmjax.machines.multihop_reason",
    },
)

LANGUAGE_MODELS = Registry(
    "model",
    {
        "transformer": "rmjax.models.gpt2",
        "transformer_xl": "rmjax.models.transformer_xl",
        "compressive": "rmjax.models.compressive",
        "infinity": "rmjax.models.infinity",
        "memoria": "rmjax.models.memoria_gpt2",
    },
    maker="build",
)
CLASSIFIERS = Registry(
    "model",
    {
        "bert": "rmjax.models.bert",
        "roberta": "rmjax.models.roberta",
        "memoria_bert": "rmjax.models.memoria_bert",
        "memoria_roberta": "rmjax.models.memoria_roberta",
    },
    maker="build",
)

SCHEDULES = Registry(
    "schedule",
    {
        "constant": "rmjax.schedules.constant",
        "cosine": "rmjax.schedules.cosine",
        "linear": "rmjax.schedules.falling",
        "falling": "rmjax.schedules.falling",
        "rising": "rmjax.schedules.rising",
    },
)

LOGGERS = Registry(
    "logger",
    {
        "jsonl": "rmjax.run.loggers.jsonl",
        "tensorboard": "rmjax.run.loggers.tensorboard",
        "wandb": "rmjax.run.loggers.wandb",
        "mlflow": "rmjax.run.loggers.mlflow",
    },
)

METRICS = Registry(
    "metric",
    {
        "auc": "rmjax.evaluation.auc",
        "accuracy": "rmjax.evaluation.accuracy",
        "error": "rmjax.evaluation.error",
        "mrr": "rmjax.evaluation.mrr",
    },
)


def register_machine(name: str, settings: type) -> Callable[[T], T]:
    """Decorates `make(num_items, settings, context) -> MemoryMachine`, of a machine from outside this package.

    Then `--config.machine.kind=<name>` works with `--import=<its module>`; see `Registry.register` for errors.
    """
    return MACHINES.register(name, settings)


def register_model(name: str, settings: type) -> Callable[[T], T]:
    """Decorates `build(settings, context: ModelContext) -> SequenceModel`, as `register_machine` does for machines."""
    return LANGUAGE_MODELS.register(name, settings)


def register_source(name: str, settings: type) -> Callable[[T], T]:
    """Decorates `make(settings, common, seed) -> Source`, of a source from outside this package.

    Its keys are --config.data.<name>.<field>; `common` is the section `data` of the config, with `dir`, `cache_dir`,
    `segment_length` and so on. See `Registry.register` for errors.
    """
    return SOURCES.register(name, settings)


def register_schedule(name: str, settings: type) -> Callable[[T], T]:
    """Decorates `make(settings, steps) -> step -> factor`, for config.train.schedule and config.rehearsal.schedule."""
    return SCHEDULES.register(name, settings)


def register_logger(name: str, settings: type) -> Callable[[T], T]:
    """Decorates `make(settings, context: LoggerContext) -> Logger`, for config.train.loggers."""
    return LOGGERS.register(name, settings)


def register_metric(name: str) -> Callable[[T], T]:
    """Decorates `make(settings) -> Metric`, for the `Questions.metric` of a source; settings are empty."""
    return METRICS.register(name, NoSettings)
