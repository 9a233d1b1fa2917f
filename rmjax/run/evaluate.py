"""The model's answers on a complete split, and the rows of the final table."""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from rmjax import tasks
from rmjax.data import describe
from rmjax.data.pipeline import Subset, eval_batches
from rmjax.evaluation import scoring
from rmjax.machines import Costs
from rmjax.run import reporting
from rmjax.run.mapping import Mapped
from rmjax.run.stages import Preempted, Run, Training, data_settings, fresh_carry
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Batch, Params, Task

GAIN_STREAMS = 512  # streams of a split on which the memory gain is measured
_ELSEWHERE = re.compile(r"^(hr|ndcg|mrr)@(1|5|20)$|^recall@")
LEAST_GAIN = 0.05  # nats; a rehearsal that gains less from its memory teaches it almost nothing


def validate(training: Training, params: Params, step: int) -> float:
    """Measures the validation split and writes the measures to the log.

    Args:
      training: the stage.
      params: on the devices.
      step: the step of `params`.

    Returns:
      The score of the step; the best checkpoint has the highest one.

    Raises:
      Preempted: the run was asked to stop.
    """
    run, stage, mapped, _, writer = training
    task = stage.task
    if task.carries:
        read = measure_texts(run, task, mapped, params, "valid")
        writer.write("valid", step, read)
        return -read["perplexity"]
    scored, metric = score_split(run, mapped, params, "valid"), run.config.train.metric
    measures = scoring.measures(run.source, "valid", scored, metric)
    gains = memory_gain(run, task, mapped, params, "valid")
    values, main = measures | gains, metric or run.source.questions.metric
    shown = {k: v for k, v in values.items() if k == main or not _ELSEWHERE.search(k)}
    writer.write("valid", step, values, reporting.step_line("valid", step, shown))
    losses = [gain for name, gain in gains.items() if "gain" in name]
    half, every = run.config.train.steps / 2, run.config.train.eval_every
    first = step - every < half <= step  # the first evaluation of the second half
    if losses and max(losses) < LEAST_GAIN and (first or step == run.config.train.steps):
        warn_of_gain(run, max(0.0, *losses))
    return scoring.objective(run.source, measures, metric)


def warn_of_gain(run: Run, gain: float) -> None:
    """Warns that rehearsal is solved without the memory, and names the settings that make it hard.

    Args:
      run: the run.
      gain: the larger of its memory gains, in nats.
    """
    rehearsal = run.config.rehearsal
    advice = []
    if rehearsal.mask_ratio < 1:
        advice.append("Mask more (config.rehearsal.mask_ratio).")
    if rehearsal.negatives == "uniform":
        advice.append("Compare with harder items (config.rehearsal.negatives).")
    logging.warning(
        "Rehearsal does not use the memory: with another stream's memory its losses are at most "
        "%.3f nats higher (expected: %.2f or more). %s",
        gain,
        LEAST_GAIN,
        " ".join(advice or ["Train longer, or with a lower config.train.learning_rate."]),
    )


def paired_batches(run: Run, split: str, streams: int) -> Iterator[tuple[Batch, Batch]]:
    """Reads some streams of a split, each with another stream of the same shape.

    Args:
      run: the run.
      split: 'valid' or 'test'.
      streams: how many streams to draw from the split.

    Yields:
      Two batches of the same shape; in every row of the second is another stream.
    """
    pair = [Subset(run.source, split, streams, run.config.seed, others) for others in (False, True)]
    settings = data_settings(run) | dict(batch_size=run.config.train.eval_batch_size)
    with contextlib.ExitStack() as stack:
        data = [
            stack.enter_context(contextlib.closing(eval_batches(subset, split, **settings)))
            for subset in pair
        ]
        yield from zip(*data, strict=True)


def _check_stop(run: Run, split: str) -> None:
    if run.stopping():
        raise Preempted(
            f"asked to stop while evaluating on {split!r}; run the same line again to go on"
        )


