"""The command line: flags for the keys of a config, --import, --list and --help.

A wrong flag is answered by one line: cause and cure.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict

from rmjax.config import RENAMED, SCHEMA, base, flatten, no_such_key, rename, why_unread
from rmjax.io import paths
from rmjax.registry import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    MACHINES,
    REGISTRIES,
    SOURCES,
    Field,
    Registry,
    anything,
    expected,
    fields_of,
)

IMPORT = flags.DEFINE_list(
    "import", [], "Modules to import, which register kinds, such as my_package.memories."
)
flags.DEFINE_string(
    "list",
    None,
    "All kinds; --list=machine.rehearsal: the keys of one; --list=train: of a section.",
)


def check_flags(argv: list[str], also: str = "$^") -> None:
    """Acts on --import, --help and --list, and checks the keys and values of --config.* flags.

    Call it before absl parses the flags. absl would answer a wrong key with a traceback, and end
    --help with the exit code of a mistake.

    Args:
      argv: the command line. Flags of renamed keys get their names of today in it.
      also: a regular expression; keys that match it entirely are not checked.

    Raises:
      SystemExit: with one line that names the wrong key or value, and the cure; or with 0 after
        --help or --list.
    """
    import_modules(argv)
    answer_list(argv)
    answer_help(argv, describe())
    rename_flags(argv)
    for name, value, alone in _flags_in(argv):
        override = re.fullmatch(r"(?:no)?config\.(.+)", name)
        if not override or re.fullmatch(also, override[1]):
            continue
        key = override[1]
        if not any(f"{known}.".startswith(f"{key}.") for known in SCHEMA):
            raise SystemExit(no_such_key(key))
        if key in SCHEMA and name.startswith("config"):
            _check_text(key, value, alone)


def rename_flags(argv: list[str]) -> None:
    """Gives flags of renamed keys their names of today, and says so.

    Args:
      argv: the command line; it is changed in place. With a renamed key, the flags of a --flagfile
        are put in its place.
    """
    arguments = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    for i, argument in enumerate(arguments):
        flag = re.fullmatch(r"(--?(?:no)?config\.)([^=]+)(.*)", argument, re.DOTALL)
        if flag and flag[2] in RENAMED:
            new = RENAMED[flag[2]]
            logging.warning("config.%s is called config.%s today.", flag[2], new)
            arguments[i] = f"{flag[1]}{new}{flag[3]}"
            argv[:] = arguments


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; pass it to `app.run` as `flags_parser`.

    Args:
      argv: the command line.

    Returns:
      The arguments that are no flags: the program's name.

    Raises:
      SystemExit: with one line that says what is wrong with the flags or the config file.
    """
    defined = "config" in flags.FLAGS
    cards = [value for name, value, _ in _flags_in(argv) if name == "config" and defined]
    for card in cards:
        _check_card(card)
    try:
        rest = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise SystemExit(_no_such_flag(error.flagname)) from None
    except flags.Error as error:
        if "parsing config file" in str(error):
            # absl and ml_collections have wrapped the card's own error.
            original = error.__context__ and error.__context__.__context__
            raise SystemExit(_card_error(cards[-1], original or error)) from None
        missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
        if missing:
            raise SystemExit(f"--{missing[1]} is missing: {flags.FLAGS[missing[1]].help}") from None
        text = str(error).rstrip(".")
        text = re.sub(r"invalid literal for int.*", "must be a whole number", text)
        text = re.sub(r"could not convert string to float.*", "must be a number", text)
        raise SystemExit(f"{text}; --help shows all flags") from None
    except Exception as error:  # a card may raise anything
        raise SystemExit(_card_error(cards[-1], error)) from None
    if defined and isinstance(flags.FLAGS["config"].value, ConfigDict):
        try:
            rename(flags.FLAGS["config"].value, _flagged(argv))
        except ValueError as error:
            raise SystemExit(str(error)) from None
    if len(rest) > 1:
        cure = "options are flags, such as --mode=eval, without spaces around ="
        raise SystemExit(f"unexpected arguments: {' '.join(rest[1:])}; {cure}")
    return rest


def refuse_unread(config: ConfigDict, argv: Sequence[str]) -> None:
    """Refuses flags for keys that the run does not read. A card may set such keys.

    Args:
      config: of the run.
      argv: the command line.

    Raises:
      ValueError: a flag sets such a key; names the key, the reason, and the cure.
    """
    for flag, why in unread_flags(config, argv).items():
        cure = "leave the flag out, or change that"
        raise ValueError(f"{flag}: this run does not read it, since {why}: {cure}")


