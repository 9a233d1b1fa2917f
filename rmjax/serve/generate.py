"""Writes text with a trained language model; the text comes to the terminal piece by piece.

python -m rmjax.generate --workdir=runs/books --prompt="It was" --tokens=200
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from absl import flags, logging

from rmjax import command_line
from rmjax.run import environment
from rmjax.serve.model import open_model


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    asked = flags.FLAGS
    try:
        if not asked.workdir:
            raise ValueError("give --workdir, of a trained language model")
        logging.info("%s", environment.prepare())
        environment.find_devices()
        options = asked.temperature, asked.top_p, asked.seed
        pieces = open_model(asked.workdir).stream(asked.prompt, asked.tokens, *options)
        print(asked.prompt, end="", flush=True)
        begin = compiled = time.perf_counter()
        for number, piece in enumerate(pieces):
            print(piece, end="", flush=True)
            if not number:  # the first token waits for the compiler
                compiled = time.perf_counter()
        print()
        rate = (asked.tokens - 1) / max(time.perf_counter() - compiled, 1e-9)
        took = compiled - begin
        logging.info("First piece after %.1f s; then %.0f tokens a second.", took, rate)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", "", "Workdir of a trained language model.")
    flags.DEFINE_string("prompt", "", "The text to continue.")
    flags.DEFINE_integer("tokens", 100, "Number of tokens to draw.")
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0: always the likeliest token.")
    flags.DEFINE_float("top_p", 1.0, "Draws among the likeliest tokens of this probability.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.")


def cli() -> None:
    """Runs the command `python -m rmjax.generate`."""
    command_line.run(main, define_flags)
