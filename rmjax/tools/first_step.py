"""Seconds from the start of a process until the train step of a card is compiled.

    python -m rmjax.bench --cards=all
    python -m rmjax.bench --cards=configs/hyperpartisan.py:local

Every card is compiled in two fresh processes. The first one has an empty cache of compiled programs
('cold'), and the second one has what the first one left in it ('warm'). Data that would be files
are random, in the shapes of the card, so vocabularies are small. No step runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from rmjax.data.source import Source
from rmjax.run import environment, stages
from rmjax.tools import made_up, measures

Fields = dict[str, Any]  # of a JSON object


def measure_cards(asked: str) -> Iterator[Fields]:
    """Measures cards, each in fresh processes.

    Args:
      asked: 'all' for those in configs/, or paths separated by commas, such as a.py,b.py:local.

    Yields:
      For every card: card; shapes, the number of its train steps; and for cold and warm the
      seconds until the first one, and the processor seconds until the first and until the last.

    Raises:
      ValueError: there is no such card.
    """
    for card in cards() if asked == "all" else asked.split(","):
        row: Fields = {"card": card}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):
                begin = time.monotonic()
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    started, seen = pool.submit(compile_card, card, folder).result()
                row |= {"shapes": seen["shapes"], f"{name}_s": started - begin}
                row |= {f"{name}_{key}": seen[key] for key in ("cpu_s", "all_cpu_s")}
        yield row


def cards() -> list[str]:
    """The cards of configs/ that train something, each with its variant 'local' if it has one.

    Raises:
      ValueError: this folder has no configs/.
    """
    result = []
    for path in sorted(Path("configs").glob("*.py")):
        if "data" not in load(str(path)):
            continue
        result.append(str(path))
        with contextlib.suppress(ValueError):  # it has no such variant
            load(f"{path}:local")
            result.append(f"{path}:local")
    if not result:
        raise ValueError("--cards=all: there is no configs/*.py in this folder")
    return result


def load(card: str) -> ConfigDict:
    """The config of a card.

    Args:
      card: a path, and after a colon the card's options.

    Raises:
      ValueError: there is no such file, or no such option.
    """
    path, _, options = card.partition(":")
    spec = importlib.util.spec_from_file_location("card", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"--cards: {path}: no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(*[options] if options else [])
    except flags.Error as error:  # it is no ValueError
        raise ValueError(f"--cards={card}: {error}") from None


def compile_card(card: str, cache: str) -> tuple[float, Fields]:
    """Compiles the train step of a card for every shape of its batches. Runs in a fresh process.

    Args:
      card: see `load`.
      cache: folder of compiled programs.

    Returns:
      The moment at which the first program was ready, by `time.monotonic`; and shapes, cpu_s and
      all_cpu_s: processor seconds of this process until the first and until the last program.
    """
    # This process inherits the variable, if the parent was prepared. Only the JAX flag is missing.
    if "GLIBC_TUNABLES" in os.environ:
        environment.prepare()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    config = load(card)
    run = measures.open_run(config, made_up.source_for(config))
    stage, mapped, state, frozen, batch = stages.first_step(run)
    bucketed = isinstance(run.source, Source) and run.source.buckets("train") is not None
    batches = [batch]
    if bucketed:
        kinds = measures.epoch_shapes(run, stage)
        batches = measures.one_of_each(kind.batch for kind in kinds)
    plain = dataclasses.replace(state, carry=())
    moments, used = [], []
    for one in batches:
        mapped.compiled(plain, state.carry, frozen, one)
        moments.append(time.monotonic())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used.append(usage.ru_utime + usage.ru_stime)
    return moments[0], {"shapes": len(batches), "cpu_s": used[0], "all_cpu_s": used[-1]}
