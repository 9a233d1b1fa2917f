"""Every key of a config: its default, the values that it takes, and its meaning.

`validate` answers a wrong key or value with one line: cause and cure. `rmjax.command_line` does so
for flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from rmjax.io import paths
from rmjax.registry import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    LOGGERS,
    MACHINES,
    METRICS,
    REGISTRIES,
    SCHEDULES,
    SOURCES,
    Field,
    Registry,
    Value,
    a_path,
    a_seed,
    a_workdir,
    above,
    anything,
    at_least,
    below,
    between,
    fields_of,
    kind_of,
    kinds_of,
    names_in,
    one_of,
    wrong,
)
from rmjax.types import Context

_FIELDS: dict[str, Field] = {
    "seed": Field(0, a_seed, "seed of every random draw, except those of data.seed"),
    # data
    "data.name": Field("simulated_clicks", kind_of(SOURCES), "source of the streams"),
    "data.dir": Field("", a_path, "folder of the raw files"),
    "data.cache_dir": Field("", a_path,
        "folder for prepared files; empty: $XDG_CACHE_HOME/rmjax, or ~/.cache/rmjax"),
    "data.ram_bytes": Field(2**31, at_least(0),
        "largest size in bytes of a split that is kept in memory; 0: no split is kept"),
    "data.seed": Field(0, a_seed, "seed of simulated users and drawn negatives, apart from `seed`"),
    "data.segment_length": Field(20, at_least(1), "items in a segment, N"),
    "data.negatives": Field(64, at_least(1), "items of another stream beside each stream, P"),
    "data.workers": Field(0, at_least(0), "processes that read data; 0: the main process reads"),
    "data.prefetch": Field(2, at_least(0), "batches prepared ahead"),
    "data.buckets": Field(6, at_least(1),
        "texts: number of groups of streams of about the same length; a batch has one group"),
    "data.shapes": Field(0, at_least(0),
        "texts: number of lengths that batches are padded to, one compiled step each; "
        "0: as many as groups"),
    "data.min_count": Field(2, at_least(1), "texts: rarer words count as unknown"),
    "data.vectors": Field("", a_path,
        "texts: file of word vectors (GloVe) as initial values; empty: random values"),
    "data.segments": Field(1, at_least(1), "language models: segments in a step, T"),
    # sequence models
    "model.kind": Field("memoria", kind_of(LANGUAGE_MODELS, CLASSIFIERS), "the sequence model"),
    "model.pretrained": Field("", a_path,
        "folder of a Hugging Face checkpoint with initial values; empty: random values"),
    "model.gradient_segments": Field(1, at_least(0),
        "number of segments that a gradient passes through; 0: all"),
    "memoria.working": Field(50, at_least(1), "new engrams in each segment, N_wm"),
    "memoria.short_term_capacity": Field(400, at_least(0), "engrams in short-term memory, C_stm"),
    "memoria.remind_short_term": Field(50, at_least(0),
        "largest number of engrams reminded from short-term memory; 0: none"),
    "memoria.remind_long_term": Field(50, at_least(0),
        "largest number of engrams reminded from long-term memory; 0: none"),
    "memoria.search_depth": Field(10, at_least(0), "steps of the search in long-term memory"),
    "memoria.initial_lifespan": Field(9.0, at_least(0),
        "segments that an engram lives without being reminded"),
    "memoria.lifespan_extend": Field(8.0, at_least(0),
        "segments that a reminded engram gains on average, alpha"),
    "memoria.correlation": Field("exp", one_of("exp", "negative_square"),
        "similarity of engrams at distance d: exp(-d^2) or -d^2"),
    "memoria.search_seeds": Field("reminded", one_of("reminded", "all_short_term", "full"),
        "start of the search in long-term memory: at reminded engrams, or also at engrams drawn "
        "for the other short-term ones; full: no search, all are candidates"),
    "memoria.ties": Field("hash", one_of("hash", "oldest", "newest"),
        "choice among equally strong edges at the start of the search"),
    "memoria.order": Field("paper", one_of("paper", "released"),
        "paper: forget, then move engrams; released (the authors' code): move, then forget"),
    "memoria.lifespan_increment": Field("paper", one_of("paper", "released"),
        "rule for what a reminded engram gains: the paper's or that of the authors' code"),
    "memoria.layer": Field(-1, at_least(-1),
        "layer whose output becomes engrams; -1: the last norm, in BERT the last layer but one"),
    "memoria.activation": Field("relu", one_of("relu", "none"),
        "activation of the abstractor's feed-forward layer"),
    # memory machines
    "machine.kind": Field("rehearsal", kind_of(MACHINES), "the memory machine"),
    "machine.block": Field(0, at_least(0), "segments that are encoded at once; 0: all"),
    "machine.remat": Field(False, anything,
        "recompute each block in the backward pass, to store less"),
    "machine.gradient_segments": Field(0, at_least(0),
        "number of segments that a gradient passes through; 0: all"),
    "machine.loss": Field(1.0, at_least(0), "weight of the machine's own loss, if it has one"),
    # rehearsal
    "rehearsal.fragments": Field(6, at_least(1), "segments of a stream that are rehearsed, B"),
    "rehearsal.mask_ratio": Field(0.5, between(0, 1),
        "share of a fragment's items that are masked, for recollection"),
    "rehearsal.replace_ratio": Field(0.5, between(0, 1),
        "share of items replaced in an unfamiliar fragment"),
    "rehearsal.sampled_items": Field(200, at_least(0),
        "wrong items that a masked item is compared with, J; 0: all items"),
    "rehearsal.recollection": Field(1.0, at_least(0), "weight of the recollection loss"),
    "rehearsal.familiarity": Field(0.5, at_least(0), "weight of the familiarity loss"),
    "rehearsal.sampler": Field("teacher", one_of("teacher", "uniform"),
        "method that chooses the fragments"),
    "rehearsal.negatives": Field("uniform", one_of("uniform", "near", "stream", "partner"),
        "origin of the wrong items for recollection: all items, those nearest to the right item, "
        "the same stream, another stream"),
    "rehearsal.span": Field(1, at_least(1), "length of a run of masked items"),
    "rehearsal.detach_items": Field(False, anything,
        "recollection does not train the item features that it compares with"),
    "rehearsal.sum_pairs": Field(False, anything,
        "familiarity is a sum over a stream's pairs (CM Eq. 5), not a mean"),
    "rehearsal.schedule": Field("constant", kind_of(SCHEDULES),
        "course of both weights over the steps"),
    "rehearsal.labels": Field(0.0, at_least(0),
        "questions of a stream up to which both weights are full; with more questions they fall in "
        "proportion; 0: questions do not matter"),
    "rehearsal.balance": Field(0.0, at_least(0),
        "largest norm of the rehearsal's gradient relative to that of the task's loss, in the "
        "parameters that both train; a step takes longer; 0: no limit"),
    "rehearsal.layers": Field(3, at_least(1), "layers of the decoder"),
    # reason
    "reason.weight": Field(1.0, at_least(0), "weight of the task's loss"),
    "reason.hops": Field(1, at_least(1), "attention hops over the slots"),
    "reason.norm": Field(False, anything, "the question has a layer norm between hops"),
    "reason.mix": Field(0, at_least(0),
        "rounds in which slots attend to each other before they are read; 0: none"),
    "reason.head": Field("linear", one_of("linear", "mlp"), "layers between answer and scores"),
    # ranking, where an item is the answer
    "ranking.question": Field("last", one_of("next", "last"),
        "what the reader is asked; last: the last item before the question, beside the memory; "
        "next: a learned question, so that it knows the memory alone"),
    "ranking.table": Field("own", one_of("own", "shared"),
        "item table that the scores come from: one of their own, which learns better what follows "
        "what; or the one that the memory reads, which halves the parameters"),
    "ranking.bias": Field(True, anything, "every item has a bias"),
    "ranking.full_softmax": Field(20_000, at_least(0),
        "largest number of items that a target is compared with in training; where there are more "
        "items, negatives are drawn"),
    "ranking.negatives": Field(1024, at_least(1), "items drawn in each step, if not all are used"),
    "ranking.draw": Field("popularity", one_of("popularity", "uniform"),
        "how negatives are drawn; popularity: by 1 + the count of an item in training"),
    # teacher
    "teacher.steps": Field(1000, at_least(1), "training steps of the history sampler"),
    "teacher.batch_size": Field(32, at_least(1), "streams in a step, over all devices"),
    "teacher.learning_rate": Field(1e-3, above(0), "learning rate of Adam"),
    "teacher.dim": Field(64, at_least(1), "width of the history sampler"),
    "teacher.share_items": Field(False, anything,
        "the machine takes the teacher's item table; it trains it only with teacher.train_items"),
    "teacher.train_items": Field(False, anything,
        "the machine goes on training the item table that it takes from the teacher"),
    "teacher.dir": Field("", a_workdir,
        "workdir of a run whose teacher is used; empty: train one"),
    # probe
    "probe.steps": Field(0, at_least(0),
        "training steps of a decoder on fixed memories; 0: use the model's decoder"),
    "probe.fragments": Field(8, at_least(1), "fragments of a stream"),
    "probe.streams": Field(2000, at_least(1), "test streams"),
    # train
    "train.steps": Field(2000, at_least(1), "training steps"),
    "train.start_from": Field("", a_workdir,
        "workdir of a run whose best parameters are the initial values; empty: random values"),
    "train.new_items": Field("refuse", one_of("refuse", "mean", "draw"),
        "items that the run of start_from does not have. refuse: an error; mean: their rows begin "
        "at the mean of their neighbours in the streams; draw: at random values"),
    "train.batch_size": Field(32, at_least(1), "streams in a step, over all devices"),
    "train.eval_batch_size": Field(64, at_least(1),
        "streams in an evaluation step, over all devices"),
    "train.microbatch": Field(0, at_least(0),
        "streams that a device computes at once; gradients are summed; 0: on a CPU as many as have "
        "about 8,000 items, elsewhere all"),
    "train.learning_rate": Field(1e-3, above(0), "learning rate of Adam"),
    "train.schedule": Field("constant", kind_of(SCHEDULES),
        "course of both stages' learning rates after the warm-up"),
    "train.warmup": Field(0.0, below(0, 1),
        "share of the steps in which both stages' learning rates rise linearly from 0"),
    "train.clip": Field(5.0, above(0), "largest norm of the gradient"),
    "train.compute_dtype": Field("float32", one_of("float32", "tensorfloat32", "bfloat16"),
        "number format of matrix products; parameters stay float32. tensorfloat32: on a GPU, "
        "products with 10 bits of fraction; a CPU takes float32. bfloat16: in Transformers and in "
        "the fused scan; on a GPU tensorfloat32 in all other products. A TPU, and what serves, "
        "multiply float32 arrays in JAX's default precision"),
    "train.devices": Field(0, at_least(0), "number of devices; 0: all"),
    "train.mapping": Field("pmap", one_of("pmap", "mesh"),
        "method that spreads a step over devices"),
    "train.model_devices": Field(1, at_least(1),
        "mesh: devices that share the rows of an item table"),
    "train.split_layers": Field(False, anything,
        "mesh: these devices share heads and feed-forward layers of Transformers too"),
    "train.sparse_items": Field(False, anything,
        "update only the rows of the item table that the step's streams contain"),
    "train.metric": Field("", kind_of(METRICS, empty=True),
        "metric that chooses the best checkpoint and is in the table; empty: that of the data"),
    "train.loggers": Field("jsonl,tensorboard", kinds_of(LOGGERS),
        "loggers that receive the numbers of a run, separated by commas"),
    "train.log_every": Field(20, at_least(1), "steps between lines of the log"),
    "train.eval_every": Field(500, at_least(1), "steps between evaluations"),
    "train.save_every": Field(200, at_least(1), "steps between checkpoints"),
    "train.keep_last": Field(2, at_least(1), "number of latest checkpoints that are kept"),
    "train.keep_best": Field(1, at_least(0),
        "number of best checkpoints kept beside these; the best one kept is tested"),
}  # fmt: skip
# Keys of older versions. Kept configs, cards and flags may still have them.
# {old name: name today}, such as {"machine.decay": "machine.fade"}.
RENAMED: dict[str, str] = {}
# {removed key: the value that today's code computes with}, such as {"machine.bias": True}.
REMOVED: dict[str, Value] = {}
# The kinds that a key chooses from; their keys stand behind it, in the same section.
_KINDS: dict[str, tuple[Registry, ...]] = {
    "data.name": (SOURCES,),
    "machine.kind": (MACHINES,),
    "model.kind": (LANGUAGE_MODELS, CLASSIFIERS),
}


def _all_fields() -> Iterator[tuple[str, Field]]:
    """Every key with its field: the common keys, and the keys of all kinds."""
    for name, field in _FIELDS.items():
        yield name, field
        for registry in _KINDS.get(name, ()):
            yield from _fields_of_kinds(registry)
    yield from _fields_of_kinds(SCHEDULES)
    yield from _fields_of_kinds(LOGGERS)


def _fields_of_kinds(registry: Registry) -> Iterator[tuple[str, Field]]:
    return ((f"{registry.section}.{key}", field) for key, field in registry.fields().items())


class Schema(Mapping[str, Field]):
    """Every key of a config, those of registered kinds included."""

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._fields: dict[str, Field] = {}

    def _current(self) -> dict[str, Field]:
        kinds = [kind for registry in REGISTRIES for kind in registry]
        if self._kinds != kinds:  # at the first call, and after a kind was registered
            self._kinds, self._fields = kinds, dict(_all_fields())
        return self._fields

    def __getitem__(self, name: str) -> Field:
        return self._current()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())


SCHEMA = Schema()


def base() -> ConfigDict:
    """A config of all defaults.

    It is not locked: a misspelt key then gets as far as `validate`, which suggests the right one.
    """
    return ConfigDict(nested({name: field.default for name, field in SCHEMA.items()}))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by section: {"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return tree


def renamed(values: Mapping[str, Any], flagged: Collection[str] = ()) -> dict[str, Any]:
    """Values with the keys of today in place of those in `RENAMED`.

    Args:
      values: by dotted name.
      flagged: names that flags set; they win over an old key of a card.

    Returns:
      The values.

    Raises:
      ValueError: a key is set by its old and by its new name, to different values.
    """
    made = dict(values)
    for old, new in RENAMED.items():
        if old not in made:
            continue
        value = made.pop(old)
        if new in flagged:
            continue
        other = made.get(new, value)
        if other not in (value, SCHEMA[new].default):
            both = f"config.{old} = {value!r} and config.{new} = {other!r}"
            raise ValueError(f"{both}: the first is the old name of the second: leave it out")
        made[new] = value
    return made


def rename(config: ConfigDict, flagged: Collection[str] = ()) -> None:
    """Gives the old keys of a config, which a card may set, their names of today.

    Args:
      config: it is changed in place.
      flagged: as in `renamed`.

    Raises:
      ValueError: as `renamed`.
    """
    values = dict(flatten(config))
    gone = RENAMED.keys() & values.keys()
    if not gone:
        return
    made = renamed(values, flagged)
    with config.unlocked(), config.ignore_type():
        for old in sorted(gone):
            section, _, key = old.rpartition(".")
            del (config[section] if section else config)[key]
            logging.warning("config.%s is called config.%s today.", old, RENAMED[old])
        changed = {RENAMED[old] for old in gone}
        config.update_from_flattened_dict({new: made[new] for new in changed & made.keys()})


def of_today(
    values: Mapping[str, Any], free: Callable[[str], bool] = lambda name: False
) -> dict[str, Any]:
    """The values of a config that a run kept, under the keys of today.

    A renamed key has its new name. A removed one is left out, if it had the value that today's code
    computes with, or if it is free.

    Args:
      values: by dotted name.
      free: says of a key's name whether runs compute the same with all of its values.

    Returns:
      The values. Unknown keys are still among them.

    Raises:
      ValueError: as `renamed`.
    """
    gone = {k for k, v in values.items() if k in REMOVED and (v == REMOVED[k] or free(k))}
    return renamed({k: v for k, v in values.items() if k not in gone})


def outside_keys() -> set[str]:
    """Keys that only kinds from outside of this package have."""
    ours, others = set(_FIELDS), set[str]()
    for registry in REGISTRIES:
        for name, kind in registry.items():
            own = kind.settings.__module__.startswith("rmjax.")
            keys = registry.keys_of(name, kind.settings)
            (ours if own else others).update(f"{registry.section}.{key}" for key in keys)
    return others - ours


def validate(config: ConfigDict) -> None:
    """Checks keys, values and their conflicts. Old keys get their names of today, see `rename`.

    Args:
      config: of a run. Its paths need not exist.

    Raises:
      ValueError: a key is unknown or missing, a value is wrong, or values conflict; a path is an
        address such as gs://b/x, or its home directory is unknown.
    """
    rename(config)
    values = dict(flatten(config))
    for name in values:
        if name not in SCHEMA:
            raise ValueError(no_such_key(name))
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


def array_dtype(config: ConfigDict) -> str:
    """The dtype of arrays in matrix products; TF32 is no dtype, but a way to multiply float32."""
    return "bfloat16" if config.train.compute_dtype == "bfloat16" else "float32"


def reads(config: ConfigDict, name: str) -> bool:
    """Whether a run with this config reads a key, such as 'machine.slots'."""
    return not why_unread(config, name)


def why_unread(config: ConfigDict, name: str) -> str:
    """Why a run with this config does not read a key, as a clause; '' if the run reads it.

    Raises:
      ValueError: there is no such key.
    """
    section, _, key = name.partition(".")
    sequence = is_sequence(config)
    if section in ("machine", "rehearsal", "reason", "teacher"):
        reader = f"config.model reads config.data.name = {config.data.name!r}"
        return reader if sequence else _unread_of_machines(config, section, key)
    if section == "ranking":
        asks = not sequence and SOURCES.ranks_items(config.data.name)
        if config.data.name == "table" and config.data.table.ask != "next":
            return f"config.data.table.ask = {config.data.table.ask!r}"
        return "" if asks else f"config.data.name = {config.data.name!r} asks for no item"
    if section in ("model", "memoria"):
        reader = f"config.machine reads config.data.name = {config.data.name!r}"
        return _unread_of_models(config, section, key) if sequence else reader
    if section == "data":
        return _unread_of_data(config, key)
    if section == "schedule":
        chosen = [config.train.schedule, *([] if sequence else [config.rehearsal.schedule])]
        return _unread_of_kinds(SCHEDULES, chosen, key)
    if section == "logger":
        return _unread_of_kinds(LOGGERS, names_in(config.train.loggers), key)
    if name == "train.split_layers" and config.train.mapping != "mesh":
        return f"config.train.mapping = {config.train.mapping!r}"
    if name == "train.metric" and SOURCES.task_of(config.data.name) == "every token":
        return f"config.data.name = {config.data.name!r}"
    if section in ("seed", "probe", "train"):
        return ""
    raise ValueError(no_such_key(name))


def _unread_of_machines(config: ConfigDict, section: str, key: str) -> str:
    """`why_unread` for memory machines and what is trained with them."""
    kind, rehearsal, teacher = config.machine.kind, config.rehearsal, config.teacher
    losses = bool(rehearsal.recollection or rehearsal.familiarity)
    no_losses = "config.rehearsal.recollection and config.rehearsal.familiarity are 0"
    decodes = losses or bool(config.probe.steps)  # a probe trains a decoder in any case
    if section == "machine" and key in ("heads", "dropout") and decodes:
        return ""  # the rehearsal's decoder reads them, whatever the machine
    reasons = MACHINES.ignored_by(kind, config.machine)
    steps_of_hops = section == "reason" and key in ("norm", "mix")
    reason = reasons.get(f"{section}.{key}") or (steps_of_hops and reasons.get("reason.hops"))
    if reason:
        return f"config.machine.{reason} = {config.machine[reason]!r}"
    if section == "reason" and key == "norm" and config.reason.hops == 1:
        return "config.reason.hops = 1"
    if section == "machine":
        if key == "loss":
            chosen = MACHINES.settings(kind, config.machine, "config.machine.")
            losing = MACHINES[kind].make(1, chosen, Context()).has_loss
            return "" if losing else f"this {kind!r} machine has no loss of its own"
        known = key not in MACHINES.fields() or key in fields_of(MACHINES[kind].settings)
        return "" if known else f"config.machine.kind = {kind!r}"
    if section == "rehearsal":
        return "" if decodes or key in ("recollection", "familiarity") else no_losses
    if (section, key) == ("teacher", "train_items"):
        return "" if teacher.share_items else "config.teacher.share_items = False"
    # teacher.dir may be set for all rows of a table, those without a teacher included.
    if section == "teacher" and key not in ("share_items", "dir"):
        if not teacher.share_items and rehearsal.sampler != "teacher":
            return f"config.rehearsal.sampler = {rehearsal.sampler!r}"
        if not teacher.share_items and not losses:
            return no_losses
        if teacher.dir and key != "dim":
            return f"config.teacher.dir = {teacher.dir!r}"
    return ""


def _unread_of_models(config: ConfigDict, section: str, key: str) -> str:
    """`why_unread` for sequence models."""
    kind = config.model.kind
    if section == "memoria":
        known = "memoria" in kind
    else:
        of_kinds = {**LANGUAGE_MODELS.fields(), **CLASSIFIERS.fields()}
        known = key not in of_kinds or key in fields_of(models_of(config)[kind].settings)
    return "" if known else f"config.model.kind = {kind!r}"


def source_of(config: ConfigDict) -> str:
    """The source whose keys a run reads; without a folder, XLong is simulated clicks."""
    simulates = config.data.name == "xlong" and not config.data.dir
    return "simulated_clicks" if simulates else str(config.data.name)


def _unread_of_data(config: ConfigDict, key: str) -> str:
    """`why_unread` for sources, whose keys have a section within data."""
    source = source_of(config)
    section, dot, own = key.partition(".")
    of_source = fields_of(SOURCES[source].settings)
    known = section == SOURCES.section_of(source) and own in of_source if dot else True
    if key == "segments":
        known = SOURCES.task_of(source) == "every token"
    reads_if = getattr(SOURCES[source].settings, "read_if", {})
    if known and dot and own in reads_if:
        other, values = reads_if[own]
        if config.data[section][other] not in values:
            return f"config.data.{section}.{other} = {config.data[section][other]!r}"
    return "" if known else f"config.data.name = {config.data.name!r}"


def _unread_of_kinds(registry: Registry, chosen: Sequence[str], key: str) -> str:
    """`why_unread` for the keys of kinds of which several may be chosen."""
    known = any(key in fields_of(registry[kind].settings) for kind in chosen)
    return "" if known else f"no {registry.section} among {', '.join(chosen) or 'none'} has it"


def options(arg: str | None, allowed: Sequence[str]) -> frozenset[str]:
    """The options of a config file: `file.py:long,local` -> {"long", "local"}.

    Args:
      arg: the text behind the colon, as `get_config(arg)` receives it.
      allowed: the options that the file knows.

    Returns:
      The chosen options.

    Raises:
      IllegalFlagValueError: an option is unknown. config_flags would wrap a ValueError in a
        traceback.
    """
    chosen = frozenset(filter(None, (arg or "").split(",")))
    unknown = sorted(chosen - set(allowed))
    if unknown:
        hint = f"there are {', '.join(allowed)}" if allowed else "this card has none"
        text = f"config option {unknown[0]!r}: no such option; {hint}"
        raise flags.IllegalFlagValueError(text)
    return chosen


class Recorder:
    """A config that records which keys are read, as dotted names in `read`.

    `to_json` counts as reading none.
    """

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

    def keys(self) -> list[str]:
        """The names in this section."""
        return list(self._config)

    def to_json(self) -> str:
        """The config as JSON."""
        return str(self._config.to_json())


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, ConfigDict) and name not in SCHEMA:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def no_such_key(name: str) -> str:
    """The words for an unknown key.

    Args:
      name: the dotted name.

    Returns:
      One line that names the most similar key, or all keys of the section.
    """
    if name in REMOVED:
        value = REMOVED[name]
        return f"config.{name}: it was removed, and runs compute with {value!r}: leave it out"
    near = difflib.get_close_matches(name, SCHEMA, n=1)
    if near:
        return f"config.{name}: no such key; did you mean config.{near[0]}?"
    section = name.rpartition(".")[0]
    known = [key for key in SCHEMA if key.startswith(f"{section}.")]
    if not section or not known:
        known = sorted({key if "." not in key else key.partition(".")[0] + ".*" for key in SCHEMA})
    listed = ", ".join(f"config.{key}" for key in known)
    return f"config.{name}: no such key; there are {listed} (--help shows all)"


def models_of(config: ConfigDict) -> Registry:
    """The registry of sequence models for the data of a config.

    Without a sequence model it is the registry that has config.model.kind.

    Raises:
      ValueError: config.model.kind is not in the registry.
    """
    kind, classifies = config.model.kind, SOURCES.task_of(config.data.name) == "documents"
    if not is_sequence(config):
        return CLASSIFIERS if kind in CLASSIFIERS else LANGUAGE_MODELS
    registry = CLASSIFIERS if classifies else LANGUAGE_MODELS
    if kind not in registry:
        known = f"for {config.data.name} there are {', '.join(registry)}"
        raise ValueError(f"config.model.kind = {kind!r}: {known}")
    return registry


def is_sequence(config: ConfigDict) -> bool:
    """Whether a sequence model (config.model) reads the data, not a machine (config.machine)."""
    return SOURCES.task_of(config.data.name) != "questions"


def _conflicts(config: ConfigDict) -> Iterator[str]:
    """A message for each conflict between values that are right one by one."""
    data, machine, teacher, train = config.data, config.machine, config.teacher, config.train
    simulated = data.simulated
    if simulated.clicks_min > simulated.clicks_max:
        most = f"config.data.simulated.clicks_max = {simulated.clicks_max}"
        yield f"config.data.simulated.clicks_min = {simulated.clicks_min}: must be at most {most}"
    for name in ("movielens", "table"):
        if data[name].test_fraction + data[name].valid_fraction >= 1:
            fractions = f"config.data.{name}.test_fraction + valid_fraction"
            yield f"{fractions}: must be below 1, so that users are left to train on"
    if teacher.share_items:
        yield from _share_conflicts(config)
    if machine.dim % 2 and SOURCES.asks_in_words(data.name):
        cause = "a bidirectional GRU reads the questions, half of the width in each direction"
        yield f"config.machine.dim = {machine.dim}: must be even: {cause}"
    if is_sequence(config):
        yield from _model_conflicts(config)
    rehearsal, none_sampled = config.rehearsal, "config.rehearsal.sampled_items = 0"
    if rehearsal.negatives in ("near", "stream") and not rehearsal.sampled_items:
        asked = f"config.rehearsal.negatives = {rehearsal.negatives!r}"
        yield f"{asked}: needs config.rehearsal.sampled_items above 0"
    simulates = source_of(config) == "simulated_clicks"
    losses = rehearsal.recollection or rehearsal.familiarity
    if simulates and simulated.labelled < 1 and losses and rehearsal.sampler == "teacher":
        share = f"config.data.simulated.labelled = {simulated.labelled}"
        cause = "the teacher chooses fragments by a question, and some users have none"
        yield f"{share}: needs config.rehearsal.sampler = 'uniform', since {cause}"
    if train.sparse_items and rehearsal.recollection and not rehearsal.sampled_items:
        yield f"config.train.sparse_items: with {none_sampled} every step touches all items"
    if train.sparse_items and (is_sequence(config) or not SOURCES.has_item_table(data.name)):
        yield f"config.train.sparse_items: {data.name} has no item table"
    if train.sparse_items and SOURCES.ranks_items(data.name) and config.ranking.table == "own":
        yield "config.train.sparse_items: needs config.ranking.table = 'shared'"
    if train.model_devices > 1 and train.mapping == "pmap":
        devices = f"config.train.model_devices = {train.model_devices}"
        yield f"{devices}: needs config.train.mapping = 'mesh'"


def _share_conflicts(config: ConfigDict) -> Iterator[str]:
    """The conflicts of config.teacher.share_items."""
    machine, teacher, shares = config.machine, config.teacher, "config.teacher.share_items"
    width = "item_dim" if machine.item_dim and machine.kind == "continual" else "dim"
    if teacher.dim != machine[width]:
        item_width = f"config.machine.{width} = {machine[width]}"
        yield f"{shares}: needs config.teacher.dim = {teacher.dim} to be {item_width}"
    if config.train.start_from and not teacher.dir:
        yield f"{shares} and config.train.start_from: set config.teacher.dir to that run's teacher"
    if config.data.vectors or not SOURCES.has_item_table(config.data.name):
        yield f"{shares}: with word vectors (config.data.vectors) or frames no table can be shared"


def _model_conflicts(config: ConfigDict) -> Iterator[str]:
    """The conflicts of sequence models."""
    model, data, train = config.model, config.data, config.train
    texts = SOURCES.task_of(data.name) == "every token"
    if data.name == "hyperpartisan" and data.segment_length < 3:
        length = f"config.data.segment_length = {data.segment_length}"
        yield f"{length}: must be at least 3, since two tokens of a segment are marks"
    if texts and model.gradient_segments > data.segments:
        reach = f"config.model.gradient_segments = {model.gradient_segments}"
        yield f"{reach}: more than the config.data.segments = {data.segments} of a step: raise that"
    if texts and train.microbatch:
        cure = "lower config.train.batch_size"
        yield f"config.train.microbatch: with texts a device computes all rows at once; {cure}"
    if model.pretrained and train.start_from:
        both = "config.model.pretrained and config.train.start_from"
        yield f"{both}: both give initial values; leave one of them out"
    if data.vectors:
        yield f"config.data.vectors = {data.vectors!r}: for memory machines, not for {data.name}"
    if train.model_devices > 1:
        devices = f"config.train.model_devices = {train.model_devices}"
        yield f"{devices}: splits item tables, and {data.name} has none"