def warn_of_unread(config: ConfigDict, argv: Sequence[str]) -> None:
    """Warns, in one line, of flags for keys that the run does not read.

    The rows of a table share one set of flags, of which a row may read a part.

    Args:
      config: of the run.
      argv: the command line.
    """
    if unread := unread_flags(config, argv):
        by_reason: dict[str, list[str]] = {}
        for flag, why in unread.items():
            by_reason.setdefault(why, []).append(flag)
        parts = [f"{', '.join(keys)} (since {why})" for why, keys in by_reason.items()]
        logging.warning("This run does not read %s.", "; ".join(parts))


def unread_flags(config: ConfigDict, argv: Sequence[str]) -> dict[str, str]:
    """Finds the flags for keys that the run does not read.

    Args:
      config: of the run.
      argv: the command line.

    Returns:
      {"config.<key> = <value>": the reason}.
    """
    flagged = _flagged(argv)
    return {
        f"config.{name} = {value!r}": why
        for name, value in flatten(config)
        if name in flagged and (why := why_unread(config, name))
    }


def run(main: Callable[[list[str]], int], define_flags: Callable[[], None]) -> None:
    """Runs a command that has flags but no config, and ends the process.

    Args:
      main: the command after the flags are parsed; returns the exit code.
      define_flags: defines the flags of the command.

    Raises:
      SystemExit: with the exit code, or with what is wrong with the flags.
    """
    define_flags()
    import_modules(sys.argv)
    answer_help(sys.argv)
    app.run(main, flags_parser=parse_flags)


def import_modules(argv: Sequence[str]) -> None:
    """Imports the modules of --import=my_package.memories,..., which register kinds.

    It acts before flags are parsed, since the kinds' keys are flags.

    Raises:
      SystemExit: a module does not exist or fails; says why.
    """
    listed = [value for name, value, _ in _flags_in(argv) if name == "import"]
    for module in filter(None, ",".join(listed).split(",")):
        if not {"", str(Path.cwd())} & {*sys.path}:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            cure = "name a module as Python imports it, and put its folder into PYTHONPATH"
            raise SystemExit(f"--import={module}: {error}; {cure}") from error
        except Exception as error:
            raise SystemExit(f"--import={module}: {type(error).__name__}: {error}") from error


def answer_list(argv: Sequence[str]) -> None:
    """Prints all kinds for --list, and the keys of a kind or section for --list=machine.gru.

    Raises:
      SystemExit: with 0 after printing; with the right names if there is no such kind.
    """
    for argument in argv[1:]:
        if asked := re.fullmatch(r"--?list(?:=(.*))?", argument):
            print(_listed(asked[1] or ""))
            raise SystemExit(0)


def _listed(name: str) -> str:
    """The text for --list=<name>."""
    if not name:
        rows = [f"{registry.section}: {', '.join(registry)}" for registry in REGISTRIES]
        more = "--list=machine.rehearsal prints the keys of one, --list=train those of a section."
        return "\n".join([*rows, "", more])
    kinds = {f"{r.section}.{kind}": (r, kind) for r in REGISTRIES for kind in r}
    if name in kinds:
        return _keys(_keys_of(*kinds[name])) or f"{name} has no keys of its own."
    in_section = {key: SCHEMA[key] for key in SCHEMA if f"{key}.".startswith(f"{name}.")}
    if not in_section:
        sections = dict.fromkeys(key.rpartition(".")[0] or key for key in SCHEMA)
        near = difflib.get_close_matches(name, [*kinds, *sections], n=1)
        listed = f"the sections are {', '.join(sections)}; the kinds are {', '.join(kinds)}"
        hint = f"did you mean {near[0]}?" if near else listed
        raise SystemExit(f"--list={name}: no such kind or section; {hint}")
    return _keys(in_section)


def _keys(fields: Mapping[str, Field]) -> str:
    """Keys as flags, each with its default, its meaning and its values."""
    lines = []
    for key, field in fields.items():
        values = "" if field.check is anything else f" ({expected(field)})"
        lines.append(f"--config.{key}={field.default!r}  {field.doc}{values}")
    return "\n".join(lines)


