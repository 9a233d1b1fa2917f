"""Every key of a config: its default, what it may be, what it means; and plain words for what is wrong."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from rmjax.io import paths
from rmjax.registry import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    LOGGERS,
    MACHINES,
    METRICS,
    SCHEDULES,
    SOURCES,
    Field,
    Registry,
    a_path,
    a_seed,
    a_workdir,
    above,
    anything,
    at_least,
    below,
    between,
    expected,
    fields_of,
    kind_of,
    kinds_of,
    names_in,
    one_of,
    wrong,
)

IMPORT = flags.DEFINE_list(
    "import", [], "Modules that register kinds of their own, such as my_package.memories."
)
flags.DEFINE_string(
    "list", None, "Prints all kinds; --list=machine.rehearsal prints the keys of one."
)

_FIELDS: dict[str, Field] = {
    "seed": Field(0, a_seed, "every random draw is a function of it"),
    # data
    "data.dir": Field("", a_path, "where the raw files are"),
    "data.cache_dir": Field("", a_path, "where prepared files go; empty: $XDG_CACHE_HOME/rmjax, or ~/.cache/rmjax"),
    "data.ram_bytes": Field(2**31, at_least(0), "a split of at most so many bytes is kept in memory; 0: none is"),
    "data.seed": Field(0, a_seed, "of simulated users and drawn negatives; the same for every `seed`"),
    "data.segment_length": Field(20, at_least(1), "items a segment, N"),
    "data.negatives": Field(64, at_least(1), "items of another stream that come with each, P"),
    "data.workers": Field(0, at_least(0), "processes that read; 0: this one"),
    "data.prefetch": Field(2, at_least(0), "batches made ahead"),
    "data.buckets": Field(6, at_least(1), "texts: shapes that batches of streams of several lengths come in"),
    "data.min_count": Field(2, at_least(1), "texts: rarer words are unknown ones"),
    "data.vectors": Field("", a_path, "texts: file of word vectors (GloVe) to begin with; empty: drawn ones"),
    "data.segments": Field(1, at_least(1), "language models: segments a step, T"),
    # model, of sequences
    "model.pretrained": Field("", a_path, "folder of a Hugging Face checkpoint to begin with; empty: drawn values"),
    "model.gradient_segments": Field(1, at_least(0), "segments that gradients pass through at a time; 0: all"),
    "memoria.working": Field(50, at_least(1), "engrams born each segment, N_wm"),
    "memoria.short_term_capacity": Field(400, at_least(0), "engrams in short-term memory, C_stm"),
    "memoria.remind_short_term": Field(50, at_least(0), "engrams reminded of it at most; 0: none"),
    "memoria.remind_long_term": Field(50, at_least(0), "engrams reminded of long-term memory at most; 0: none"),
    "memoria.search_depth": Field(10, at_least(0), "steps of the search in long-term memory"),
    "memoria.initial_lifespan": Field(9.0, at_least(0), "segments that an engram lives if it is never reminded"),
    "memoria.lifespan_extend": Field(8.0, at_least(0), "segments that a reminded engram gains on average, alpha"),
    "memoria.correlation": Field("exp", one_of("exp", "negative_square"), "how near two engrams are"),
    "memoria.search_seeds": Field(
        "reminded", one_of("reminded", "all_short_term", "full"), "where the search in long-term memory starts"
    ),
    "memoria.ties": Field("hash", one_of("hash", "oldest", "newest"), "which of equally strong edges is taken"),
    "memoria.order": Field("paper", one_of("paper", "released"), "paper: forget, then move; released: the other way"),
    "memoria.lifespan_increment": Field("paper", one_of("paper", "released"), "what a reminded engram gains"),
    "memoria.layer": Field(-1, at_least(-1), "layer that engrams are of; -1: the last norm, BERT: the last but one"),
    "memoria.activation": Field("relu", one_of("relu", "none"), "of the abstractor's feed-forward layer"),
    # machine
    "machine.block": Field(0, at_least(0), "segments encoded at once; 0: all"),
    "machine.remat": Field(False, anything, "computes a block again in the backward pass rather than keep it"),
    "machine.gradient_segments": Field(0, at_least(0), "segments that gradients pass through at a time; 0: all"),
    "machine.loss": Field(1.0, at_least(0), "weight of the loss that some machines have of their own"),
    # rehearsal
    "rehearsal.fragments": Field(6, at_least(1), "rehearsed segments of a stream, B"),
    "rehearsal.mask_ratio": Field(0.5, between(0, 1), "share of items masked, to recollect"),
    "rehearsal.replace_ratio": Field(0.5, between(0, 1), "share of items replaced, to be found unfamiliar"),
    "rehearsal.sampled_items": Field(200, at_least(0), "items each masked one is told from, J; 0: all"),
    "rehearsal.recollection": Field(1.0, at_least(0), "weight of the recollection loss"),
    "rehearsal.familiarity": Field(0.5, at_least(0), "weight of the familiarity loss"),
    "rehearsal.sampler": Field("teacher", one_of("teacher", "uniform"), "what picks the fragments"),
    "rehearsal.negatives": Field(
        "uniform",
        one_of("uniform", "near", "stream", "partner"),
        "what masked items are told from: any items, the nearest to the truth, the stream's own, another stream's",
    ),
    "rehearsal.span": Field(1, at_least(1), "masked items lie in runs of so many"),
    "rehearsal.detach_items": Field(False, anything, "recollection does not train the features it compares with"),
    "rehearsal.sum_pairs": Field(False, anything, "familiarity is a sum over a stream's pairs (CM Eq. 5), not a mean"),
    "rehearsal.schedule": Field("constant", kind_of(SCHEDULES), "of both weights, over the steps"),
    "rehearsal.layers": Field(3, at_least(1), "layers of the decoder"),
    # reason
    "reason.weight": Field(1.0, at_least(0), "weight of the task's own loss"),
    "reason.hops": Field(1, at_least(1), "attention hops over the slots"),
    "reason.head": Field("linear", one_of("linear", "mlp"), "from answer features to scores"),
    # teacher
    "teacher.steps": Field(1000, at_least(1), "steps of the history sampler"),
    "teacher.batch_size": Field(32, at_least(1), "streams a step, over all devices"),
    "teacher.learning_rate": Field(1e-3, above(0), "of Adam"),
    "teacher.dim": Field(64, at_least(1), "width"),
    "teacher.share_items": Field(False, anything, "the machine has the teacher's item table, fixed"),
    "teacher.dir": Field("", a_workdir, "workdir of a run whose teacher is taken; empty: one is trained here"),
    # probe
    "probe.steps": Field(0, at_least(0), "steps of a decoder trained on the memory as it is; 0: the model's own"),
    "probe.fragments": Field(8, at_least(1), "fragments of a stream"),
    "probe.streams": Field(2000, at_least(1), "test streams"),
    # train
    "train.steps": Field(2000, at_least(1), "steps of training"),
    "train.start_from": Field("", a_workdir, "workdir of a run whose best parameters this one begins with"),
    "train.batch_size": Field(32, at_least(1), "streams a step, over all devices"),
    "train.eval_batch_size": Field(64, at_least(1), "streams an evaluation step, over all devices"),
    "train.microbatch": Field(
        0, at_least(0), "streams a device holds at once, gradients are summed; 0: on a CPU about 8,000 items, else all"
    ),
    "train.learning_rate": Field(1e-3, above(0), "of Adam"),
    "train.schedule": Field("constant", kind_of(SCHEDULES), "of both stages' rates, after the warm-up"),
    "train.warmup": Field(0.0, below(0, 1), "share of the steps in which both stages' rates rise from 0, linearly"),
    "train.clip": Field(5.0, above(0), "largest norm of the gradient"),
    "train.compute_dtype": Field("float32", one_of("float32", "bfloat16"), "of Transformers; parameters are float32"),
    "train.devices": Field(0, at_least(0), "how many devices; 0: all"),
    "train.mapping": Field("pmap", one_of("pmap", "mesh"), "how the step is mapped over devices"),
    "train.model_devices": Field(1, at_least(1), "mesh: devices that share the rows of an item table"),
    "train.split_layers": Field(False, anything, "mesh: they also share heads and feed-forward layers of Transformers"),
    "train.sparse_items": Field(
        False, anything, "a step updates those rows of the item table that its streams touch; the others wait"
    ),
    "train.loggers": Field("jsonl,tensorboard", kinds_of(LOGGERS), "what takes the numbers, beside the log"),
    "train.log_every": Field(20, at_least(1), "steps from one line of the log to the next"),
    "train.eval_every": Field(500, at_least(1), "steps from one evaluation to the next"),
    "train.save_every": Field(200, at_least(1), "steps from one checkpoint to the next"),
    "train.keep_last": Field(2, at_least(1), "latest checkpoints kept"),
    "train.keep_best": Field(1, at_least(0), "best checkpoints kept besides; the best one kept is tested"),
}  # fmt: skip


class Schema(Mapping[str, Field]):
    """Every key: those above, and those of all registered kinds, which come where their section begins."""

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._fields: dict[str, Field] = {}

    def _current(self) -> dict[str, Field]:
        kinds = [*SOURCES, *MACHINES, *LANGUAGE_MODELS, *CLASSIFIERS, *SCHEDULES, *LOGGERS]
        if self._kinds != kinds:  # also after one was registered
            models = {**LANGUAGE_MODELS.fields(), **CLASSIFIERS.fields()}
            model_kinds = one_of(*LANGUAGE_MODELS, *CLASSIFIERS)
            sources = Field("simulated_clicks", one_of(*SOURCES), "where streams come from")
            sections = {
                "data": {"name": sources, **SOURCES.fields()},
                "machine": {
                    "kind": Field("rehearsal", one_of(*MACHINES), "the memory"),
                    **MACHINES.fields(),
                },
                "model": {"kind": Field("memoria", model_kinds, "the sequence model"), **models},
                "schedule": SCHEDULES.fields(),
                "logger": LOGGERS.fields(),
            }
            self._kinds, self._fields = kinds, {}
            for name, field in _FIELDS.items():
                section = name.partition(".")[0]
                self._fields |= {
                    f"{section}.{key}": of_kind
                    for key, of_kind in sections.pop(section, {}).items()
                }
                self._fields[name] = field
            for section, fields in sections.items():  # that have no keys but those of kinds
                self._fields |= {f"{section}.{key}": of_kind for key, of_kind in fields.items()}
        return self._fields

    def __getitem__(self, name: str) -> Field:
        return self._current()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())


SCHEMA = Schema()


def base() -> ConfigDict:
    """All defaults. Unlocked, so that a misspelt key gets as far as `validate`, which knows the right one."""
    config: dict[str, Any] = {}
    for name, field in SCHEMA.items():
        *sections, key = name.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = field.default
    return ConfigDict(config)


def validate(config: ConfigDict) -> None:
    """Raises ValueError at the first key that is unknown or missing or whose value cannot be.

    A path may not exist; it may be no address, and its home directory must be known.
    """
    values = dict(_flatten(config))
    for name in values:
        if name not in SCHEMA:
            raise ValueError(_unknown(name))
    for name, field in SCHEMA.items():
        if name not in values:
            raise ValueError(f"config.{name}: missing; its default is {field.default!r}")
        if must := wrong(field, values[name]):
            raise ValueError(f"config.{name} = {values[name]!r}: must be {must}")
        if field.check is a_path:
            paths.resolve(values[name], f"config.{name}")
        elif field.check is a_workdir and values[name]:
            paths.resolve_checkpoint(values[name], f"config.{name}")
    MACHINES.settings(config.machine.kind, config.machine, "config.machine.", config)
    models_of(config).settings(config.model.kind, config.model, "config.model.", config)
    for message in _conflicts(config):
        raise ValueError(message)


def check_flags(argv: Sequence[str], also: str = "$^") -> None:
    """Imports what --import names, answers --help and --list, and ends the process in one line if a key of a config
    cannot be, or its value.

    Call it before absl parses: absl would show a traceback instead, and end --help as a mistake.

    Args:
      argv: the command line.
      also: a pattern of further keys.
    """
    import_modules(argv)
    answer_list(argv)
    answer_help(argv, describe())
    for name, value, alone in _given(argv):
        override = re.fullmatch(r"(?:no)?config\.(.+)", name)
        if not override or re.fullmatch(also, override[1]):
            continue
        key = override[1]
        if not any(f"{known}.".startswith(f"{key}.") for known in SCHEMA):
            raise SystemExit(_unknown(key))
        if key in SCHEMA and name.startswith("config"):
            _check_text(key, value, alone)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The `flags_parser` of `app.run`: what is wrong ends the process with one line that says why."""
    cards = [
        value for name, value, _ in _given(argv) if name == "config" and "config" in flags.FLAGS
    ]
    for card in cards:
        _check_card(card)
    try:
        rest = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise SystemExit(_unknown_flag(error.flagname)) from None
    except flags.Error as error:
        if "parsing config file" in str(error):
            original = (
                error.__context__ and error.__context__.__context__
            )  # absl and ml_collections wrapped it
            raise SystemExit(_broken(cards[-1], original or error)) from None
        missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
        if missing:
            raise SystemExit(f"--{missing[1]} is missing: {flags.FLAGS[missing[1]].help}") from None
        shown = re.sub(
            r"invalid literal for int.*", "must be a whole number", str(error).rstrip(".")
        )
        shown = re.sub(r"could not convert string to float.*", "must be a number", shown)
        raise SystemExit(f"{shown}; --help shows all flags") from None
    except Exception as error:  # a card may raise anything
        raise SystemExit(_broken(cards[-1], error)) from None
    if len(rest) > 1:
        cure = "options are flags, such as --mode=eval, without spaces around ="
        raise SystemExit(f"unexpected arguments: {' '.join(rest[1:])}; {cure}")
    return rest


