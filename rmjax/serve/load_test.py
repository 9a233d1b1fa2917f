"""Measures how fast live streams are written and answered while requests arrive at a fixed rate.

    python -m rmjax.load_test --config=configs/xlong.py --users=100000 --rate=500 --seconds=60
    python -m rmjax.load_test --workdir=runs/xlong --url=http://127.0.0.1:8000 --clients=4

The first line tests a store in this process, which --threads threads call. The second line tests
the service `python -m rmjax.serve` of the same workdir; --clients processes call it. Requests
arrive on schedule, whether earlier ones are done or not, and a latency counts from the planned
arrival. The command prints one JSON object for each length of history. The object holds percentiles
of the latencies in milliseconds, errors by kind, the share of the processor, and the largest
difference from offline evaluation. Without --workdir, the model of --config is untrained.

The streams have users such as "1000-17": user 17 of the streams that began with 1,000 items. Users
that exist already are used again. So a store can be filled in this process, which is faster, before
the service opens it.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rmjax import command_line, tasks
from rmjax import config as configs
from rmjax.data import describe, make_source
from rmjax.data.source import Description, id_array
from rmjax.io import paths
from rmjax.machines import memorize
from rmjax.run import environment
from rmjax.serve.checks import of_items
from rmjax.serve.client import Client
from rmjax.serve.model import open_model
from rmjax.serve.store import Streams
from rmjax.serve.traffic import (
    BASES,
    Names,
    Request,
    Served,
    Service,
    requests,
    serve,
    serve_from_processes,
)
from rmjax.tasks.answers import questions_only
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Params, Task, at

CHECKED = 64  # users whose last answers are compared with offline evaluation
COPIES = 64  # new users of one `fork` over HTTP; a service takes so many by default
COPIES_AT_ONCE = 4096  # the same in this process, where fewer commits are faster
PERCENTILES = (50, 90, 99, 99.9, 100)
WRITTEN = 10_000  # items of one write; a service takes so many by default


def fill(
    service: Service,
    names: Names,
    items: int,
    users: int,
    again: Sequence[int],
    copies: int = COPIES,
) -> None:
    """Gives every user a stream: a copy of one of `BASES` random histories.

    Users that exist stay as they are, except those of `again`. After an interruption, only what is
    missing is made.

    Args:
      service: what is filled.
      names: of users and items; has the length of the histories.
      items: number of item ids.
      users: number of users.
      again: users that must have exactly their history, since their answers will be checked.
      copies: most new users of a call.

    Raises:
      ValueError: the stream that is copied is too long: another client has written to it.
    """
    for base, history in enumerate(_bases(names.history, items)):
        name = names.base(base)
        (done,) = service.write([name], [[]])  # items that were written before an interruption
        if done > len(history):
            raise ValueError(f"stream {name!r} has {done} items, not {len(history)}: reset it")
        for first in range(done, len(history), WRITTEN):
            part = names.items(history[first : first + WRITTEN])
            service.write([name], [part], [first])
    old = [user for user in again if names.user(user) in service]
    if old:
        service.reset(list(map(names.user, old)))
    anew = set(again)

    def copy(base: int) -> None:
        others = [user for user in range(base, users, BASES) if user not in anew]
        # They are made in order, so bisection finds the first one that is missing.
        missing = lambda user: names.user(user) not in service
        new = others[bisect.bisect_left(others, True, key=missing) :]
        new = [user for user in again if user % BASES == base] + new
        for first in range(0, len(new), copies):
            service.fork(names.base(base), list(map(names.user, new[first : first + copies])))

    with ThreadPoolExecutor(BASES) as pool:
        list(pool.map(copy, range(BASES)))


def _bases(history: int, items: int) -> np.ndarray:
    """The histories, i64 [BASES, history]; user u began with row u % BASES."""
    return np.random.default_rng(1).integers(0, items, (BASES, history))


def checked(wanted: Sequence[Request]) -> dict[int, int]:
    """Returns {user: last question} of the `CHECKED` users that write most and ask.

    Args:
      wanted: [n] requests, in order of arrival.
    """
    last = {request.user: k for k, request in enumerate(wanted) if not request.writes}
    writes = collections.Counter(request.user for request in wanted if request.writes)
    busiest = sorted(last, key=lambda user: -writes[user])[:CHECKED]
    return {user: last[user] for user in busiest}


def run_test(
    task: Reasoning,
    params: Params,
    service: Service,
    serve_all: Callable[[], Served],
    wanted: Sequence[Request],
    users: int,
    names: Names,
    copies: int = COPIES,
) -> tuple[Served, dict[str, Any]]:
    """Fills a service, serves the requests, and checks the answers.

    Args:
      task: a task whose streams hold item ids.
      params: of the task.
      service: what is tested.
      serve_all: calls `serve` or `serve_from_processes` with the requests.
      wanted: [n] requests, in order of arrival.
      users: number of users.
      names: of users and items.
      copies: as in `fill`.

    Returns:
      What became of the requests; and the object that is printed: that of `summary`, sizes, and
      'largest_difference', see `largest_difference`.
    """
    assert task.table is not None
    items, questions = len(at(params, task.table)), checked(wanted)
    begin = time.monotonic()
    fill(service, names, items, users, list(questions), copies)
    filled = time.monotonic()
    served = serve_all()
    return served, summary(wanted, served) | {
        "history": names.history,
        "users": users,
        "fill_seconds": round(filled - begin, 1),
        "largest_difference": largest_difference(
            task, params, _bases(names.history, items), wanted, served, questions
        ),
    }


def summary(wanted: Sequence[Request], served: Served) -> dict[str, Any]:
    """Sums up what became of requests.

    Args:
      wanted: [n] requests.
      served: what became of them.

    Returns:
      Percentiles in milliseconds of 'write_ms', 'answer_ms' and 'all_ms', over requests without an
      error; the number of 'requests'; and 'errors', their number by kind.
    """
    ms, writes = 1e3 * served.seconds, np.array([request.writes for request in wanted], bool)
    result: dict[str, Any] = {
        name: {f"p{p:g}": _percentile(ms[which], p) for p in PERCENTILES}
        for name, which in (("write_ms", writes), ("answer_ms", ~writes), ("all_ms", writes | True))
    }
    return result | {"requests": len(wanted), "errors": dict(served.errors)}


def _percentile(ms: np.ndarray, p: float) -> float:
    """A percentile of the requests that had no error; NaN if all had one."""
    done = ms[np.isfinite(ms)]
    return round(float(np.percentile(done, p)), 2) if len(done) else float("nan")


def largest_difference(
    task: Reasoning,
    params: Params,
    bases: np.ndarray,
    wanted: Sequence[Request],
    served: Served,
    questions: Mapping[int, int],
) -> float:
    """Compares answers with offline evaluation of the same streams.

    Args:
      task: the served task.
      params: of the task.
      bases: i64 [BASES, history], the histories; user u began with row u % BASES.
      wanted: [n] requests, in order of arrival.
      served: what became of them.
      questions: {user: the request whose answer is compared}. Users that had an error are left out.

    Returns:
      The largest absolute difference of a score; NaN if no user is left, or a score is NaN.
      Infinite if an answer has another shape.
    """
    n, streams = task.segment_length, {}
    for user, k in questions.items():
        before = [j for j in range(k) if wanted[j].user == user]
        if np.isfinite(served.seconds[[*before, k]]).all():
            written = [wanted[j].ids for j in before if wanted[j].writes]
            streams[k] = np.concatenate([bases[user % BASES], *written])
    longest = -(-max(map(len, streams.values()), default=0) // n) * n

    @jax.jit
    def offline(items: Array, length: Array, query: Array) -> Array:
        mask = (jnp.arange(longest) < length).reshape(1, -1, n)
        before = jnp.full(query.shape, length)
        batch = dataclasses.replace(
            questions_only(query, query >= 0),
            items=items.reshape(1, -1, n),
            item_mask=mask,
            items_before=before,
        )
        batch = task.answers.asked(batch)
        memory = memorize(task.machine, params["machine"], batch.items, mask, block=64).memory
        return task.answer(params, memory, batch.query, batch.query_mask)

    differences = []
    for k, stream in streams.items():
        padded = np.pad(stream, (0, longest - len(stream))).astype(np.int32)
        asked, query = len(wanted[k].ids), np.full(16, -1, np.int32)
        query[:asked] = wanted[k].ids
        expected = np.asarray(offline(padded, len(stream), query[None]))[0, :asked]
        answer = served.answers[k]
        assert answer is not None
        same = answer.shape == expected.shape
        differences.append(np.abs(expected - answer).max() if same else np.inf)
    return float(np.max(differences)) if differences else float("nan")


def measure_streams(
    task: Reasoning,
    params: Params,
    wanted: Sequence[Request],
    users: int,
    names: Names,
    threads: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Tests a store in this process.

    Args:
      task: a task whose streams hold item ids.
      params: of the task.
      wanted: [n] requests, in order of arrival.
      users: number of users.
      names: of users and items.
      threads: number of threads that call the store.
      **options: keyword arguments of `Streams`.

    Returns:
      The object of `run_test`, and the seconds of opening and compiling. 'cores' is the processor
      time of the process divided by the time of the test.
    """
    begin = time.monotonic()
    with contextlib.closing(Streams(task, params, **options)) as streams:
        opened = time.monotonic()
        streams.compile()
        compiled = time.monotonic()

        def serve_all() -> Served:
            gc.collect()
            gc.freeze()  # as the service does: a full collection stops everything for 0.1 s
            try:
                return serve(streams, wanted, names, threads)
            finally:
                gc.unfreeze()

        how = wanted, users, names, COPIES_AT_ONCE
        served, result = run_test(task, params, streams, serve_all, *how)
        return result | {
            "open_seconds": round(opened - begin, 1),
            "compile_seconds": round(compiled - opened, 1),
            "cores": {"process": round(served.cpu / served.wall, 2)},
        }


