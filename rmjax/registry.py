"""Registries: one mechanism that turns the name of a kind into its settings and its maker.

A kind is one module with a dataclass `Settings`, whose fields are made by `setting`, and a function
`make`. One row of a `Registry` names the module. config.py turns the settings of all kinds into
flags. Code outside this package adds kinds with the `register_*` functions below.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Value = int | float | str | bool  # of one key of a config
V = TypeVar("V", bound=Value)
Make = TypeVar("Make", bound=Callable[..., Any])


class Check(NamedTuple):
    """A test for the value of a field, and the words that describe right values."""

    holds: Callable[[Any], bool]  # called with values of the field's type only
    text: str


def names_in(names: str) -> list[str]:
    """The names in a value that lists kinds: 'jsonl,wandb' -> ['jsonl', 'wandb']."""
    return [name.strip() for name in names.split(",") if name.strip()]


class KindOf(NamedTuple):
    """A check that a value names a kind. It knows kinds that are registered later, too.

    Args:
      registries: the registries whose kinds are right.
      several: the value lists any number of different names, separated by commas.
      empty: an empty value is right too.
    """

    registries: tuple[Mapping[str, object], ...]
    several: bool = False
    empty: bool = False

    def holds(self, value: str) -> bool:
        """Whether every name is in a registry, and no name comes twice."""
        names = names_in(value) if self.several else [] if self.empty and not value else [value]
        known = {kind for registry in self.registries for kind in registry}
        return len({*names}) == len(names) and known.issuperset(names)

    @property
    def text(self) -> str:
        """The words that describe right values."""
        names = [kind for registry in self.registries for kind in registry]
        count = "empty, or one" if self.empty else "one"
        count = "names, none of them twice," if self.several else count
        return f"{count} of {', '.join(names)}"


class Field(NamedTuple):
    """One key of a config. Values must have the default's type; a float key takes an int too."""

    default: Value
    check: Check | KindOf
    doc: str


anything = Check(lambda value: True, "anything")


def at_least(low: float) -> Check:
    """A check for numbers in [low, infinity).

    Args:
      low: the least number.

    Returns:
      The check, for `setting`.
    """
    return Check(lambda value: value >= low, f"at least {low}")


def above(low: float) -> Check:
    """A check for numbers in (low, infinity)."""
    return Check(lambda value: value > low, f"above {low}")


def between(low: float, high: float) -> Check:
    """A check for numbers in [low, high]."""
    return Check(lambda value: low <= value <= high, f"from {low} to {high}")


def below(low: float, high: float) -> Check:
    """A check for numbers in [low, high)."""
    return Check(lambda value: low <= value < high, f"from {low} to just below {high}")


def inside(low: float, high: float) -> Check:
    """A check for numbers in (low, high)."""
    return Check(lambda value: low < value < high, f"above {low} and below {high}")


def one_of(*choices: str) -> Check:
    """A check for one of some strings."""
    return Check(lambda value: value in choices, f"one of {', '.join(choices)}")


# `config.validate` recognises these two by identity, and refuses addresses such as gs://b/x.
a_path = Check(lambda value: True, "the path of a file or folder")
a_workdir = Check(lambda value: True, "the path of a workdir")
a_seed = between(0, 2**32 - 1)  # JAX takes 32 bits of a seed; beyond, two seeds would draw the same


def kind_of(*registries: Mapping[str, object], empty: bool = False) -> KindOf:
    """A check for the name of one kind; with `empty`, an empty string is right too."""
    return KindOf(registries, empty=empty)


def kinds_of(*registries: Mapping[str, object]) -> KindOf:
    """A check for any number of different kinds, separated by commas; an empty string is right."""
    return KindOf(registries, several=True)


def setting(default: V, check: Check = anything, doc: str = "") -> V:
    """A field of a dataclass of settings.

    Args:
      default: the value if a config does not set the field; it also gives the type.
      check: which values are right.
      doc: the field's meaning, a phrase that --help prints.

    Returns:
      A dataclass field, typed as the default.
    """
    return dataclasses.field(default=default, metadata={"field": Field(default, check, doc)})


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """The settings of kinds that have no keys."""


def fields_of(settings: type) -> dict[str, Field]:
    """The fields of a dataclass of settings, by name."""
    return {field.name: field.metadata["field"] for field in dataclasses.fields(settings)}