def reads(config: Any, name: str) -> bool:
    """Whether a run with this config looks at a key."""
    section, *inner = name.split(".")
    sequence = is_sequence(config)
    if section == "data" and len(inner) == 2:
        source = config.data.name
        if source == "xlong" and not config.data.dir:
            source = "simulated_clicks"
        return inner[0] == SOURCES.section_of(source)
    if section == "memoria":
        return sequence and "memoria" in config.model.kind
    if section == "model":
        kinds = {**LANGUAGE_MODELS.fields(), **CLASSIFIERS.fields()}
        mine = fields_of(models_of(config)[config.model.kind].settings)
        return sequence and (inner[0] not in kinds or inner[0] in mine)
    if section in ("machine", "rehearsal", "reason", "teacher"):
        of_kinds = MACHINES.fields() if section == "machine" else {}
        return not sequence and (
            inner[0] not in of_kinds
            or inner[0] in fields_of(MACHINES[config.machine.kind].settings)
        )
    if section == "schedule":
        chosen = (config.train.schedule, *(() if sequence else (config.rehearsal.schedule,)))
        return any(inner[0] in fields_of(SCHEDULES[kind].settings) for kind in chosen)
    if section == "logger":
        return any(
            inner[0] in fields_of(LOGGERS[kind].settings) for kind in names_in(config.train.loggers)
        )
    return True