def _keys_of(registry: Registry, kind: str) -> dict[str, Field]:
    """The keys of a kind; of a machine or a model also the shared ones that it reads."""
    section = f"data.{SOURCES.section_of(kind)}" if registry is SOURCES else registry.section
    own = {f"{section}.{key}": field for key, field in fields_of(registry[kind].settings).items()}
    config, sections = base(), ["model.", "memoria."]
    if registry is MACHINES:
        config.machine.kind, sections = kind, ["machine."]
    elif registry is LANGUAGE_MODELS or registry is CLASSIFIERS:
        config.data.name = "books" if registry is LANGUAGE_MODELS else "hyperpartisan"
        config.model.kind = kind
    else:
        return own
    shared = {
        name: field
        for name, field in SCHEMA.items()
        if name.startswith(tuple(sections)) and not name.endswith(".kind") and name not in own
    }
    return own | {name: field for name, field in shared.items() if not why_unread(config, name)}


def answer_help(argv: Sequence[str], more: str = "") -> None:
    """Prints the program's flags, and then `more`, if the command line asks for help.

    Raises:
      SystemExit: with 0, after printing.
    """
    asked = [name for argument in argv[1:] if (name := argument.lstrip("-")) != argument]
    if not {"help", "helpshort", "helpfull", "h", "?"}.isdisjoint(asked):
        known = flags.FLAGS
        for module, of_module in known.flags_by_module_dict().items():
            for flag in of_module if module.startswith("rmjax.") else ():  # not only of argv[0]
                known.register_key_flag_for_module(sys.argv[0], flag)
        app.usage(shorthelp="helpfull" not in asked, writeto_stdout=True)
        print(more)
        raise SystemExit(0)


def describe() -> str:
    """The text of --help about keys: each one as a flag, with its meaning, values and default."""
    lines = ["keys of a config (a config file sets them, and a flag changes one):"]
    for name, field in SCHEMA.items():
        values = f"{expected(field)}; default {field.default!r}"
        lines.append(f"  --config.{name}: {field.doc} ({values})")
    return "\n".join(lines)


def _flags_in(argv: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(name, value, alone) of each flag; alone: the flag has no =, so the next argument is it."""
    arguments = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-"):
            yield name, value if equals else following, not equals


def _flagged(argv: Sequence[str]) -> set[str]:
    """The keys that flags set, by dotted name; other flags have their own names."""
    return {re.sub(r"^(no)?config\.", "", name) for name, _, _ in _flags_in(argv)}


def _check_card(value: str) -> None:
    """Ends the process if `--config=value` names no file that may be a card."""
    path = Path(value.partition(":")[0])
    if path.suffix == ".py" and path.is_file():
        return
    cards = [str(card) for card in paths.visible(path if path.is_dir() else path.parent, "*.py")]
    near = difflib.get_close_matches(path.name, [Path(card).name for card in cards], n=1)
    if near and not path.exists():
        cure = f"did you mean {path.with_name(near[0])}?"
    elif cards:
        cure = f"there are {', '.join(cards)}"
    else:
        cure = "cards are in the folder configs of a clone of rmjax: go there, or give the path"
    if path.is_dir():
        cause = "a folder"
    else:
        cause = "no card, which is a .py file" if path.exists() else "no such file"
    raise SystemExit(f"--config={value}: {cause}; {cure}")


def _card_error(card: str, error: BaseException) -> str:
    """The words for an error that a card raised, with the card's line."""
    path = card.partition(":")[0]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    cause = str(error)
    if isinstance(error, SyntaxError):
        lines, cause = [error.lineno], error.msg
    place = f"{path}, line {lines[-1]}" if lines else path
    cure = "mend it; a card defines get_config(arg), which returns a config (see configs/xlong.py)"
    return f"--config={card}: {place}: {type(error).__name__}: {cause}: {cure}"


def _no_such_flag(name: str) -> str:
    """The words for an unknown flag; people often leave out the section of a key."""
    near = [f"--config.{key}" for key in sorted(SCHEMA) if f".{key}".endswith(f".{name}")]
    names = [flag for flag in flags.FLAGS if not flag.startswith("config.")]
    near = near or [f"--{flag}" for flag in difflib.get_close_matches(name, names, n=1)]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help shows all flags"
    return f"--{name}: no such flag; {hint}"


def _check_text(name: str, text: str, alone: bool) -> None:
    """Ends the process if the text of a flag is no value of the key."""
    kind = type(SCHEMA[name].default)
    truth = ("true", "t", "1", "false", "f", "0")  # as absl reads them; a flag alone is true
    try:
        if kind in (int, float):
            kind(text)
        elif kind is bool and not alone and text.lower() not in truth:
            raise ValueError(text)
    except ValueError:
        raise SystemExit(f"config.{name} = {text!r}: must be {expected(SCHEMA[name])}") from None