def wrong(field: Field, value: Any) -> str | None:
    """The words for what `value` must be, if it is wrong for `field`; None if it is right."""
    wanted = type(field.default)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if fits and (wanted is not float or math.isfinite(value)) and field.check.holds(value):
        return None
    return expected(field)


def expected(field: Field) -> str:
    """The words for the values that a field takes."""
    kinds = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
    kind = kinds[type(field.default)]
    return kind if field.check is anything else f"{kind}, {field.check.text}"


class Kind(NamedTuple):
    """An entry of a registry."""

    settings: type
    make: Callable[..., Any]


class Registry(Mapping[str, Kind]):
    """Kinds by name. A kind's module is imported when the kind is first looked up.

    Args:
      section: the section of a config that has the kinds' keys, such as 'machine'.
      rows: {name: module}; the module defines `Settings` and the maker. 'module:maker' names the
        maker of a module that has several. Installed packages add rows through entry points of the
        group 'rmjax.<section>'.
      maker: the name of the maker in the modules.
    """

    def __init__(self, section: str, rows: Mapping[str, str], maker: str = "make"):
        self.section, self._maker = section, maker
        points = entry_points(group=f"rmjax.{section}")
        self._modules = {**rows, **{point.name: point.value for point in points}}
        self._registered: dict[str, Kind] = {}

    def register(self, name: str, settings: type) -> Callable[[Make], Make]:
        """A decorator for the maker of a kind from outside this package.

        Args:
          name: of the kind.
          settings: its dataclass of settings; every field is a `setting`.

        Returns:
          The decorator; it returns the maker as it is.

        Raises:
          ValueError: the name is taken, a field is no `setting`, or a field has another default
            than the field of that name of another kind.
        """
        if name in self:
            raise ValueError(f"there is a {self.section} {name!r} already: take another name")
        for plain in dataclasses.fields(settings):
            if "field" not in plain.metadata:
                cure = "give it a default with rmjax.registry.setting(...)"
                raise ValueError(f"{settings.__name__}.{plain.name}: {cure}")
        for key, field in self.keys_of(name, settings).items():
            for other, kind in self.items():
                known = self.keys_of(other, kind.settings).get(key, field)
                if known.default != field.default:
                    raise ValueError(
                        f"{self.section} {name!r} ({settings.__module__}): config.{self.section}."
                        f"{key} has the default {field.default!r}, and {known.default!r} in "
                        f"{other!r} ({kind.settings.__module__}): take that, or another name"
                    )

        def add(make: Make) -> Make:
            self._registered[name] = Kind(settings, make)
            return make

        return add

    def key_of(self, name: str, settings: type, field: str) -> str:
        """The key of a field, within the section of the registry."""
        return field

    def keys_of(self, name: str, settings: type) -> dict[str, Field]:
        """The fields of a kind by their keys, within the section of the registry.

        Args:
          name: of the kind.
          settings: its dataclass of settings.

        Returns:
          {key: field}.
        """
        fields = fields_of(settings).items()
        return {self.key_of(name, settings, key): field for key, field in fields}

    def fields(self) -> dict[str, Field]:
        """The fields of all kinds by key. Kinds share a key where fields have the same name."""
        return {k: f for name in self for k, f in self.keys_of(name, self[name].settings).items()}

    def ignored_by(self, name: str, values: Mapping[str, Any]) -> dict[str, str]:
        """Keys that runs of a kind do not read, such as 'reason.hops'.

        The `Settings` of the kind list them in a class variable `ignores`. Where the settings
        decide, `ignores` is a property: {key: the field that decides, or 'kind'}.

        Args:
          name: of the kind.
          values: {key: value}; keys of other kinds are ignored.

        Returns:
          {key: the key of the section that is the reason}.
        """
        settings = self[name].settings
        chosen = {field: values[field] for field in fields_of(settings) if field in values}
        ignores = getattr(settings(**chosen), "ignores", ())
        return dict(ignores) if isinstance(ignores, Mapping) else dict.fromkeys(ignores, "kind")

    def settings(
        self,
        name: str,
        values: Mapping[str, Any],
        prefix: str = "",
        config: ConfigDict | None = None,
    ) -> Any:
        """The settings of a kind, made from the values of a config.

        A dataclass of settings may define `conflicts(config)`. It yields a message for each
        conflict between values that are right one by one, such as "{heads} must divide {dim}".
        Each {field} is replaced by the field's full name and value.

        Args:
          name: of the kind.
          values: {key: value}; keys of other kinds are ignored.
          prefix: stands before the keys in errors, such as 'config.machine.'.
          config: the config of the run, for `conflicts`; None: no run is known.

        Returns:
          An instance of the kind's dataclass of settings.

        Raises:
          ValueError: the kind does not exist; a value is out of range; or values conflict.
        """
        settings, fields = self[name].settings, fields_of(self[name].settings)
        chosen = {field: values[field] for field in fields if field in values}
        for field, value in chosen.items():
            if must := wrong(fields[field], value):
                raise ValueError(f"{prefix}{field} = {value!r}: must be {must}")
        made = settings(**chosen)
        for message in made.conflicts(config) if hasattr(made, "conflicts") else ():
            shown = {field: f"{prefix}{field} = {getattr(made, field)}" for field in fields}
            raise ValueError(message.format(**shown))
        return made

    def __getitem__(self, name: str) -> Kind:
        if name in self._registered:
            return self._registered[name]
        if name not in self._modules:
            near = difflib.get_close_matches(name, [*self], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self)}"
            outside = "(--import=MODULE imports a module that registers kinds)"
            raise ValueError(f"unknown {self.section} {name!r}; {hint} {outside}")
        path, _, maker = self._modules[name].partition(":")
        module = importlib.import_module(path)
        return Kind(module.Settings, getattr(module, maker or self._maker))

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._registered

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._registered])

    def __len__(self) -> int:
        return len(self._modules) + len(self._registered)


