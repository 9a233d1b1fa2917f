"""The run, in run order: open the workdir, train the teacher, train the model, test it, print the table.

Every stage can stop at any step and go on from its newest intact checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax import schedules, tasks
from rmjax.data import make_source
from rmjax.data.pipeline import Subset, batches, eval_batches
from rmjax.data.source import Source
from rmjax.data.stories.vectors import word_vectors
from rmjax.data.texts.streams import Texts
from rmjax.evaluation import metrics, scoring
from rmjax.evaluation.metrics import MetricWriter
from rmjax.io import paths, text
from rmjax.io.checkpoint import Checkpoints
from rmjax.io.progress import Stopped
from rmjax.run import kept
from rmjax.run.mapping import Mapped, make_mapped
from rmjax.run.optimizer import make_optimizer
from rmjax.run.step import Pieces, TrainState, init_state
from rmjax.run.workdir import Preemption, lock
from rmjax.tasks import sequences
from rmjax.types import Batch, Logger, Params, Task, at, replace_at

GAIN_STREAMS = 512  # of a split, by which the memory gain is measured
LEAST_GAIN = 0.05  # nats; a rehearsal that gains less from its memory teaches it next to nothing
CPU_ITEMS = 8192  # of the streams that a CPU holds at once, see `microbatch`
# Steps dispatched ahead of the one whose loss is looked at. None on CPU: several devices share a few threads there,
# and threads that wait in one step's all-reduce can starve another step of them for ever.
IN_FLIGHT = {"cpu": 0}


class Preempted(Stopped):
    """The run was asked to stop, and everything it had is saved."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: the teacher's or the model's."""

    name: str
    task: Task
    steps: int
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages share."""

    config: Any
    workdir: Path
    source: Any  # a Source, or Texts
    stop: Preemption
    asked: Asked = dataclasses.field(default_factory=lambda: Asked())
    task: Task | None = None  # one of the user's, in place of config's
    loggers: Sequence[Logger] = ()  # the user's, see `fit`

    def stopping(self, step: int = 0) -> bool:
        """Whether to save and leave. All processes must leave at one step, so several of them ask each other, every
        `train.log_every` steps, or ten seconds where those take longer: it holds up the devices."""
        if jax.process_count() == 1:
            return self.stop.requested
        last, now = self.asked, time.monotonic()
        if last.step < step < last.again:
            return False
        pace = (now - last.time) / max(1, step - last.step)
        requested, pace = np.max(multihost_utils.process_allgather(np.array([self.stop.requested, pace])), 0)
        last.step, last.time = step, now
        last.again = step + int(np.clip(10 / max(pace, 1e-6), 1, self.config.train.log_every))  # of all the same
        return bool(requested)


@dataclasses.dataclass
class Asked:
    """When processes last asked each other, and from what step on they do again."""

    step: int = 0
    again: int = 0
    time: float = dataclasses.field(default_factory=time.monotonic)


def fit(
    config: ConfigDict,
    workdir: str | Path,
    source: Source | None = None,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> list[dict[str, Any]]:
    """Trains a model and tests it; called again, goes on where it stopped.

    Args:
      config: `rmjax.config.base()` with the changes of a card.
      workdir: where checkpoints and logs go.
      source: data in place of those that config.data names. config.data.segment_length and the other keys that every
        source shares hold for them.
      task: what is trained, in place of what config says.
      loggers: objects with `write(kind, step, values, text)`, each of which gets every line of the log: the kind is
        'teacher/train', 'model/valid' and so on, and values are numbers by name. They are left open.

    Returns:
      Rows of the final table, the model's first.

    Raises:
      ValueError: a key of the config is unknown or has an impossible value; or the workdir has a run of another config
        or on other data.
      TypeError: source is no `rmjax.Source`.
      Preempted, Stopped, FloatingPointError: as `train`.
    """
    configs.validate(config)
    if source is not None and not isinstance(source, Source | Texts):
        raise TypeError(f"source is a {type(source).__name__}: make it a subclass of rmjax.Source")
    return train(config, workdir, source, task, loggers)


def train(
    config: Any,
    workdir: str | Path,
    source: Source | None = None,
    task: Task | None = None,
    loggers: Sequence[Logger] = (),
) -> list[dict[str, Any]]:
    """Trains what `config` says in `workdir`, or goes on where a run there stopped. -> rows of the final table.

    The config is taken to be valid; other arguments are as of `fit`.

    Raises:
      Preempted: SIGTERM or SIGINT came; the state is saved, the same call goes on.
      Stopped: one of them came while data were prepared; the same call prepares them anew.
      FloatingPointError: a loss is NaN or infinite; names the step and the parts, keeps the last good checkpoint.
    """
    results = paths.resolve_checkpoint(workdir, "--workdir") / "results.json"
    with opened(config, workdir, source, reading=results.exists()) as run:
        run = dataclasses.replace(run, task=task, loggers=loggers)
        if results.exists():
            logging.info("%s is finished; these are its results.", run.workdir)
            return text.read_json(results, "remove it, and the same line makes it anew")
        stage = model_stage(run)
        mapped = map_stage(run, stage)  # before the teacher's training: what is wrong with it is said at once
        check_start(run, stage)
        frozen = train_teacher(run)
        params = train_stage(run, stage, mapped, frozen)
        rows = test(run, stage.task, mapped, params)
        kept.write_whole(results, json.dumps(rows, indent=1))
        return rows


def evaluate_only(
    config: Any, workdir: str | Path, source: Source | None = None, task: Task | None = None
) -> list[dict[str, Any]]:
    """Tests the best checkpoint that `workdir` holds, training nothing. -> rows of the final table."""
    with opened(config, workdir, source, reading=True) as run:
        run = dataclasses.replace(run, task=task)
        stage = model_stage(run)
        mapped = map_stage(run, stage)
        return test(run, stage.task, mapped, kept.read_model(run.workdir, stage.task))


def trained(workdir: str | Path) -> tuple[Any, Params, Source]:
    """What a run has learned, for notebooks: its task, the best parameters so far, its data. Changes nothing there.

    `rmjax.open_model` needs no data.
    """
    folder = paths.resolve_checkpoint(workdir, "workdir")
    config, _ = kept.read_config(folder)
    source = make_source(config.data, config.data.seed)
    kept.refuse_other_items(folder, source)
    task = tasks.make_task(config, source)
    return task, jax.device_put(kept.read_model(folder, task)), source


@contextlib.contextmanager
def opened(config: Any, workdir: str | Path, source: Source | None = None, *, reading: bool = False) -> Iterator[Run]:
    """Locks the workdir, compares the config with the one that began there, and opens the data.

    Args:
      source: the data; None: those that config.data names.
      reading: the run has a model already. The folder may be read-only; what is written is data.json, if it is missing.
    """
    folder = paths.resolve_checkpoint(workdir, "--workdir")
    alone = lock(folder, reading=reading) if jax.process_index() == 0 else contextlib.nullcontext()  # speaks for all
    with alone, Preemption() as stop:
        if source is None:
            source = make_source(config.data, config.data.seed)
        if not reading or any((folder / "model").glob("[0-9]*")):
            kept.check_same_config(config, folder, source)
        yield Run(config, folder, source, stop)


def train_teacher(run: Run) -> Params:
    """Stage 1 (RM section 3.3.2): the history sampler, trained on its own, then frozen. () if none is needed."""
    task = tasks.make_teacher(run.config, run.source)
    if task is None:
        return ()
    t = run.config.teacher
    if t.dir:
        return kept.read_teacher(paths.resolve(t.dir, "config.teacher.dir"), run.source, task)
    stage = Stage("teacher", task, t.steps, t.batch_size, t.learning_rate)
    return train_stage(run, stage, map_stage(run, stage), ())["sampler"]


def model_stage(run: Run) -> Stage:
    t = run.config.train
    task = tasks.make_task(run.config, run.source) if run.task is None else run.task
    return Stage("model", task, t.steps, t.batch_size, t.learning_rate)


def stage_optimizer(run: Run, stage: Stage) -> optax.GradientTransformation:
    t = run.config.train
    warmup = round(t.warmup * stage.steps)
    schedule = schedules.build(t.schedule, max(1, stage.steps - warmup), run.config)
    return make_optimizer(stage.learning_rate, t.clip, schedule, warmup)


def map_stage(run: Run, stage: Stage, cut: bool = True) -> Mapped:
    """The stage's steps over the devices; raises ValueError if its batches do not divide among them. cut=False: CPUs
    hold all rows at once too, unless `train.microbatch` says how many."""
    t, optimizer = run.config.train, stage_optimizer(run, stage)
    devices = max(1, (t.devices or jax.device_count()) // t.model_devices)
    section = "teacher" if stage.name == "teacher" else "train"
    for name, size in ((f"{section}.batch_size", stage.batch_size), ("train.eval_batch_size", t.eval_batch_size)):
        if size % devices:
            raise ValueError(
                f"config.{name} = {size} does not divide among {devices} devices: change it, or config.train.devices"
            )
    whole = stage.name == "teacher" or not (cut or t.microbatch)
    pieces = None if whole else microbatch(run, stage.batch_size // devices)
    mapped = make_mapped(
        stage.task,
        optimizer,
        run.config.seed,
        mapping=t.mapping,
        devices=t.devices,
        model_devices=t.model_devices,
        microbatch=pieces,
        sparse_items=t.sparse_items,
        split_layers=t.split_layers,
    )
    return mapped._replace(
        train_step=announced(mapped.train_step, f"{stage.name}: compiling the train step"),
        scores=announced(mapped.scores, f"{stage.name}: compiling the evaluation step"),
        measure=announced(mapped.measure, f"{stage.name}: compiling the evaluation step"),
        rehearsals=announced(mapped.rehearsals, f"{stage.name}: compiling the memory gain"),
    )


def announced(step: Callable, doing: str) -> Callable:
    """`step`, which logs its compilation and the seconds it took whenever a batch, its last argument,
    has new shapes."""
    seen: set[tuple] = set()

    def call(*given: Any) -> Any:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(given[-1]))
        if shapes in seen:
            return step(*given)
        logging.info("%s ...", doing)
        begin = time.monotonic()
        result = step(*given)
        seen.add(shapes)
        logging.info("%s: done in %.1f seconds.", doing, time.monotonic() - begin)
        return result

    return call


def microbatch(run: Run, rows: int) -> Pieces | None:
    """How many of its `rows` streams a device holds at once, None for all of them.

    On a CPU a few: activations that outgrow its caches by far, and memory that is mapped anew in every step, cost more
    than the pieces. Elsewhere all of them: a piece is a scan of small kernels, each of which has to be launched.
    """
    asked = run.config.train.microbatch
    if rows % (asked or 1):
        raise ValueError(
            f"config.train.microbatch = {asked} does not divide the {rows} streams of a device: change it, or take 0"
        )
    if asked:
        return lambda rows, items: asked
    if jax.devices()[0].platform != "cpu":
        return None

    def pieces(rows: int, items: int) -> int:
        best = max(4, CPU_ITEMS / items)  # fewer are slow however long: the scan's products become thin
        return min((m for m in range(1, rows + 1) if rows % m == 0), key=lambda m: abs(math.log(m / best)))

    return pieces


def fresh_state(run: Run, stage: Stage, frozen: Params = ()) -> TrainState:
    """The state at step 0, on the host; a function of the seed, and of what the config takes from elsewhere: another
    run's parameters, a released checkpoint's, the teacher's item table, word vectors."""
    optimizer = stage_optimizer(run, stage)
    state = jax.device_get(jax.jit(lambda key: init_state(stage.task, optimizer, key))(jax.random.key(run.config.seed)))
    if stage.task.carries:
        state = dataclasses.replace(state, carry=fresh_carry(stage.task, state.params, stage.batch_size))
    start = stage.name == "model" and run.config.train.start_from
    if start:
        state = dataclasses.replace(state, params=read_start(run, stage))
    elif tasks.is_sequence(run.config) and run.config.model.pretrained:
        state = dataclasses.replace(state, params=sequences.pretrained(run.config, state.params))
    rows: Any = None
    if frozen and run.config.teacher.share_items:
        rows = np.array(frozen["embed"])
    elif stage.name == "model" and not start and run.config.data.vectors:
        vectors, there = word_vectors(run.config.data, run.source)
        rows = np.where(there[:, None], vectors, at(state.params, item_table(stage.task)))
    if rows is not None:
        state = dataclasses.replace(state, params=replace_at(state.params, item_table(stage.task), rows))
    return state


