"""Measures how fast a store of streams answers while requests arrive at a fixed rate.

    python -m rmjax.load_test --config=configs/xlong.py --users=100000 --rate=500 --seconds=60

Requests arrive on schedule, whether earlier ones are done or not. The command prints one JSON
object for each length of history. The object holds percentiles of the milliseconds from arrival to
result, and the largest difference from offline evaluation. --workdir names a trained model; without
it, the model of --config is untrained.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rmjax import config as configs
from rmjax import tasks
from rmjax.data import describe, make_source
from rmjax.data.source import Description
from rmjax.io import paths
from rmjax.machines import memorize
from rmjax.run import environment
from rmjax.serve.checks import of_items
from rmjax.serve.model import open_model
from rmjax.serve.store import Streams
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Params, Task, at

BASES = 8  # different histories; every user has a copy of one of them
CHECKED = 64  # users whose last answers are compared with offline evaluation
PERCENTILES = (50, 90, 99, 99.9, 100)


class Request(NamedTuple):
    """One write or one question of one user."""

    time: float  # arrival, in seconds after the start
    user: int
    ids: np.ndarray  # [n] items to write, or queries to answer
    writes: bool


def requests(
    rate: float, seconds: float, users: int, items: int, kinds: int = 0, seed: int = 0
) -> list[Request]:
    """Draws random requests: half write 1 to 20 items, half ask 1 to 16 queries.

    Args:
      rate: mean number of requests a second; arrivals are a Poisson process.
      seconds: mean length of the schedule.
      users: number of users.
      items: number of item ids.
      kinds: number of kinds of question; 0: queries are about items.
      seed: of the random numbers.

    Returns:
      The requests, in order of arrival.
    """
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, round(rate * seconds)))
    writes = rng.random(len(times)) < 0.5
    sizes = np.where(writes, rng.integers(1, 21, len(times)), rng.integers(1, 17, len(times)))
    who = rng.integers(0, users, len(times))
    return [
        Request(
            float(arrival),
            int(user),
            rng.integers(0, items if w else kinds or items, size),
            bool(w),
        )
        for arrival, user, size, w in zip(times, who, sizes, writes, strict=True)
    ]


def serve(
    store: Streams, wanted: Sequence[Request], most: int = 64
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Serves requests in real time; those that have arrived meanwhile are served together.

    Args:
      store: the store to test.
      wanted: [n] requests, in order of arrival. A user's requests keep this order.
      most: most requests that are served together.

    Returns:
      Seconds from each request's arrival to the result, f64 [n]; and the n answers, f32 [Q] each,
      None for writes.
    """
    seconds: np.ndarray = np.zeros(len(wanted))
    answers: list[np.ndarray | None] = [None] * len(wanted)
    begin, done = time.perf_counter(), 0
    while done < len(wanted):
        elapsed = time.perf_counter() - begin
        if wanted[done].time > elapsed:
            time.sleep(wanted[done].time - elapsed)
            continue
        due = [k for k in range(done, min(done + most, len(wanted))) if wanted[k].time <= elapsed]
        while due:
            part = _next_part(wanted, due)
            users, ids = [wanted[k].user for k in part], [wanted[k].ids for k in part]
            if wanted[part[0]].writes:
                store.write(users, ids)
                store.wait()
            else:
                for k, scores in zip(part, store.answer(users, ids), strict=True):
                    answers[k] = scores
            seconds[part] = time.perf_counter() - begin - np.array([wanted[k].time for k in part])
            due = [k for k in due if k not in set(part)]
            done += len(part)
    return seconds, answers


def _next_part(wanted: Sequence[Request], due: Sequence[int]) -> list[int]:
    """Returns the due requests of the first one's kind that can be served with the first one.

    Requests of a user that come after the user's first request of the other kind have to wait.
    """
    kind = wanted[due[0]].writes
    first_other: dict[int, int] = {}  # {user: first request of the other kind}
    for k in due:
        if wanted[k].writes != kind:
            first_other.setdefault(wanted[k].user, k)
    same = [k for k in due if wanted[k].writes == kind]
    return [k for k in same if k < first_other.get(wanted[k].user, len(wanted))]


def run_test(
    task: Reasoning,
    params: Params,
    history: int,
    wanted: Sequence[Request],
    users: int,
    **options: Any,
) -> dict[str, Any]:
    """Fills a store, serves the requests, and checks the answers.

    Args:
      task: a task whose streams hold item ids.
      params: of the task.
      history: items that each user's stream has before the first request.
      wanted: the requests, in order of arrival.
      users: number of users.
      **options: keyword arguments of `Streams`.

    Returns:
      The object that is printed: percentiles in milliseconds of 'write_ms', 'answer_ms' and
      'all_ms'; counts; seconds; and 'largest_difference', see `largest_difference`.
    """
    assert task.table is not None
    items = len(at(params, task.table))
    store = Streams(task, params, capacity=users, segments=(1, 64), **options)
    bases = np.random.default_rng(1).integers(0, items, (BASES, history))
    begin = time.perf_counter()
    store.compile()
    compiled = time.perf_counter()
    many = min(BASES, users)
    store.write(range(many), list(bases[:many]))
    for base in range(many):
        store.fork(base, range(base + BASES, users, BASES))
    filled = time.perf_counter()
    seconds, answers = serve(store, wanted)
    count = len(store)
    store.close()
    ms, writes = 1e3 * seconds, np.array([request.writes for request in wanted])
    result: dict[str, Any] = {
        name: {f"p{p:g}": round(float(np.percentile(ms[which], p)), 2) for p in PERCENTILES}
        for name, which in (("write_ms", writes), ("answer_ms", ~writes), ("all_ms", writes | True))
    }
    return result | {
        "history": history,
        "users": count,
        "requests": len(wanted),
        "compile_seconds": round(compiled - begin, 1),
        "fill_seconds": round(filled - compiled, 1),
        "largest_difference": largest_difference(task, params, bases, wanted, answers),
    }


