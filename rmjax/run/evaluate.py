"""What the model answers on a whole split, and the rows of the final table."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from rmjax import tasks
from rmjax.data.pipeline import Subset, eval_batches
from rmjax.evaluation import scoring
from rmjax.run import reporting
from rmjax.run.mapping import Mapped
from rmjax.run.stages import Preempted, Run, Training, data_settings, fresh_carry
from rmjax.types import Batch, Params, Task

GAIN_STREAMS = 512  # of a split, by which the memory gain is measured
LEAST_GAIN = 0.05  # nats; a rehearsal that gains less from its memory teaches it next to nothing


def validate(training: Training, params: Params, step: int) -> float:
    """The validation split's measures, written down. -> what the best checkpoint has most of."""
    run, stage, mapped, _, writer = training
    task = stage.task
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
    return scoring.objective(run.source, found)


def paired_batches(run: Run, split: str, streams: int) -> Iterator[tuple[Batch, Batch]]:
    """Batches of some streams of a split, drawn from all of it, each with one of the same shape, in whose rows there
    are other streams.
    """
    pair = [Subset(run.source, split, streams, run.config.seed, others) for others in (False, True)]
    settings = data_settings(run) | dict(batch_size=run.config.train.eval_batch_size)
    with contextlib.ExitStack() as stack:
        data = [
            stack.enter_context(contextlib.closing(eval_batches(some, split, **settings)))
            for some in pair
        ]
        yield from zip(*data, strict=True)


def memory_gain(
    run: Run, task: Task, mapped: Mapped, params: Params, split: str
) -> dict[str, float]:
    """See `scoring.memory_gain`; of `GAIN_STREAMS` streams of a split. {} where nothing is rehearsed."""
    if not task.rehearses:
        return {}
    parts = collections.defaultdict(list)
    for own, other in paired_batches(run, split, GAIN_STREAMS):
        if run.stopping():
            raise Preempted(
                f"asked to stop while evaluating on {split!r}; run the same line again to go on"
            )
        for name, sums in mapped.rehearsals(params, own, other).items():
            parts[name].append(sums)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    if jax.process_count() > 1:
        whole = {
            name: multihost_utils.process_allgather(value, tiled=True)
            for name, value in whole.items()
        }
    return scoring.memory_gain(whole)


def score_split(run: Run, mapped: Mapped, params: Params, split: str) -> dict[str, np.ndarray]:
    """Scores, targets, masks [n, Q] and example ids [n] of a whole split, on every process."""
    parts = collections.defaultdict(list)
    data = eval_batches(
        run.source, split, **data_settings(run), batch_size=run.config.train.eval_batch_size
    )
    with contextlib.closing(data):
        for batch in data:
            if run.stopping():
                raise Preempted(
                    f"asked to stop while evaluating on {split!r}; run the same line again to go on"
                )
            parts["scores"].append(mapped.scores(params, batch))
            for name in ("target", "query_mask", "example_id"):
                parts[name].append(getattr(batch, name))
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    if jax.process_count() > 1:
        whole = {
            name: multihost_utils.process_allgather(value, tiled=True)
            for name, value in whole.items()
        }
    return {name: value[whole["query_mask"].any(-1)] for name, value in whole.items()}


def measure_texts(
    run: Run, task: Task, mapped: Mapped, params: Params, split: str
) -> dict[str, float]:
    """A split read once, in order, from empty memories; `params` are on the devices."""
    rows = run.config.train.eval_batch_size
    mine = np.arange(rows).reshape(jax.process_count(), -1)[jax.process_index()]
    carry, parts = mapped.put_carry(fresh_carry(task, mapped.get(params), len(mine))), []
    for batch in run.source.evaluation(split, rows, mine):
        if run.stopping():
            raise Preempted(
                f"asked to stop while evaluating on {split!r}; run the same line again to go on"
            )
        found, carry = mapped.measure(params, carry, batch)
        parts.append(found)
    whole = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    if jax.process_count() > 1:
        whole = {
            name: multihost_utils.process_allgather(value, tiled=True)
            for name, value in whole.items()
        }
    return scoring.perplexities(run.source.splits[split], **whole)


def test(run: Run, task: Task, mapped: Mapped, params: Params) -> list[dict[str, Any]]:
    """Rows of the final table: the machine on the test split, and what others answer to the same questions."""
    if task.carries:
        read = measure_texts(run, task, mapped, mapped.put(params), "test")
        return [
            {"memory": tasks.name_of(run.config)}
            | {f"test_{name}": value for name, value in read.items()}
        ]
    params = mapped.put(params)
    scored = score_split(run, mapped, params, "test")
    streams = run.source.stream_id("test")[scored["example_id"]]
    rows = scoring.rows(
        run.source, "test", tasks.name_of(run.config), scored, streams, run.config.seed
    )
    rows[0] |= memory_gain(run, task, mapped, params, "test")
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The final table as text; the interval is over streams, and gains are the memory's (see `memory_gain`)."""
    names = {"low": "95% from", "high": "to", "test_auc": "test AUC", "test_mrr": "test MRR"}
    names |= {f"memory_gain_{name}": f"gain, {name}" for name in ("recollection", "familiarity")}
    names["memory_spread"] = "spread"
    return reporting.table(
        [
            {
                names.get(k, k.replace("_", " ")): round(v, 4) if isinstance(v, float) else v
                for k, v in row.items()
            }
            for row in rows
        ]
    )