def item_table(task: Task) -> tuple[str, ...]:
    """Where a task's item table is; raises ValueError if it has none."""
    if not task.table:
        raise ValueError("this model has no item table: leave config.teacher.share_items and config.data.vectors out")
    return task.table


def fresh_carry(task: Task, params: Params, batch_size: int) -> Any:
    """What is remembered before the first step, on the host."""
    return jax.device_get(jax.jit(task.memory, static_argnums=1)(params, batch_size))


def blank_state(run: Run, stage: Stage) -> TrainState:
    """The shapes and dtypes of a state, as checkpoints have it."""
    task, optimizer = stage.task, stage_optimizer(run, stage)
    like = jax.eval_shape(lambda key: init_state(task, optimizer, key), jax.random.key(0))
    if task.carries:
        carry = jax.eval_shape(lambda params: task.memory(params, stage.batch_size), like.params)
        like = dataclasses.replace(like, carry=carry)
    return like


def check_start(run: Run, stage: Stage) -> None:
    """Raises what `read_start` does, if the model is still to begin with another run's parameters."""
    if run.config.train.start_from and not any((run.workdir / stage.name).glob("[0-9]*")):
        read_start(run, stage)


def read_start(run: Run, stage: Stage) -> Params:
    """See `kept.read_start`."""
    start = paths.resolve(run.config.train.start_from, "config.train.start_from")
    return kept.read_start(start, run.source, stage.task)


