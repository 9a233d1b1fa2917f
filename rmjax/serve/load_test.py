"""How long a store of streams takes to answer: requests come at a fixed rate, whether those before are done or not.

    python -m rmjax.load --config=configs/xlong.py --users=100000 --rate=500 --seconds=60

One JSON object a length of history: percentiles of milliseconds from a request's arrival to its result, and how far
answers are from those of offline evaluation. With --workdir of a trained model; without, of an untrained one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from rmjax import config as configs
from rmjax import tasks
from rmjax.data import describe, make_source
from rmjax.io import paths
from rmjax.machines import memorize
from rmjax.run import environment
from rmjax.serve.model import open_model
from rmjax.serve.store import Streams, of_items
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Params, at

BASES = 8  # different histories, of which all users' are copies
CHECKED = 64  # users whose answers are worked out anew


class Request(NamedTuple):
    time: float  # of arrival, seconds
    user: int
    ids: np.ndarray  # items that are written, or asked about
    writes: bool


def requests(
    rate: float, seconds: float, users: int, items: int, kinds: int = 0, seed: int = 0
) -> list[Request]:
    """In order of arrival, which is random: 1 to 20 items are written, 1 to 16 asked about, or so many `kinds`."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, round(rate * seconds)))
    writes = rng.random(len(times)) < 0.5
    sizes = np.where(writes, rng.integers(1, 21, len(times)), rng.integers(1, 17, len(times)))
    who = rng.integers(0, users, len(times))
    return [
        Request(
            float(at), int(user), rng.integers(0, items if w else kinds or items, size), bool(w)
        )
        for at, user, size, w in zip(times, who, sizes, writes, strict=True)
    ]