def largest_difference(
    task: Reasoning,
    params: Params,
    bases: np.ndarray,
    wanted: Sequence[Request],
    answers: Sequence[np.ndarray | None],
) -> float:
    """Compares the last answers of `CHECKED` users with offline evaluation of the same streams.

    Args:
      task: the served task.
      params: of the task.
      bases: i64 [BASES, history], the histories; user u began with row u % BASES.
      wanted: [n] requests, in order of arrival.
      answers: the n answers, None for writes.

    Returns:
      The largest absolute difference of a score.
    """
    n = task.segment_length
    last = {request.user: k for k, request in enumerate(wanted) if not request.writes}
    chosen = list(last.items())[-CHECKED:]
    streams = []
    for user, k in chosen:
        written = [request.ids for request in wanted[:k] if request.user == user and request.writes]
        streams.append(np.concatenate([bases[user % BASES], *written]))
    longest = -(-max(map(len, streams)) // n) * n

    @jax.jit
    def offline(items: Array, mask: Array, query: Array) -> Array:
        memory = memorize(task.machine, params["machine"], items, mask, block=64).memory
        return task.answer(params, memory, query, query >= 0)

    worst = 0.0
    for (_, k), stream in zip(chosen, streams, strict=True):
        padded = np.pad(stream, (0, longest - len(stream))).astype(np.int32)
        mask, query = np.arange(longest) < len(stream), np.full(16, -1, np.int32)
        query[: len(wanted[k].ids)] = wanted[k].ids
        (expected,) = np.asarray(
            offline(padded.reshape(1, -1, n), mask.reshape(1, -1, n), query[None])
        )
        answer = answers[k]
        assert answer is not None
        worst = max(worst, float(np.abs(expected[: len(answer)] - answer).max()))
    return worst


def _model(workdir: str | None, config: ConfigDict | None) -> tuple[Task, Params, Description]:
    """The trained model of a workdir, or the untrained one of a config."""
    if workdir:
        model = open_model(workdir)
        return model.task, model.params, model.description
    if config is None:
        raise ValueError("name a model: --workdir of a trained one, or --config")
    configs.validate(config)
    data = describe(config.data, make_source(config.data, config.data.seed))
    task = tasks.make_task(config, data)
    return task, jax.jit(task.init)(jax.random.key(config.seed)), data


def main(argv: Sequence[str]) -> int:
    """Runs the command after the flags are parsed; returns the exit code."""
    del argv
    logging.set_verbosity(logging.INFO)
    asked = flags.FLAGS
    try:
        logging.info("%s", environment.prepare())
        environment.find_devices()
        any_task, params, data = _model(asked.workdir, asked.config)
        task = of_items(any_task)
        kinds = task.answers.questions.kinds or data.num_items
        wanted = requests(asked.rate, asked.seconds, asked.users, data.num_items, kinds)
        for history in map(int, asked.histories):
            options: Mapping[str, Any] = {}
            if asked.folder:
                options = {"store": paths.resolve(asked.folder, "--folder") / str(history)}
            result = run_test(task, params, history, wanted, asked.users, **options)
            print(json.dumps({"rate": asked.rate} | result), flush=True)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Path of a config file, for an untrained model."
    )
    flags.DEFINE_string("workdir", None, "Workdir of a trained model, instead of --config.")
    flags.DEFINE_integer("users", 100_000, "Number of users that have a stream.", lower_bound=1)
    flags.DEFINE_float(
        "rate", 500.0, "Requests a second; half of them write, half ask.", lower_bound=0.1
    )
    flags.DEFINE_float("seconds", 60.0, "Seconds during which requests arrive.", lower_bound=0.1)
    flags.DEFINE_list(
        "histories", ["100", "1000", "100000"], "Items of a stream before the first request."
    )
    flags.DEFINE_string(
        "folder", None, "Keeps the streams in databases there, not on the device alone."
    )
    numbers = lambda histories: all(size.isdecimal() and int(size) for size in histories)
    register: Callable[..., None] = flags.register_validator
    register(
        "histories", numbers, message="must be whole numbers from 1 on, as --histories=100,1000"
    )


def cli() -> None:
    """Runs the command `python -m rmjax.load_test`."""
    define_flags()
    configs.check_flags(sys.argv)
    app.run(main, flags_parser=configs.parse_flags)