def open_checkpoints(run: Run, stage: Stage) -> Checkpoints:
    t = run.config.train
    return Checkpoints(run.workdir / stage.name, keep_last=t.keep_last, keep_best=t.keep_best)


def train_stage(run: Run, stage: Stage, mapped: Mapped, frozen: Params) -> Params:
    """Trains a stage to its last step, from wherever it stands. -> parameters of its best step, on the host."""
    with contextlib.closing(open_checkpoints(run, stage)) as checkpoints:
        start, state = checkpoints.restore(blank_state(run, stage)) or (0, fresh_state(run, stage, frozen))
        if start:
            logging.info("%s: going on from step %d of %d.", stage.name, start, stage.steps)
        if start < stage.steps or checkpoints.score(stage.steps) is None:
            evaluated = checkpoints.score(start) is not None
            writer = metrics.open_loggers(run.config, run.workdir, stage.name, start, evaluated, run.loggers)
            with contextlib.closing(writer):
                loop(run, stage, mapped, checkpoints, writer, start, *put_state(mapped, state), mapped.put(frozen))
        checkpoints.wait()
        best = kept.restore_best(checkpoints, state.params)
        assert best is not None
        return best


def put_state(mapped: Mapped, state: TrainState) -> tuple[TrainState, Any]:
    """-> the state and, apart from it, what its streams carry, on the devices; a process has its own streams alone."""
    mine = lambda x: x.reshape(jax.process_count(), -1, *x.shape[1:])[jax.process_index()]  # noqa: E731
    return mapped.put(dataclasses.replace(state, carry=())), mapped.put_carry(jax.tree.map(mine, state.carry))


