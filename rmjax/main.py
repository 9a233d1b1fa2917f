"""Flags only: python -m rmjax.main --config=configs/xlong.py:local --workdir=runs/xlong.

Any key of rmjax/config.py is a flag too: --config.train.steps=100. --help shows them all.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds: a signal is answered then too
    from rmjax.run.workdir import leave_when_asked

    leave_when_asked()

import json
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import config as configs
from rmjax.io import paths
from rmjax.io.progress import Stopped
from rmjax.run import environment, evaluate, processes, training
from rmjax.run.workdir import EXIT_MISTAKE, EXIT_PREEMPTED
from rmjax.tools import explain, probe

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Path of a config file; `configs/xlong.py:local` passes it 'local'."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and logs go; the same line goes on where a run stopped."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of several processes: host:port of process 0."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Finds them by itself, on a TPU pod or in Kubernetes."
)
_UNREAD = flags.DEFINE_enum(
    "unread", "refuse", ["refuse", "warn"], "What is done with a flag that this run does not read."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "explain", "probe"],
    "Train and test; test only; tell the cost; or what is forgotten.",
)


def main(argv: Sequence[str]) -> int:
    del argv
    logging.set_verbosity(logging.INFO)
    config = _CONFIG.value
    try:
        configs.validate(config)
        configs.refuse_unread(config, sys.argv, _UNREAD.value == "warn")
        if not _WORKDIR.value and _MODE.value != "explain":
            raise ValueError("--workdir is missing: name a directory for checkpoints and logs")
        workdir = paths.resolve_checkpoint(_WORKDIR.value or "", "--workdir")
        logging.info("%s", environment.prepare())
        logging.info(
            "%s",
            processes.join(
                _COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
            ),
        )
        if _MODE.value == "explain":
            environment.simulate(config.train.devices)
        environment.find_devices()
        if _MODE.value == "explain":
            print(json.dumps(explain.report(config), indent=1))
            return 0
        logging.info("%s", environment.keep_compilations())
        if _MODE.value == "probe":
            print(probe.show(probe.measure(config, workdir)))
            return 0
        run = training.train if _MODE.value == "train" else training.evaluate_only
        rows = run(config, workdir)
        if jax.process_index() == 0:
            print(evaluate.show(rows))
    except Stopped as stopped:
        logging.warning("Stopped: %s.", stopped)
        return EXIT_PREEMPTED
    except Exception as error:
        gone = processes.lost(error)
        if gone is not None:
            logging.error(
                "%s. What was saved is whole: run the same line again, on all of them.", gone
            )
            processes.leave(EXIT_PREEMPTED)
        known = isinstance(
            error, (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)
        )
        logging.error("%s", environment.in_words(error), exc_info=None if known else error)
        if processes.several():
            processes.leave(
                EXIT_MISTAKE
            )  # an orderly end would wait for the others, and they for this one
        return 1
    return 0


def cli() -> None:
    """The command `python -m rmjax.main`."""
    configs.check_flags(sys.argv)
    app.run(main, flags_parser=configs.parse_flags)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli()