def refuse_unread(config: Any, argv: Sequence[str], warn: bool = False) -> None:
    """Looks for keys that are set and that this run does not look at.

    Args:
      argv: the command line; what it sets is refused, and what the config file sets is a warning.
      warn: all of them are warnings, as for one row of a table whose flags hold for all rows.

    Raises:
      ValueError: a flag sets such a key; names it, and what the run has in its place.
    """
    flagged = {re.sub(r"^(no)?config\.", "", name) for name, _, _ in _given(argv)}
    for name, value in _flatten(config):
        if reads(config, name) or (name not in flagged and value == SCHEMA[name].default):
            continue
        kind = config.model.kind if is_sequence(config) else config.machine.kind
        message = f"config.{name} = {value!r}: this run does not read it (config.data.name = {config.data.name!r}, "
        message += f"and {kind!r} remembers)"
        if name in flagged and not warn:
            raise ValueError(f"{message}: leave the flag out, or choose what reads it")
        logging.warning("%s.", message)


def import_modules(argv: Sequence[str]) -> None:
    """Imports what --import=my_package.memories,... names, so that it can register kinds before flags are parsed.

    Raises:
      SystemExit: there is no such module, or it fails; says why.
    """
    for argument in argv:
        if named := re.fullmatch(r"--?import=(.*)", argument):
            for module in filter(None, named[1].split(",")):
                sys.path[:0] = (
                    [] if "" in sys.path or str(Path.cwd()) in sys.path else [str(Path.cwd())]
                )
                try:
                    importlib.import_module(module)
                except Exception as error:
                    raise SystemExit(
                        f"--import={module}: {type(error).__name__}: {error}"
                    ) from error