def whole_state(mapped: Mapped, state: TrainState, carry: Any) -> TrainState:
    """The way back, on the host, with the streams of all processes."""
    carry = mapped.get_carry(carry)
    if jax.process_count() > 1:
        carry = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), carry)
    return dataclasses.replace(mapped.get(state), carry=carry)


def loop(run: Run, stage: Stage, mapped: Mapped, checkpoints, writer, start: int, state, carry, frozen) -> None:
    """Steps, log lines, evaluations and checkpoints from `start` on; returns at the last step, evaluated and saved."""
    t = run.config.train
    whole = lambda: whole_state(mapped, state, carry)  # noqa: E731
    progress = metrics.Progress(stage.steps, start)
    losses = Losses(run, stage, mapped, writer, progress)
    data = batches(
        run.source, **data_settings(run), batch_size=stage.batch_size, start_step=start, num_steps=stage.steps
    )
    with contextlib.closing(data):
        for step in range(start, stage.steps + 1):
            if step and (step % t.eval_every == 0 or step == stage.steps) and checkpoints.score(step) is None:
                losses.flush()
                try:
                    with progress.pause():
                        score = validate(run, stage.task, mapped, state.params, writer, step)
                except Preempted:
                    leave(run, stage, checkpoints, step, whole())
                checkpoints.save(step, whole(), score)
            elif step > start and step % t.save_every == 0:
                losses.flush()
                checkpoints.save(step, whole())
            if step == stage.steps:
                return
            if run.stopping(step):
                losses.flush()
                leave(run, stage, checkpoints, step, whole())
            batch = next(data)
            state, carry, values = mapped.train_step(state, carry, frozen, batch)
            losses.add(step + 1, values, batch)