def measure_service(
    task: Reasoning,
    params: Params,
    wanted: Sequence[Request],
    users: int,
    names: Names,
    url: str,
    clients: int = 4,
    threads: int = 8,
) -> dict[str, Any]:
    """Tests a service over HTTP.

    Args:
      task: the task that the service serves; its streams hold item ids.
      params: of the task.
      wanted: [n] requests, in order of arrival.
      users: number of users.
      names: of users and items.
      url: of the service.
      clients: number of processes that call it.
      threads: number of threads of a process.

    Returns:
      The object of `run_test`. 'cores' is the processor time of the clients and of the service
      divided by the time of the test.
    """
    service, cpu = Client(url), []

    def serve_all() -> Served:
        cpu.append(service.metric("process_cpu_seconds_total"))
        served = serve_from_processes(url, wanted, names, clients, threads)
        cpu.append(service.metric("process_cpu_seconds_total"))
        return served

    served, result = run_test(task, params, service, serve_all, wanted, users, names)
    share = {"clients": served.cpu, "service": cpu[1] - cpu[0]}
    return result | {
        "cores": {name: round(seconds / served.wall, 2) for name, seconds in share.items()}
    }


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
    drawn = environment.on_host(jax.jit(task.init), jax.random.key(config.seed))
    return task, jax.device_put(drawn), data


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
        kinds = task.answers.questions.kinds
        for history in map(int, asked.histories):
            wanted = requests(asked.rate, asked.seconds, asked.users, data.num_items, kinds)
            how = task, params, wanted, asked.users
            if asked.url:
                numbering = data.numbering
                ids = id_array(numbering) if isinstance(numbering, tuple) else None
                names = Names(history, ids, bool(kinds))
                result = measure_service(*how, names, asked.url, asked.clients, asked.threads)
            else:
                options = _options(asked)
                result = measure_streams(*how, Names(history), asked.threads, **options)
            print(json.dumps(_in_json({"rate": asked.rate} | result)), flush=True)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logging.error("%s", environment.in_words(error))
        return 1
    return 0