def answer_list(argv: Sequence[str]) -> None:
    """Prints all kinds, or the keys of one, and ends the process, if argv has --list or --list=machine.rehearsal.

    Raises:
      SystemExit: with 0, or with the right names where there is no such kind.
    """
    for argument in argv[1:]:
        if asked := re.fullmatch(r"--?list(?:=(.*))?", argument):
            print(_listed(asked[1] or ""))
            raise SystemExit(0)


def _listed(name: str) -> str:
    registries = (MACHINES, LANGUAGE_MODELS, CLASSIFIERS, SOURCES, SCHEDULES, LOGGERS, METRICS)
    kinds = {
        f"{registry.section}.{kind}": (registry, kind)
        for registry in registries
        for kind in registry
    }
    if not name:
        rows = [f"{registry.section}: {', '.join(registry)}" for registry in registries]
        return "\n".join([*rows, "", "--list=machine.rehearsal prints the keys of one."])
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        raise SystemExit(
            f"--list={name}: no such kind; "
            + (f"did you mean {near[0]}?" if near else ", ".join(kinds))
        )
    registry, kind = kinds[name]
    section = f"data.{SOURCES.section_of(kind)}" if registry is SOURCES else registry.section
    fields = fields_of(registry[kind].settings)
    if not fields:
        return f"{name} has no keys of its own."
    return "\n".join(
        f"--config.{section}.{field}={f.default!r}  {f.doc}"
        + ("" if f.check is anything else f" ({f.check.text})")
        for field, f in fields.items()
    )