def data_settings(run: Run) -> dict[str, Any]:
    """What training and evaluation batches have in common."""
    d = run.config.data
    return dict(
        seed=run.config.seed,
        segment_length=d.segment_length,
        negatives=d.negatives,
        prefetch=d.prefetch,
        workers=d.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def leave(run: Run, stage: Stage, checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    """Saves, unless this step is saved already, and raises Preempted."""
    if step not in checkpoints.steps():
        checkpoints.save(step, state)
    checkpoints.wait()
    raise Preempted(f"asked to stop in stage {stage.name!r} at step {step}; run the same line again to go on")


class Losses:
    """Looks at every step's losses, a few steps late so that the devices never wait for the host."""

    def __init__(self, run: Run, stage: Stage, mapped: Mapped, writer: MetricWriter, progress: metrics.Progress):
        self._run, self._stage, self._mapped, self._writer, self._progress = run, stage, mapped, writer, progress
        self._pending: collections.deque = collections.deque()

    def add(self, step: int, values: dict, batch: Batch) -> None:
        rows = batch.query_mask.any(-1).sum() * jax.process_count()
        self._pending.append((step, values, int(rows), int(batch.query_mask.sum()) * jax.process_count()))
        while len(self._pending) > IN_FLIGHT.get(jax.default_backend(), 2):
            self._look(*self._pending.popleft())

    def flush(self) -> None:
        while self._pending:
            self._look(*self._pending.popleft())

    def _look(self, step: int, values: dict, streams: int, queries: int) -> None:
        jax.block_until_ready(values)  # on every device
        values = {name: float(value) for name, value in self._mapped.get(values).items()}
        parts = {name: value for name, value in values.items() if name not in ("loss", "grad_norm")}
        if not all(map(np.isfinite, values.values())):
            shown = " ".join(f"{name} {value:.6g}" for name, value in values.items())
            section = "teacher" if self._stage.name == "teacher" else "train"
            raise FloatingPointError(
                f"stage {self._stage.name!r}, step {step}: a loss is not finite ({shown}); the last good checkpoint is "
                f"kept. Lower config.{section}.learning_rate or config.train.clip and use another workdir"
            )
        self._progress.tick(streams, queries)
        if step % self._run.config.train.log_every == 0 or step == self._stage.steps:
            rates = {name: rate for name, rate in self._progress.rates().items() if np.isfinite(rate)}
            line = self._progress.line(values["loss"], parts)
            self._writer.write("train", step, values | rates, f"{self._stage.name} {line}")


def validate(run: Run, task: Task, mapped: Mapped, params: Params, writer: MetricWriter, step: int) -> float:
    """The validation split's measures, written down. -> what the best checkpoint has most of."""
    if task.carries:
        read = measure_texts(run, task, mapped, params, "valid")
        writer.write("valid", step, read)
        return -read["perplexity"]
    found = scoring.measures(run.source, "valid", score_split(run, mapped, params, "valid"))
    gains = memory_gain(run, task, mapped, params, "valid")
    writer.write("valid", step, found | gains)
    losses = [gain for name, gain in gains.items() if "gain" in name]
    if losses and max(losses) < LEAST_GAIN and 2 * step >= run.config.train.steps:
        logging.warning(
            "Rehearsal does not use the memory: with another stream's memory its losses are at most %.3f nats higher "
            "(expected: %.2f or more). Mask more (config.rehearsal.mask_ratio), or compare with harder items "
            "(config.rehearsal.negatives).",
            max(losses),
            LEAST_GAIN,
        )
    return scoring.better(run.source, found)


def paired_batches(run: Run, split: str, streams: int) -> Iterator[tuple[Batch, Batch]]:
    """Batches of some streams of a split, drawn from all of it, each with one of the same shape, in whose rows there
    are other streams."""
    pair = [Subset(run.source, split, streams, run.config.seed, others) for others in (False, True)]
    settings = data_settings(run) | dict(batch_size=run.config.train.eval_batch_size)
    with contextlib.ExitStack() as stack:
        data = [stack.enter_context(contextlib.closing(eval_batches(some, split, **settings))) for some in pair]
        yield from zip(*data, strict=True)


def memory_gain(run: Run, task: Task, mapped: Mapped, params: Params, split: str) -> dict[str, float]:
    """See `scoring.memory_gain`; of `GAIN_STREAMS` streams of a split. {} where nothing is rehearsed."""
    if not task.rehearses:
        return {}
    parts = collections.defaultdict(list)
    for own, other in paired_batches(run, split, GAIN_STREAMS):
        if run.stopping():
            raise Preempted(f"asked to stop while evaluating on {split!r}; run the same line again to go on")
        for name, sums in mapped.rehearsals(params, own, other).items():
            parts[name].append(sums)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    if jax.process_count() > 1:
        whole = {name: multihost_utils.process_allgather(value, tiled=True) for name, value in whole.items()}
    return scoring.memory_gain(whole)


def score_split(run: Run, mapped: Mapped, params: Params, split: str) -> dict[str, np.ndarray]:
    """Scores, targets, masks [n, Q] and example ids [n] of a whole split, on every process."""
    parts = collections.defaultdict(list)
    data = eval_batches(run.source, split, **data_settings(run), batch_size=run.config.train.eval_batch_size)
    with contextlib.closing(data):
        for batch in data:
            if run.stopping():
                raise Preempted(f"asked to stop while evaluating on {split!r}; run the same line again to go on")
            parts["scores"].append(mapped.scores(params, batch))
            for name in ("target", "query_mask", "example_id"):
                parts[name].append(getattr(batch, name))
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    if jax.process_count() > 1:
        whole = {name: multihost_utils.process_allgather(value, tiled=True) for name, value in whole.items()}
    return {name: value[whole["query_mask"].any(-1)] for name, value in whole.items()}


def measure_texts(run: Run, task: Task, mapped: Mapped, params: Params, split: str) -> dict[str, float]:
    """A split read once, in order, from empty memories; `params` are on the devices."""
    rows = run.config.train.eval_batch_size
    mine = np.arange(rows).reshape(jax.process_count(), -1)[jax.process_index()]
    carry, parts = mapped.put_carry(fresh_carry(task, mapped.get(params), len(mine))), []
    for batch in run.source.evaluation(split, rows, mine):
        if run.stopping():
            raise Preempted(f"asked to stop while evaluating on {split!r}; run the same line again to go on")
        found, carry = mapped.measure(params, carry, batch)
        parts.append(found)
    whole = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    if jax.process_count() > 1:
        whole = {name: multihost_utils.process_allgather(value, tiled=True) for name, value in whole.items()}
    return scoring.perplexities(run.source.splits[split], **whole)


def test(run: Run, task: Task, mapped: Mapped, params: Params) -> list[dict[str, Any]]:
    """Rows of the final table: the machine on the test split, and what others answer to the same questions."""
    if task.carries:
        read = measure_texts(run, task, mapped, mapped.put(params), "test")
        return [{"memory": tasks.name_of(run.config)} | {f"test_{name}": value for name, value in read.items()}]
    params = mapped.put(params)
    scored = score_split(run, mapped, params, "test")
    streams = run.source.stream_id("test")[scored["example_id"]]
    rows = scoring.rows(run.source, "test", tasks.name_of(run.config), scored, streams, run.config.seed)
    rows[0] |= memory_gain(run, task, mapped, params, "test")
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The final table as text; the interval is over streams, and gains are the memory's (see `memory_gain`)."""
    names = {"low": "95% from", "high": "to", "test_auc": "test AUC", "test_mrr": "test MRR"}
    names |= {f"memory_gain_{name}": f"gain, {name}" for name in ("recollection", "familiarity")}
    names["memory_spread"] = "spread"
    return metrics.table(
        [
            {names.get(k, k.replace("_", " ")): round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            for row in rows
        ]
    )


def first_step(run: Run) -> tuple[Stage, Mapped, TrainState, Params, Batch]:
    """What the model's first step takes, on the host; the teacher, if there is one, as it is before its training."""
    stage, teacher = model_stage(run), tasks.make_teacher(run.config, run.source)
    frozen = () if teacher is None else jax.device_get(teacher.init(jax.random.key(run.config.seed))["sampler"])
    data = batches(run.source, **data_settings(run), batch_size=stage.batch_size, num_steps=1)
    with contextlib.closing(data):
        return stage, map_stage(run, stage), fresh_state(run, stage), frozen, next(data)