def serve(
    store: Streams, wanted: Sequence[Request], most: int = 64
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """-> seconds from each request's arrival to its result f64 [n], and the answers; of writes None.

    What has come while others were served is served together, up to `most`; of one user in order.
    """
    seconds: np.ndarray = np.zeros(len(wanted))
    answers: list[np.ndarray | None] = [None] * len(wanted)
    begin, done = time.perf_counter(), 0
    while done < len(wanted):
        now = time.perf_counter() - begin
        if wanted[done].time > now:
            time.sleep(wanted[done].time - now)
            continue
        due = [k for k in range(done, min(done + most, len(wanted))) if wanted[k].time <= now]
        while due:
            kind = wanted[due[0]].writes
            others = {wanted[k].user for k in due if wanted[k].writes != kind}
            first = [k for k in due if wanted[k].writes == kind]
            # Of users with both kinds only what comes before the first of the other kind.
            late = {
                user: min(k for k in due if wanted[k].writes != kind and wanted[k].user == user)
                for user in others
            }
            part = [k for k in first if k < late.get(wanted[k].user, len(wanted))]
            users, ids = [wanted[k].user for k in part], [wanted[k].ids for k in part]
            if kind:
                store.write(users, ids)
                store.wait()
            else:
                for k, scores in zip(part, store.answer(users, ids), strict=True):
                    answers[k] = scores
            seconds[part] = time.perf_counter() - begin - np.array([wanted[k].time for k in part])
            due = [k for k in due if k not in set(part)]
            done += len(part)
    return seconds, answers


def load_test(
    task: Reasoning, params: Params, history: int, wanted: list[Request], users: int, **how: Any
) -> dict[str, Any]:
    """Fills a store with users of `history` items each, serves, and checks what was answered."""
    assert task.table is not None
    items = len(at(params, task.table))
    store = Streams(task, params, capacity=users, segments=(1, 64), **how)
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
    told = {
        name: {
            f"p{p:g}": round(float(np.percentile(ms[which], p)), 2) for p in (50, 90, 99, 99.9, 100)
        }
        for name, which in (("write_ms", writes), ("answer_ms", ~writes), ("all_ms", writes | True))
    }
    return told | {
        "history": history,
        "users": count,
        "requests": len(wanted),
        "compile_seconds": round(compiled - begin, 1),
        "fill_seconds": round(filled - compiled, 1),
        "largest_difference": largest_difference(task, params, bases, wanted, answers),
    }


def largest_difference(
    task: Reasoning, params: Params, bases: np.ndarray, wanted: list, answers: list
) -> float:
    """Between the last answers of some users and those of a stream that is written in one go."""
    n = task.segment_length
    last = {request.user: k for k, request in enumerate(wanted) if not request.writes}
    chosen = list(last.items())[-CHECKED:]
    streams = []
    for user, k in chosen:
        written = [request.ids for request in wanted[:k] if request.user == user and request.writes]
        streams.append(np.concatenate([bases[user % BASES], *written]))
    longest = -(-max(map(len, streams)) // n) * n

    @jax.jit
    def offline(items, mask, query):
        memory = memorize(task.machine, params["machine"], items, mask, block=64).memory
        return task.answer(params, memory, query, query >= 0)

    worst = 0.0
    for (_, k), stream in zip(chosen, streams, strict=True):
        held = np.pad(stream, (0, longest - len(stream))).astype(np.int32)
        mask, query = np.arange(longest) < len(stream), np.full(16, -1, np.int32)
        query[: len(wanted[k].ids)] = wanted[k].ids
        expected = np.asarray(offline(held.reshape(1, -1, n), mask.reshape(1, -1, n), query[None]))[
            0
        ]
        worst = max(worst, float(np.abs(expected[: len(answers[k])] - answers[k]).max()))
    return worst


def main(argv: Sequence[str]) -> int:
    del argv
    logging.set_verbosity(logging.INFO)
    asked = flags.FLAGS
    task: Any
    try:
        logging.info("%s", environment.prepare())
        environment.find_devices()
        if asked.workdir:
            model = open_model(asked.workdir)
            task, params, data = model.task, model.params, model.description
        elif asked.config is not None:
            configs.validate(asked.config)
            data = describe(
                asked.config.data, make_source(asked.config.data, asked.config.data.seed)
            )
            task = tasks.make_task(asked.config, data)
            params = jax.jit(task.init)(jax.random.key(asked.config.seed))
        else:
            raise ValueError("name a model: --workdir of a trained one, or --config")
        task = of_items(task)
        kinds = task.answers.questions.kinds or data.num_items
        wanted = requests(asked.rate, asked.seconds, asked.users, data.num_items, kinds)
        for history in map(int, asked.histories):
            where = (
                dict(folder=paths.resolve(asked.folder, "--folder") / str(history))
                if asked.folder
                else {}
            )
            told = load_test(task, params, history, wanted, asked.users, **where)
            print(json.dumps({"rate": asked.rate} | told), flush=True)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Path of a config file, for an untrained model."
    )
    flags.DEFINE_string("workdir", None, "Of a trained model, in the place of --config.")
    flags.DEFINE_integer("users", 100_000, "Users that have a stream.", lower_bound=1)
    flags.DEFINE_float(
        "rate", 500.0, "Requests a second; half of them write, half ask.", lower_bound=0.1
    )
    flags.DEFINE_float("seconds", 60.0, "How long they come.", lower_bound=0.1)
    flags.DEFINE_list(
        "histories", ["100", "1000", "100000"], "Items of a stream before the first request."
    )
    whole = lambda histories: all(each.isdecimal() and int(each) for each in histories)
    flags.register_validator(
        "histories", whole, message="must be whole numbers from 1 on, as --histories=100,1000"
    )
    flags.DEFINE_string(
        "folder", None, "Keeps the streams in files there, rather than on the device."
    )


def cli() -> None:
    """The command `python -m rmjax.load_test`."""
    define_flags()
    configs.check_flags(sys.argv)
    app.run(main, flags_parser=configs.parse_flags)