def answer_help(argv: Sequence[str], more: str = "") -> None:
    """Prints the program's flags and `more`, and ends the process with 0, if argv asks for help."""
    asked = [name for argument in argv[1:] if (name := argument.lstrip("-")) != argument]
    if not {"help", "helpshort", "helpfull", "h", "?"}.isdisjoint(asked):
        app.usage(shorthelp="helpfull" not in asked, writeto_stdout=True)
        print(more)
        raise SystemExit(0)


def describe() -> str:
    """Every key as a flag: what it means, what it may be, its default."""
    lines = (
        f"  --config.{name}: {f.doc} ({expected(f)}; default {f.default!r})"
        for name, f in SCHEMA.items()
    )
    return "\n".join(
        ["keys of a config (a config file sets them, and a flag changes one):", *lines]
    )


def options(arg: str | None, allowed: Sequence[str]) -> frozenset[str]:
    """What a config file's `get_config(arg)` was asked for: `file.py:long,local` -> {"long", "local"}."""
    chosen = frozenset(filter(None, (arg or "").split(",")))
    unknown = sorted(chosen - set(allowed))
    if unknown:  # no ValueError: config_flags would wrap it in a traceback
        there_are = f"there are {', '.join(allowed)}" if allowed else "this card has none"
        raise flags.IllegalFlagValueError(
            f"config option {unknown[0]!r}: no such option; {there_are}"
        )
    return chosen