# {key of a source: (another key, its values with which the first one is read)}
Conditions = Mapping[str, tuple[str, tuple[Value, ...]]]
# What a source asks of its reader: memory machines answer questions, sequence models do the rest.
TASKS = ("questions", "last tokens", "every token", "documents")


class Sources(Registry):
    """Sources of data. Each source has its keys in a section within data, such as data.babi.

    The `Settings` of a source may have these class variables:

    - `section`, if the section is not called like the source;
    - `task`, one of `TASKS`;
    - `asks_in_words = True`, if questions are sentences;
    - `has_item_table = False`, if items are features, not ids;
    - `ranks_items = True`, if an item may be the answer;
    - `read_if`, which keys are read in some runs only.

    The `make` of a source takes the settings, the section `data` of the config, and the seed.

    The `Settings` of stories may define `sentences(story, segment_length) -> words of each
    sentence`. It reads a text, or a list of sentences, as the source reads its own stories. A model
    that is asked in words reads stories with it.
    """

    def section_of(self, name: str) -> str:
        """The section within data that has a source's keys."""
        return str(getattr(self[name].settings, "section", name))

    def task_of(self, name: str) -> str:
        """What a source asks of a reader, one of `TASKS`.

        Raises:
          ValueError: the source does not exist, or its settings name another task.
        """
        task = str(getattr(self[name].settings, "task", "questions"))
        if task not in TASKS:
            must = one_of(*TASKS).text
            raise ValueError(f"data {name!r}: Settings.task = {task!r}: must be {must}")
        return task

    def asks_in_words(self, name: str) -> bool:
        """Whether a source's questions are sentences, not items."""
        return bool(getattr(self[name].settings, "asks_in_words", False))

    def has_item_table(self, name: str) -> bool:
        """Whether a source's items are ids, which index a table, not features."""
        return bool(getattr(self[name].settings, "has_item_table", True))

    def ranks_items(self, name: str) -> bool:
        """Whether a source may ask for the next item, so that runs read the section ranking."""
        return bool(getattr(self[name].settings, "ranks_items", False))

    def key_of(self, name: str, settings: type, field: str) -> str:
        """The key of a field, such as 'babi.subset'."""
        return f"{getattr(settings, 'section', name)}.{field}"