def _in_json(value: Any) -> Any:
    """A result with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _in_json(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _options(asked: Any) -> dict[str, Any]:
    """The keyword arguments of `Streams` that the flags ask for."""
    if not asked.store:
        return {"capacity": asked.capacity or asked.users + BASES}
    store = paths.resolve(asked.store, "--store")
    return {"store": store, "sync": asked.sync, "capacity": asked.capacity or 1024}


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
    flags.DEFINE_integer("threads", 8, "Threads that call, in each process.", lower_bound=1)
    flags.DEFINE_string("store", None, "Keeps the streams in this database, not on the device.")
    flags.DEFINE_enum("sync", "group", ["each", "group", "none"], "When a write returns.")
    flags.DEFINE_integer("capacity", None, "Users on the device at a time.", lower_bound=1)
    flags.DEFINE_string("url", None, "Tests the service at this address, not a store.")
    flags.DEFINE_integer("clients", 4, "Processes that call the service.", lower_bound=1)
    numbers = lambda histories: all(size.isdecimal() and int(size) for size in histories)
    register: Callable[..., None] = flags.register_validator
    register(
        "histories", numbers, message="must be whole numbers from 1 on, as --histories=100,1000"
    )


def cli() -> None:
    """Runs the command `python -m rmjax.load_test`."""
    define_flags()
    command_line.check_flags(sys.argv)
    app.run(main, flags_parser=command_line.parse_flags)