class Recorder:
    """A config that remembers which keys were read, as dotted names in `read`; written out whole, none was."""

    def __init__(self, config: ConfigDict, prefix: str = "", read: set[str] | None = None):
        self._config, self._prefix = config, prefix
        self.read: set[str] = set() if read is None else read

    def __getattr__(self, key: str) -> Any:
        value = getattr(self._config, key)
        name = self._prefix + key
        if isinstance(value, ConfigDict):
            return Recorder(value, f"{name}.", self.read)
        self.read.add(name)
        return value

    __getitem__ = __getattr__

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def keys(self) -> Iterable[str]:
        return self._config.keys()

    def to_json(self) -> str:
        return self._config.to_json()


def _given(argv: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(name, value, whether the flag stands alone, so that the value is the next argument) of each flag."""
    arguments = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            yield name, value if equals else following, not equals


def _check_card(value: str) -> None:
    """Ends the process if `--config=value` names no file that may be a card."""
    path = Path(value.partition(":")[0])
    if path.suffix == ".py" and path.is_file():
        return
    cards = [str(card) for card in paths.visible(path if path.is_dir() else path.parent, "*.py")]
    names = difflib.get_close_matches(path.name, [Path(card).name for card in cards], n=1)
    near = [str(path.with_name(name)) for name in names]
    cure = "cards are in the folder configs of a clone of rmjax: go there, or give the path"
    if cards:
        cure = (
            f"did you mean {near[0]}?"
            if near and not path.exists()
            else f"there are {', '.join(cards)}"
        )
    state = (
        "a folder"
        if path.is_dir()
        else "no card, which is a .py file"
        if path.exists()
        else "no such file"
    )
    raise SystemExit(f"--config={value}: {state}; {cure}")


def _broken(card: str, error: BaseException) -> str:
    """What to say of an error that a card raised, with the card's line."""
    path = card.partition(":")[0]
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    cause = str(error)
    if isinstance(error, SyntaxError):
        lines, cause = [error.lineno], error.msg
    place = f"{path}, line {lines[-1]}" if lines else path
    cure = (
        "mend it; a card defines get_config(arg), which returns a config, as configs/xlong.py does"
    )
    return f"--config={card}: {place}: {type(error).__name__}: {cause}: {cure}"


def _unknown_flag(name: str) -> str:
    """What to say of a flag that there is not: some leave out the section of a key."""
    near = [f"--config.{key}" for key in sorted(SCHEMA) if f".{key}".endswith(f".{name}")]
    names = [flag for flag in flags.FLAGS if not flag.startswith("config.")]
    near = near or [f"--{flag}" for flag in difflib.get_close_matches(name, names, n=1)]
    return f"--{name}: no such flag; " + (
        f"did you mean {' or '.join(near)}?" if near else "--help shows all flags"
    )


def _check_text(name: str, text: str, alone: bool) -> None:
    """Ends the process if the text of a flag is no value of the key."""
    kind = type(SCHEMA[name].default)
    truth = (
        "true",
        "t",
        "1",
        "false",
        "f",
        "0",
    )  # as absl reads them; `--config.key` alone is true
    try:
        if kind in (int, float):
            kind(text)
        elif kind is bool and not alone and text.lower() not in truth:
            raise ValueError(text)
    except ValueError:
        raise SystemExit(f"config.{name} = {text!r}: must be {expected(SCHEMA[name])}") from None


def _flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, ConfigDict) and name not in SCHEMA:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, SCHEMA, n=1)
    return f"config.{name}: no such key" + (
        f"; did you mean config.{near[0]}?" if near else _neighbours(name)
    )


def _neighbours(name: str) -> str:
    section = name.rpartition(".")[0]
    inside = [key for key in SCHEMA if key.startswith(f"{section}.")]
    if not section or not inside:
        inside = sorted({key if "." not in key else key.partition(".")[0] + ".*" for key in SCHEMA})
    return "; there are " + ", ".join(f"config.{key}" for key in inside) + " (--help shows all)"


