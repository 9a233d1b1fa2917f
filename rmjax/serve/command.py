"""Serves the live streams of a trained model over HTTP.

    python -m rmjax.serve --workdir=runs/xlong --store=streams.lmdb --port=8000
    curl --json '{"users": ["ann"], "items": [[3, 14]]}' http://127.0.0.1:8000/v1/write
    curl --json '{"users": ["ann"], "queries": [[26, 5]]}' http://127.0.0.1:8000/v1/answer

/openapi.json describes all endpoints, and / is a page to try them. RMJAX_TOKEN in the environment
is a secret that clients must send as 'Authorization: Bearer <token>'. Without it only this machine
is served. SIGTERM ends open requests, closes the store and exits with 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from absl import flags, logging

from rmjax import command_line
from rmjax.io import terminal
from rmjax.run import environment
from rmjax.serve.client import plain_token
from rmjax.serve.model import open_model

_SYNC = {
    "each": "on the disk, each batch of writes at once",
    "group": "on the disk, with all writes of 20 ms",
    "none": "applied in memory; a kill loses the running commit and the group that gathers",
}


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    terminal.plain_logs()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    asked, begin = flags.FLAGS, time.monotonic()
    try:
        if not asked.workdir:
            raise ValueError("--workdir is missing: name the workdir of a trained model")
        logging.info("%s", environment.prepare())
        from rmjax.serve.http import Limits, Service, server

        token = plain_token()
        with contextlib.closing(server.bound(asked.host, asked.port, token)) as opened:
            logging.info("%s", environment.keep_compilations())  # a restart is ready sooner
            environment.find_devices()
            model = open_model(asked.workdir)
            limits = Limits(asked.max_body, asked.max_users, asked.max_items, asked.request_seconds)
            with contextlib.closing(model.streams(**_options(asked))) as streams:
                opened.listen()  # who reads the next line may connect at once, and then waits
                about = asked.workdir, asked.store or "memory", time.monotonic() - begin
                text = "%s: serves %s from %s, which were opened in %.1f s."
                logging.info(text, server.url(opened), *about)
                if asked.store and not len(streams):
                    cure = (
                        "to fill it from a log, stop this service and call rmjax.recommend --store"
                    )
                    logging.info("%s has no users yet: %s.", asked.store, cure)
                server.serve(Service(model, streams, limits), opened, token, asked.connections)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        words = environment.in_words(error).replace(
            "capacity =", "--cache ="
        )  # as the flag is called
        logging.error("%s", words)
        return 1
    logging.info("Closed.")
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process while the model opens: no write was accepted, so nothing is lost."""
    logging.info("%s: stopped before it was ready.", signal.Signals(number).name)
    os._exit(0)


def _options(asked: Any) -> dict[str, Any]:
    """The keyword arguments of `Streams`."""
    options = dict(capacity=asked.cache, delay=asked.delay, queue=asked.queue)
    return options | (dict(store=asked.store, sync=asked.sync) if asked.store else {})


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Workdir of a trained model.")
    help_text = (
        "Database of the streams, which `python -m rmjax.recommend --store` fills from a log; "
        "without it they are in memory."
    )
    flags.DEFINE_string("store", None, help_text)
    flags.DEFINE_string("host", "127.0.0.1", "Address; others than this need RMJAX_TOKEN.")
    flags.DEFINE_integer("port", 8000, "Port; 0: any free one.", lower_bound=0, upper_bound=65535)
    shown = "; ".join(f"{name}: {meaning}" for name, meaning in _SYNC.items())
    flags.DEFINE_enum("sync", "group", list(_SYNC), f"When a write returns. {shown}.")
    help_text = "Users whose streams are on the device, where all others are in the database."
    flags.DEFINE_integer("cache", 16_384, help_text, lower_bound=1)
    help_text = "Most seconds that a request waits for others, to be computed together."
    flags.DEFINE_float("delay", 0.002, help_text, lower_bound=0)
    flags.DEFINE_integer("queue", 1024, "Most requests that wait; others get 429.", lower_bound=1)
    help_text = "Most open connections; one more closes the one that was idle for longest."
    flags.DEFINE_integer("connections", 4096, help_text, lower_bound=1)
    flags.DEFINE_integer("max_body", 1 << 20, "Most bytes of a request.", lower_bound=1)
    flags.DEFINE_integer("max_users", 64, "Most users of a request.", lower_bound=1)
    flags.DEFINE_integer("max_items", 10_000, "Most items of a request.", lower_bound=1)
    help_text = "Most seconds for a client to send a request, and to read the reply."
    flags.DEFINE_float("request_seconds", 10.0, help_text, lower_bound=0.1)


def cli() -> None:
    """Runs the command `python -m rmjax.serve`."""
    command_line.run(main, define_flags)
