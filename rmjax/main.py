"""The command `python -m rmjax.main`: trains, tests, explains and probes.

    python -m rmjax.main --config=configs/xlong.py:local --workdir=runs/xlong

Every key of rmjax/config.py is a flag too: --config.train.steps=100. --help shows all flags.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds, so that signals count
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()

import json
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rmjax import command_line
from rmjax import config as configs
from rmjax.io import paths, terminal
from rmjax.io.progress import Stopped
from rmjax.run import environment, evaluate, processes, training
from rmjax.run.workdir import EXIT_MISTAKE, EXIT_PREEMPTED
from rmjax.tools import explain, probe

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Path of a config file; `configs/xlong.py:local` selects its option 'local'."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints and logs; the same command line resumes a run that stopped.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With several processes: host:port of process 0."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Finds the processes by itself, on a TPU pod or in Kubernetes."
)
_UNREAD = flags.DEFINE_enum(
    "unread", "refuse", ["refuse", "warn"], "How to treat a flag that this run does not read."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "explain", "probe"],
    "train: train and test; eval: test; explain: print the cost of a run; probe: measure what the "
    "memory forgets.",
)


def main(argv: Sequence[str]) -> int:
    """Runs one mode.

    Args:
      argv: the arguments that are no flags; ignored.

    Returns:
      The exit code: 0, 1 after a mistake, `EXIT_PREEMPTED` if the run was asked to stop.
    """
    del argv
    logging.set_verbosity(logging.INFO)
    terminal.plain_logs()
    try:
        return _run(_CONFIG.value, _MODE.value)
    except Stopped as stopped:
        logging.warning("Stopped: %s.", stopped)
        return EXIT_PREEMPTED
    except Exception as error:
        return _exit_code(error)


def _run(config: ConfigDict, mode: str) -> int:
    """Checks the flags, sets up the process, and runs the mode."""
    configs.validate(config)
    if _UNREAD.value == "refuse":
        command_line.refuse_unread(config, sys.argv)
    if not _WORKDIR.value and mode != "explain":
        raise ValueError("--workdir is missing: name a directory for checkpoints and logs")
    workdir = paths.resolve_checkpoint(_WORKDIR.value or "", "--workdir")
    logging.info("%s", environment.prepare())  # the program may begin again, so warnings follow
    if _UNREAD.value == "warn":
        command_line.warn_of_unread(config, sys.argv)
    group = (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value)
    logging.info("%s", processes.join(*group))
    if mode == "explain":
        environment.simulate(config.train.devices)
    environment.find_devices()
    if mode == "explain":
        print(json.dumps(explain.report(config), indent=1))
        return 0
    logging.info("%s", environment.keep_compilations())
    if mode == "probe":
        print(probe.show(probe.measure(config, workdir)))
        return 0
    run = training.train if mode == "train" else training.evaluate_only
    rows = run(config, workdir)
    if jax.process_index() == 0:
        print(evaluate.show(rows))
    return 0


def _exit_code(error: Exception) -> int:
    """Logs an error in one line, with a traceback if its type is unexpected."""
    gone = processes.lost(error)
    if gone is not None:
        cure = "Saved checkpoints are intact: run the same command line again, on all processes."
        logging.error("%s. %s", gone, cure)
        processes.leave(EXIT_PREEMPTED)
    known = isinstance(error, (ValueError, OSError, RuntimeError, FloatingPointError, ImportError))
    logging.error("%s", environment.in_words(error), exc_info=None if known else error)
    if processes.several():
        # An orderly exit would wait for the other processes, which wait for this one.
        processes.leave(EXIT_MISTAKE)
    return 1


def cli() -> None:
    """The command `python -m rmjax.main`."""
    command_line.check_flags(sys.argv)
    app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli()
