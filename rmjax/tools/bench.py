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

import datetime
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import config as configs
from rmjax.io import paths
from rmjax.io.progress import Stopped
from rmjax.run import environment
from rmjax.run.workdir import EXIT_PREEMPTED
from rmjax.tools import first_step, made_up, memoria_bench, scaling, turns, work
from rmjax.tools.measures import Measures, measure, open_run

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Number of timed train steps.", lower_bound=1)
_HISTORIES = flags.DEFINE_multi_integer(
    "history",
    [100, 10_000, 1_000_000],
    "Lengths of history, in items, after which a single write and answer are timed.",
    lower_bound=1,
)
_STREAMING = flags.DEFINE_bool(
    "streaming", True, "Also time a machine's single writes and answers."
)
_SIZE = flags.DEFINE_enum(
    "size", None, list(made_up.SIZES), "A size with random data, instead of --config."
)
_SET = flags.DEFINE_multi_string("set", [], "With --size: key=value of the config.")
_WHAT = flags.DEFINE_enum(
    "what",
    "train",
    [*work.WORK],
    "What --against and --turns time: a train step; a segment written, or a question answered, for "
    "1 or 256 streams.",
)
_TURNS = flags.DEFINE_bool("turns", False, "Speaks the protocol of rmjax.tools.turns.")
_AGAINST = flags.DEFINE_string("against", None, "A command that is timed in turns with --what.")
_PAIRS = flags.DEFINE_integer("pairs", 11, "Number of turns of each process.", lower_bound=1)
_MOST_LOAD = flags.DEFINE_float(
    "most_load",
    0.1,
    "Cores that others may use while two processes are compared; above, nothing is judged.",
    lower_bound=0.0,
)
_MACHINES = flags.DEFINE_string(
    "machines", None, "With --size: the machines whose train steps are timed; 'all', or a,b,c."
)
_CARDS = flags.DEFINE_string(
    "cards", None, "Cards whose first steps are timed: 'all' of configs/, or paths a.py,b.py:local."
)
_SCALE = flags.DEFINE_list("scale", None, "Numbers of devices to model.")
_RECORD = flags.DEFINE_string("record", None, "A file that gets a line of JSON for every result.")


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
    if _CARDS.value:
        _record("first step", first_step.measure_cards(_CARDS.value))
        return
    if _AGAINST.value:  # JAX does not start in this process, which only waits
        ours = [sys.executable, "-m", "rmjax.bench", "--turns", *_other_flags(sys.argv[1:])]
        theirs = shlex.split(_AGAINST.value)
        result = turns.compare(ours, theirs, _PAIRS.value, _MOST_LOAD.value)
        size = _SIZE.value or flags.FLAGS["config"].value
        named = {"size": str(size), "what": _WHAT.value, "against": _AGAINST.value}
        _record("against", [named | work.with_share(result)])
        return
    config, source = _CONFIG.value, None
    if _SIZE.value:
        config, source = made_up.sized(_SIZE.value, dict(map(_setting, _SET.value)))
    elif config is None:
        raise ValueError("--config is missing, and so are --size and --cards: give one of them")
    of_memoria = "data" not in config  # as in configs/memoria_bench.py
    if not of_memoria:
        configs.validate(config)
    if _SCALE.value:
        _record("scaling", scaling.rows(config, source, list(map(int, _SCALE.value))))
        return
    setup = environment.prepare()
    environment.find_devices()
    if _MACHINES.value:
        kinds = work.machines(_MACHINES.value)
        size = _SIZE.value or ""
        rows = (work.measure_machine(kind, size, _REPEATS.value) for kind in kinds)
        _record("machines", [{"size": size, "environment": setup} | row for row in rows])
    elif _TURNS.value:
        call, flops = work.make(open_run(config, source), _WHAT.value)
        turns.speak(call, {"environment": setup} | flops | work.about(config.train.devices))
    elif of_memoria:
        result = {"environment": setup, **memoria_bench.measure_rows(config.memoria)}
        _record("memoria", [result], show=False)
        print(json.dumps(result, indent=1))
    else:
        histories = _HISTORIES.value if _STREAMING.value else ()
        result = measure(config, _REPEATS.value, histories, setup, source)
        _record("step", [result], show=False)
        print(json.dumps(result, indent=1))


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


def _setting(text: str) -> tuple[str, object]:
    """Reads 'key=value' of --set."""
    key, equals, value = text.partition("=")
    if not equals or key not in configs.SCHEMA:
        raise ValueError(f"--set={text}: must be key=value, with a key of the config")
    kind = type(configs.SCHEMA[key].default)
    if kind is bool:
        return key, value.lower() in ("true", "1")
    return key, kind(value)


def _record(kind: str, rows: Iterable[Measures], show: bool = True) -> None:
    """Prints rows as a table, and adds them to the file of --record."""
    rows = list(rows)
    if show:
        flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in rows]
        print(work.markdown(flat))
    if _RECORD.value:
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with paths.resolve(_RECORD.value, "--record").open("a") as file:
            for row in rows:
                file.write(json.dumps({"kind": kind, "time": moment} | row) + "\n")


def cli() -> None:
    """Runs the command `python -m rmjax.bench`."""
    configs.check_flags(sys.argv, also=memoria_bench.KEYS)
    app.run(main, flags_parser=configs.parse_flags)