def _conflicts(config: ConfigDict) -> Iterator[str]:
    """What values that are right one by one cannot be together."""
    machine, train, simulated, movielens = (
        config.machine,
        config.train,
        config.data.simulated,
        config.data.movielens,
    )
    width = "item_dim" if machine.item_dim and machine.kind == "continual" else "dim"
    if simulated.clicks_min > simulated.clicks_max:
        least, most = simulated.clicks_min, simulated.clicks_max
        yield f"config.data.simulated.clicks_min = {least} must be at most config.data.simulated.clicks_max = {most}"
    if movielens.test_fraction + movielens.valid_fraction >= 1:
        yield "config.data.movielens.test_fraction + valid_fraction must be below 1: none are left to train on"
    if config.teacher.share_items and config.teacher.dim != machine[width]:
        item_width = f"machine.{width} = {machine[width]}"
        yield f"config.teacher.share_items needs teacher.dim = {config.teacher.dim} to be {item_width}"
    if config.teacher.share_items and train.start_from and not config.teacher.dir:
        yield "config.train.start_from with teacher.share_items: set config.teacher.dir to the teacher of that run too"
    if config.teacher.share_items and (config.data.vectors or config.data.name == "activitynet"):
        yield "config.teacher.share_items: with config.data.vectors, or frames for items, there is no table to share"
    words = config.data.name in ("babi", "narrativeqa", "tvqa", "activitynet")
    if machine.dim % 2 and words:
        yield f"config.machine.dim = {machine.dim} must be even: a bidirectional GRU has half of it each way"
    if is_sequence(config):
        yield from _model_conflicts(config)
    rehearsal = config.rehearsal
    if rehearsal.negatives in ("near", "stream") and not rehearsal.sampled_items:
        yield f"config.rehearsal.negatives = {rehearsal.negatives!r} needs config.rehearsal.sampled_items above 0"
    if train.sparse_items and config.rehearsal.recollection and not config.rehearsal.sampled_items:
        yield "config.train.sparse_items: with config.rehearsal.sampled_items = 0 every step touches all items"
    if train.sparse_items and (config.data.name == "activitynet" or is_sequence(config)):
        yield f"config.train.sparse_items: {config.data.name} has no item table"
    if train.model_devices > 1 and train.mapping == "pmap":
        yield f"config.train.model_devices = {train.model_devices} needs config.train.mapping = 'mesh'"


def models_of(config: Any) -> Registry:
    """The kinds of sequence model for the data of a config; raises ValueError if config.model.kind is none of them."""
    kind, classifies = config.model.kind, SOURCES.task_of(config.data.name) == "documents"
    if not is_sequence(config):
        return CLASSIFIERS if kind in CLASSIFIERS else LANGUAGE_MODELS  # none is made
    registry = CLASSIFIERS if classifies else LANGUAGE_MODELS
    if kind not in registry:
        raise ValueError(
            f"config.model.kind = {kind!r}: for {config.data.name} there are {', '.join(registry)}"
        )
    return registry


def is_sequence(config: Any) -> bool:
    """Whether a sequence model (config.model) reads the data, or a memory machine (config.machine)."""
    return SOURCES.task_of(config.data.name) != "questions"


def _model_conflicts(config: ConfigDict) -> Iterator[str]:
    """The same of sequence models."""
    model, data, train = config.model, config.data, config.train
    texts = SOURCES.task_of(data.name) == "every token"
    if data.name == "hyperpartisan" and data.segment_length < 3:
        yield f"config.data.segment_length = {data.segment_length}: must be at least 3, two tokens of it are marks"
    if texts and model.gradient_segments > data.segments:
        reach = f"config.model.gradient_segments = {model.gradient_segments}"
        yield f"{reach}: gradients end with a step of config.data.segments = {data.segments}: raise that too"
    if texts and train.microbatch:
        yield "config.train.microbatch: of texts a device holds all rows at once; lower config.train.batch_size"
    if model.pretrained and train.start_from:
        yield "config.model.pretrained and config.train.start_from: a model begins with one of them"
    if data.vectors:
        yield f"config.data.vectors = {data.vectors!r}: is for memory machines, not for {data.name}"
    if train.model_devices > 1:
        yield f"config.train.model_devices = {train.model_devices}: splits item tables, which {data.name} has not"