def _gather(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenates the rows of all processes."""
    if jax.process_count() == 1:
        return values
    gather = lambda value: multihost_utils.process_allgather(value, tiled=True)
    return {name: gather(value) for name, value in values.items()}


def memory_gain(
    run: Run, task: Task, mapped: Mapped, params: Params, split: str
) -> dict[str, float]:
    """Measures the memory gain on `GAIN_STREAMS` streams of a split.

    Args:
      run: the run.
      task: the task.
      mapped: the mapped steps.
      params: on the devices.
      split: 'valid' or 'test'.

    Returns:
      See `scoring.memory_gain`; {} if the task rehearses nothing.

    Raises:
      Preempted: the run was asked to stop.
    """
    if not task.rehearses:
        return {}
    parts = collections.defaultdict(list)
    for own, other in paired_batches(run, split, GAIN_STREAMS):
        _check_stop(run, split)
        for name, sums in mapped.rehearsals(params, own, other).items():
            parts[name].append(sums)
    sums_of_all = {name: np.concatenate(values) for name, values in parts.items()}
    return scoring.memory_gain(_gather(sums_of_all))


def score_split(run: Run, mapped: Mapped, params: Params, split: str) -> dict[str, np.ndarray]:
    """Scores all questions of a split.

    Args:
      run: the run.
      mapped: the mapped steps.
      params: on the devices.
      split: 'valid' or 'test'.

    Returns:
      On every process: scores [n, Q] or [n, Q, C], target and query_mask [n, Q], example_id [n],
      items_before [n, Q], see `items_before`. Examples without questions are left out.

    Raises:
      Preempted: the run was asked to stop.
    """
    parts = collections.defaultdict(list)
    rows = run.config.train.eval_batch_size
    data = eval_batches(run.source, split, **data_settings(run), batch_size=rows)
    with contextlib.closing(data):
        for batch in data:
            _check_stop(run, split)
            parts["scores"].append(mapped.scores(params, batch))
            for name in ("target", "query_mask", "example_id"):
                parts[name].append(getattr(batch, name))
            parts["items_before"].append(items_before(batch))
    scored = _gather({name: np.concatenate(values) for name, values in parts.items()})
    asked = scored["query_mask"].any(-1)
    return {name: value[asked] for name, value in scored.items()}


def items_before(batch: Batch) -> np.ndarray:
    """The number of items before each question, i [B, Q]."""
    if batch.items_before is not None:
        return np.asarray(batch.items_before)
    counts = np.cumsum(np.asarray(batch.item_mask).sum(-1), 1)
    counts = np.pad(counts, ((0, 0), (1, 0)))  # [B, T + 1], items before each segment
    if batch.position is None:
        return np.repeat(counts[:, -1:], batch.query_mask.shape[1], 1)
    return np.take_along_axis(counts, np.asarray(batch.position), 1)


def measure_texts(
    run: Run, task: Task, mapped: Mapped, params: Params, split: str
) -> dict[str, float]:
    """Reads a split of texts once, in order, from empty memories.

    Args:
      run: the run.
      task: a task that carries.
      mapped: the mapped steps.
      params: on the devices.
      split: 'valid' or 'test'.

    Returns:
      See `scoring.perplexities`.

    Raises:
      Preempted: the run was asked to stop.
    """
    rows = run.config.train.eval_batch_size
    mine = np.arange(rows).reshape(jax.process_count(), -1)[jax.process_index()]
    carry, parts = mapped.put_carry(fresh_carry(task, mapped.get(params), len(mine))), []
    for batch in run.source.evaluation(split, rows, mine):
        _check_stop(run, split)
        sums, carry = mapped.measure(params, carry, batch)
        parts.append(sums)
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return scoring.perplexities(run.source.splits[split], **_gather(stacked))


Rows = list[dict[str, Any]]


def test(run: Run, task: Task, mapped: Mapped, params: Params) -> tuple[Rows, Rows]:
    """Measures the test split.

    Args:
      run: the run.
      task: the model's task.
      mapped: the mapped steps.
      params: on the host.

    Returns:
      Rows of the final table: the model first, then the references that answer the same questions.
      The row of a machine ends with its costs, see `rmjax.machines.Costs`. And the model's measure
      by length of history, see `scoring.by_history`; [] for texts.

    Raises:
      Preempted: the run was asked to stop.
    """
    params = mapped.put(params)
    if task.carries:
        read = measure_texts(run, task, mapped, params, "test")
        measures = {f"test_{name}": value for name, value in read.items()}
        return [{"memory": tasks.name_of(run.config)} | measures], []
    scored = score_split(run, mapped, params, "test")
    streams = run.source.stream_id("test")[scored["example_id"]]
    name = tasks.name_of(run.config)
    seed, metric = run.config.seed, run.config.train.metric
    rows = scoring.rows(run.source, "test", name, scored, streams, seed, metric)
    rows[0] |= memory_gain(run, task, mapped, params, "test")
    if isinstance(task, Reasoning):
        description = describe(run.config.data, run.source)
        rows[0] |= tasks.costs(run.config, description, task.machine)._asdict()
    return rows, scoring.by_history(run.source, "test", scored, metric)


def show(rows: list[dict[str, Any]]) -> str:
    """The final table as text, see `named`; the costs of the machine stand below.

    A ranking's values at other places than 10 stay out. So does the recall, which equals HR if no
    two questions have the same place in a stream.
    """
    costs = [column_name(field) for field in Costs._fields]
    full = named(rows)
    shown = [{k: v for k, v in row.items() if not _ELSEWHERE.search(k)} for row in full]
    text = reporting.tables(shown, costs)
    if shown == full:
        return text
    return f"{text}\n\nresults.json also has NDCG, HR, MRR and recall at 1, 5, 10 and 20."


def column_name(key: str) -> str:
    """The name of a column of the final table in words."""
    names = {"low": "95% from", "high": "to", "test_auc": "test AUC", "test_mrr": "test MRR"}
    names |= {f"memory_gain_{name}": f"gain, {name}" for name in ("recollection", "familiarity")}
    names |= {"memory_spread": "spread", "flops_per_item": "FLOPs per item"}
    return names.get(key, key.replace("_", " "))


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The final table with the names of its columns in words, and four digits after the point.

    Args:
      rows: as `test` returns them. The interval is over streams; gains are those of the memory, see
        `memory_gain`.

    Returns:
      The rows.
    """
    value_of = lambda value: round(value, 4) if isinstance(value, float) else value
    return [{column_name(k): value_of(v) for k, v in row.items()} for row in rows]