SOURCES = Sources(
    "data",
    {
        "simulated_clicks": "rmjax.data.clicks.simulated",
        "xlong": "rmjax.data.clicks.xlong",
        "movielens": "rmjax.data.clicks.movielens",
        "table": "rmjax.data.clicks.table",
        "synthetic": "rmjax.data.stories.evidence",
        "recall": "rmjax.data.stories.recall",
        "babi": "rmjax.data.stories.babi",
        "narrativeqa": "rmjax.data.stories.narrativeqa",
        "tvqa": "rmjax.data.stories.tvqa",
        "stories": "rmjax.data.stories.jsonl",
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
        "stm": "rmjax.machines.stm",
        "hpmn": "rmjax.machines.hpmn",
        "mimn": "rmjax.machines.mimn",
        "dnc": "rmjax.machines.dnc",
        "nutm": "rmjax.machines.nutm",
        "dmsdnc": "rmjax.machines.dmsdnc",
        "gated_delta": "rmjax.machines.gated_delta",
        "titans": "rmjax.machines.titans",
        "ffm": "rmjax.machines.ffm",
        "compressive": "rmjax.machines.compressive",
        "rmt": "rmjax.machines.rmt",
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
        "ndcg@10": "rmjax.evaluation.ranking:ndcg_10",
        "ndcg@20": "rmjax.evaluation.ranking:ndcg_20",
        "hr@10": "rmjax.evaluation.ranking:hr_10",
        "hr@20": "rmjax.evaluation.ranking:hr_20",
        "mrr@10": "rmjax.evaluation.ranking:mrr_10",
        "mrr@20": "rmjax.evaluation.ranking:mrr_20",
        "sampled_ndcg@10": "rmjax.evaluation.ranking:sampled_ndcg_10",
        "sampled_hr@10": "rmjax.evaluation.ranking:sampled_hr_10",
    },
)


REGISTRIES = (MACHINES, LANGUAGE_MODELS, CLASSIFIERS, SOURCES, SCHEDULES, LOGGERS, METRICS)


def register_machine(name: str, settings: type) -> Callable[[Make], Make]:
    """Decorates `make(num_items, settings, context) -> MemoryMachine`.

    After `--import=<the module>`, `--config.machine.kind=<name>` selects it.

    Args:
      name: of the machine, as config.machine.kind names it.
      settings: a frozen dataclass, one `setting` for each key.

    Returns:
      The decorator, which returns the function as it is.

    Raises:
      ValueError: the name is taken, or a setting contradicts that of another kind.
    """
    return MACHINES.register(name, settings)


def register_model(name: str, settings: type) -> Callable[[Make], Make]:
    """Decorates `build(settings, context: ModelContext) -> SequenceModel`, a language model.

    After `--import=<the module>`, `--config.model.kind=<name>` selects it.

    Args:
      name: of the model, as config.model.kind names it.
      settings: a frozen dataclass, one `setting` for each key.

    Returns:
      The decorator, which returns the function as it is.

    Raises:
      ValueError: the name is taken, or a setting contradicts that of another kind.
    """
    return LANGUAGE_MODELS.register(name, settings)


def register_source(name: str, settings: type) -> Callable[[Make], Make]:
    """Decorates `make(settings, common, seed) -> Source`.

    Its keys are --config.data.<name>.<field>. `common` is the section `data` of the config, with
    `dir`, `cache_dir`, `segment_length` and so on.

    Args:
      name: of the source, as config.data.name names it.
      settings: a frozen dataclass, one `setting` for each key.

    Returns:
      The decorator, which returns the function as it is.

    Raises:
      ValueError: the name is taken, or a setting contradicts that of another kind.
    """
    return SOURCES.register(name, settings)


def register_schedule(name: str, settings: type) -> Callable[[Make], Make]:
    """Decorates `make(settings, steps) -> (step -> factor)`, for train and rehearsal schedules.

    config.train.schedule and config.rehearsal.schedule select it.

    Args:
      name: of the schedule, as the config names it.
      settings: a frozen dataclass, one `setting` for each key.

    Returns:
      The decorator, which returns the function as it is.

    Raises:
      ValueError: the name is taken, or a setting contradicts that of another kind.
    """
    return SCHEDULES.register(name, settings)


def register_logger(name: str, settings: type) -> Callable[[Make], Make]:
    """Decorates `make(settings, context: LoggerContext) -> Logger`, for config.train.loggers.

    Args:
      name: of the logger, as config.train.loggers names it.
      settings: a frozen dataclass, one `setting` for each key.

    Returns:
      The decorator, which returns the function as it is.

    Raises:
      ValueError: the name is taken, or a setting contradicts that of another kind.
    """
    return LOGGERS.register(name, settings)


def register_metric(name: str) -> Callable[[Make], Make]:
    """Decorates `make(settings) -> Metric`, for `Questions.metric` of a source.

    The settings are empty, see `NoSettings`.

    Args:
      name: of the metric, as config.train.metric names it.

    Returns:
      The decorator, which returns the function as it is.

    Raises:
      ValueError: the name is taken.
    """
    return METRICS.register(name, NoSettings)
