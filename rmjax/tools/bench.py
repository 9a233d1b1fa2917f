"""Measures speed and memory.

    python -m rmjax.bench --config=configs/xlong.py

The command prints one JSON object and writes no files. Times are medians of many repeats, and the
clock stops when the device has finished. With configs/memoria_bench.py the command times
steps of Memoria, see `rmjax.tools.memoria_bench`.

--size takes the place of --config: a size by name, with random data. These measure in other ways:

    # In turns with another process that speaks the protocol of `rmjax.tools.turns`:
    python -m rmjax.bench --size=xlong --against='COMMAND' --record=records.jsonl
    python -m rmjax.bench --size=xlong --what=write_256 --against='COMMAND'
    # The train step of every memory at a size:
    python -m rmjax.bench --size=xlong --machines=all
    # Seconds to the first step of cards, with random data (`rmjax.tools.first_step`):
    python -m rmjax.bench --cards=all
    # Step time, memory and communication on many devices, as a model (`rmjax.tools.scaling`):
    python -m rmjax.bench --size=xlong --scale=1,8,64,1024

A script that times PyTorch by a function timed(call, device, seconds) speaks the protocol by
COMMAND = python -m rmjax.tools.turns SCRIPT ARGUMENTS. Another checkout of this package does so by
COMMAND = env PYTHONPATH=FOLDER python -m rmjax.bench --size=xlong --turns. --record=PATH adds a
line of JSON for every result to a file.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import command_line
from rmjax import config as configs
from rmjax.io import paths
from rmjax.io.progress import Stopped
from rmjax.run import environment
from rmjax.run.workdir import EXIT_PREEMPTED
from rmjax.tools import first_step, made_up, memoria_bench, scaling, turns, work
from rmjax.tools.measures import Measures, measure, open_run


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    try:
        _run()
    except Stopped as stopped:
        logging.warning("Stopped: %s.", stopped)
        return EXIT_PREEMPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def _run() -> None:
    """Measures what the flags ask for; prints it and records it."""
    _check_flags()
    if flags.FLAGS.cards:
        environment.prepare()
        _record("first step", first_step.measure_cards(flags.FLAGS.cards))
        return
    if flags.FLAGS.against:  # JAX does not start in this process, which only waits
        _record("against", _compared())
        return
    config, source = flags.FLAGS.config, None
    if flags.FLAGS.size:
        config, source = made_up.sized(flags.FLAGS.size, _changes())
    if "data" in config:
        configs.validate(config)
    if flags.FLAGS.scale:
        _record("scaling", scaling.rows(config, source, _devices(flags.FLAGS.scale)))
        return
    setup = environment.prepare()
    environment.find_devices()
    if flags.FLAGS.machines:
        _record("machines", _machines(setup))
    elif flags.FLAGS.turns:
        call, flops = work.make(open_run(config, source), flags.FLAGS.what)
        turns.speak(call, {"environment": setup} | flops | work.about(config.train.devices))
    elif "data" not in config:
        rows = (
            {"environment": setup, **memoria_bench.measure_rows(one.memoria)} for one in [config]
        )
        _record("memoria", rows, table=False)
    else:
        histories = flags.FLAGS.history if flags.FLAGS.streaming else ()
        rows = (measure(one, flags.FLAGS.repeats, histories, setup, source) for one in [config])
        _record("step", rows, table=False)


def _check_flags() -> None:
    """Refuses flags that do not fit together.

    Raises:
      ValueError: names them.
    """
    asked = flags.FLAGS
    ways = {f"--{name}": getattr(asked, name) for name in ("cards", "against", "scale", "machines")}
    given = [name for name, flag in (ways | {"--turns": asked.turns}).items() if flag]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} measure in different ways: give one of them")
    inputs = {"--cards": asked.cards, "--size": asked.size, "--config": asked.config}
    data = [name for name, flag in inputs.items() if flag]
    if len(data) > 1:
        raise ValueError(f"{' and '.join(data)}: give one of them")
    if not data:
        raise ValueError("--config is missing, and so are --size and --cards: give one of them")
    if flags.FLAGS.machines and not flags.FLAGS.size:
        raise ValueError("--machines needs --size, which gives every machine the same data")
    if flags.FLAGS.machines and not flags.FLAGS.repeats:
        raise ValueError("--machines times steps: --repeats must be at least 1")
    if flags.FLAGS.set and not flags.FLAGS.size:
        raise ValueError("--set changes a size: with --config use --config.KEY=VALUE")
    if flags.FLAGS.what != "train" and not (flags.FLAGS.against or flags.FLAGS.turns):
        raise ValueError(f"--what={flags.FLAGS.what} needs --against")
    if given and flags.FLAGS.config and "data" not in flags.FLAGS.config:
        raise ValueError(f"{given[0]} needs the card of a run; this card is one of Memoria's steps")


def _compared() -> Iterator[Measures]:
    """Times this package and the command of --against in turns."""
    ours = [sys.executable, "-m", "rmjax.bench", "--turns", *_other_flags(sys.argv[1:])]
    theirs = shlex.split(flags.FLAGS.against)
    result = turns.compare(ours, theirs, flags.FLAGS.pairs, flags.FLAGS.most_load)
    size = flags.FLAGS.size or flags.FLAGS["config"].value
    named = {"size": str(size), "what": flags.FLAGS.what, "against": flags.FLAGS.against}
    yield named | work.with_share(result)


def _machines(setup: str) -> Iterator[Measures]:
    """Measures the machines of --machines at a size; an error if none can be trained."""
    size, trained = flags.FLAGS.size or "", False
    for kind in work.machines(flags.FLAGS.machines or ""):
        row = work.measure_machine(kind, size, flags.FLAGS.repeats, _changes())
        trained |= "error" not in row
        yield {"size": size, "environment": setup} | row
    if not trained:
        raise ValueError(
            f"--machines={flags.FLAGS.machines}: none of them could be trained, see above"
        )


# Flags of the process that compares; the process that it starts has all others.
_OURS = re.compile(r"--?(?:against|pairs|most_load|record)(=|$)")


def _other_flags(argv: Sequence[str]) -> list[str]:
    """The flags that are not in `_OURS`; a value may stand in an argument of its own."""
    kept: list[str] = []
    value = False
    for argument in argv:
        ours = None if value else _OURS.match(argument)
        if not value and not ours:
            kept.append(argument)
        value = bool(ours and not ours[1])
    return kept


def _changes() -> dict[str, object]:
    """The changes of --set."""
    return dict(map(_setting, flags.FLAGS.set or ()))


def _setting(text: str) -> tuple[str, object]:
    """Reads 'key=value' of --set."""
    key, equals, value = text.partition("=")
    if not equals or key not in configs.SCHEMA:
        raise ValueError(f"--set={text}: must be key=value, with a key of the config")
    kind = type(configs.SCHEMA[key].default)
    booleans = {"true": True, "1": True, "false": False, "0": False}
    try:
        return key, booleans[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise ValueError(f"--set={text}: the value of {key} must be {expected}") from None


def _devices(texts: Sequence[str]) -> list[int]:
    """Reads the numbers of --scale."""
    try:
        return list(map(int, texts))
    except ValueError:
        given = ",".join(texts)
        raise ValueError(f"--scale={given}: must be whole numbers, such as 1,8,64") from None


def _record(kind: str, rows: Iterable[Measures], table: bool = True) -> None:
    """Prints each row as soon as it is measured, and adds it to the file of --record.

    Args:
      kind: of the rows, for the file.
      rows: what is measured; the file is open before the first one.
      table: prints a table; False: JSON.
    """
    path = paths.resolve(flags.FLAGS.record, "--record") if flags.FLAGS.record else None
    names: tuple[str, ...] = ()
    with path.open("a") if path else contextlib.nullcontext() as file:
        for row in rows:
            flat = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
            text = work.markdown(flat, names) if table else json.dumps(row, indent=1)
            print(text, flush=True)
            names = tuple(flat)
            if file:
                moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                file.write(json.dumps({"kind": kind, "time": moment} | row) + "\n")
                file.flush()


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Path of a config file.")
    flags.DEFINE_integer(
        "repeats", 20, "Number of timed train steps; 0: they are only compiled.", lower_bound=0
    )
    flags.DEFINE_multi_integer(
        "history",
        [100, 10_000, 1_000_000],
        "Lengths of history, in items, after which a single write and answer are timed.",
        lower_bound=1,
    )
    flags.DEFINE_bool("streaming", True, "Also time a machine's single writes and answers.")
    flags.DEFINE_enum(
        "size", None, list(made_up.SIZES), "A size with random data, instead of --config."
    )
    flags.DEFINE_multi_string("set", [], "With --size: key=value of the config.")
    flags.DEFINE_enum(
        "what",
        "train",
        [*work.WORK],
        "What --against and --turns time: a train step; a segment written, or a question answered, "
        "for 1 or 256 streams.",
    )
    flags.DEFINE_bool("turns", False, "Speaks the protocol of rmjax.tools.turns.")
    flags.DEFINE_string("against", None, "A command that is timed in turns with --what.")
    flags.DEFINE_integer("pairs", 11, "Number of turns of each process.", lower_bound=1)
    flags.DEFINE_float(
        "most_load",
        0.1,
        "Cores that others may use while two processes are compared; above, nothing is judged.",
        lower_bound=0.0,
    )
    flags.DEFINE_string(
        "machines", None, "With --size: the machines whose train steps are timed; 'all', or a,b,c."
    )
    flags.DEFINE_string(
        "cards",
        None,
        "Cards whose first steps are timed: 'all' of configs/, or paths a.py,b.py:local.",
    )
    flags.DEFINE_list("scale", None, "Numbers of devices to model.")
    flags.DEFINE_string("record", None, "A file that gets a line of JSON for every result.")


def cli() -> None:
    """Runs the command `python -m rmjax.bench`."""
    define_flags()
    command_line.check_flags(sys.argv, also=memoria_bench.KEYS)
    app.run(main, flags_parser=command_line.parse_flags)
