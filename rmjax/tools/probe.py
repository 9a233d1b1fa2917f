"""Measures forgetting.

For a machine: how well the rehearsal decoder recalls fragments of a stream from the stream's last
memory, by age of the fragment. For a model with Memoria: how old the reminded engrams are, and how
steadily they are reminded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from rmjax import memoria, tasks
from rmjax.data.pipeline import Subset, batches, eval_batches
from rmjax.evaluation import metrics, scoring
from rmjax.run import evaluate, kept, parameters, reporting, stages, training
from rmjax.tasks import rehearsing
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Batch, Key, Params, SequenceModel, Task, Terms, example_keys

BINS = 20  # most ranges of age in a curve
LAGS = 15  # lags of the autocorrelation, as in Memoria Table 7
AGAIN = "run the same line again"
Measures = dict[str, Any]  # the content of probe.json


@dataclasses.dataclass(frozen=True)
class Probe(Task):
    """The task of training a new rehearsal decoder on memories that stay as they are.

    Attributes:
      model: the model whose memories are decoded. `losses` gets the model's parameters as `frozen`.
    """

    model: Reasoning

    def init(self, key: Key) -> Params:
        """Draws the decoder's parameters, see `rmjax.types.Task`."""
        return {"rehearsal": self.model.init_rehearsal(key, self.model.init(key)["machine"])}

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        """Computes both rehearsal losses, see `rmjax.types.Task`."""
        r, machine = self.model.rehearsal, self.model.machine
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
        memory = self.model.memorize(frozen, batch).memory  # without dropout, as for questions
        valid = batch.item_mask.any(-1)
        segments = rehearsing.choose_segments(r, keys[:, 1], None, None, batch, valid)
        both = {"machine": frozen["machine"]} | params
        return rehearsing.losses(r, machine, both, batch, memory, segments, keys[:, 2], key), carry


def measure(config: ConfigDict, workdir: str | Path) -> Measures:
    """Measures the forgetting of the best checkpoint in `workdir`.

    For a machine: recollection accuracy and familiarity AUC by age in segments, and the measures of
    the test split by group. They are written to probe.json and drawn in probe.png. The decoder is
    the model's own. If config.probe.steps is set, a new decoder is trained for this many steps on
    the model's memories.

    For a model with Memoria, see `measure_engrams`.

    Args:
      config: of the run; config.probe holds the settings.
      workdir: of the run.

    Returns:
      The content of probe.json.

    Raises:
      FileNotFoundError: `workdir` has no checkpoint of the model.
      ValueError: the model was trained without rehearsal and config.probe.steps = 0; or the model
        has no memory to probe; or another config began the run.
      Preempted: the process was asked to stop.
    """
    if tasks.is_sequence(config):
        return measure_engrams(config, workdir)
    p, r = config.probe, config.rehearsal
    if not p.steps and not (r.recollection or r.familiarity):
        raise ValueError(
            "this model was trained without rehearsal, so it has no decoder that could probe the "
            "memory: --config.probe.steps=500 trains a decoder and leaves the memory as it is"
        )
    with training.opened(config, workdir, reading=True) as run:
        stage = stages.model_stage(run)
        mapped = stages.map_stage(run, stage)
        params = parameters.read_model(run.workdir, stage.task)
        model = stage.task
        assert isinstance(model, Reasoning)
        trained = {"recollection": bool(r.recollection), "familiarity": bool(r.familiarity)}
        if p.steps:
            model, params = train_probe(run, model, params)
            trained = dict.fromkeys(trained, True)
        recalled = recall_split(run, model, params, "test")
        own = mapped.put(train_part(stage.task, params))
        scored = evaluate.score_split(run, mapped, own, "test")
        new = f"trained for {p.steps} steps on the frozen memory"
        result = {
            "machine": config.machine.kind,
            "decoder": new if p.steps else "the model's own",
            "measures": scoring.measures(run.source, "test", scored, config.train.metric),
            "by_age": by_age(recalled, trained),
        }
        keep(result, run.workdir, lambda: plot(result, run.workdir / "probe.png"))
        return result


def measure_engrams(config: ConfigDict, workdir: str | Path) -> Measures:
    """Measures the engrams of a model with Memoria (Memoria Figures 5 and 6, Table 7).

    The mean age of the reminded long-term engrams at each step, and the autocorrelation of being
    reminded, are means over the streams. They are drawn in mean_age.png and autocorrelation.png.

    Args:
      config: of the run; config.probe holds the settings.
      workdir: of the run.

    Returns:
      The content of probe.json: mean_age, one entry a segment; short_term and long_term, one
      coefficient a lag; None where no stream has a number.

    Raises:
      FileNotFoundError: `workdir` has no checkpoint of the model.
      ValueError: the model has no engrams; or another config began the run.
      Preempted: the process was asked to stop.
    """
    if "memoria" not in config.model.kind:
        raise ValueError(
            f"config.model.kind = {config.model.kind!r} has no engrams to probe: take a kind with "
            "'memoria' in the name"
        )
    with training.opened(config, workdir, reading=True) as run:
        stage = stages.model_stage(run)
        params = parameters.read_model(run.workdir, stage.task)
        histories = list(streams_of_engrams(run, stage.task, jax.device_put(params)))
        lags = max(1, min(LAGS, max(len(history.serial) for history in histories) - 1))
        mean = lambda series: nan_to_none(mean_over_streams(series))
        result = {
            "model": config.model.kind,
            "streams": len(histories),
            "mean_age": mean([memoria.mean_age(history) for history in histories]),
        }
        for name, kind in (("short_term", memoria.SHORT_TERM), ("long_term", memoria.LONG_TERM)):
            values = [memoria.autocorrelation(history, lags, kind) for history in histories]
            result[name] = mean(values)
        keep(result, run.workdir, lambda: plot_engrams(result, run.workdir))
        return result


def keep(result: Measures, workdir: Path, draw: Callable[[], None]) -> None:
    """Writes probe.json and the figures; if the folder is read-only or full, only warns.

    Args:
      result: the content of probe.json.
      workdir: folder of the files.
      draw: draws the figures.
    """
    try:
        kept.write_whole(workdir / "probe.json", json.dumps(result, indent=1))
        draw()
    except OSError as error:
        logging.warning("probe.json and its figures are not kept: %s", error)


def streams_of_engrams(run: stages.Run, task: Any, params: Params) -> Iterator[memoria.Record]:
    """Yields the history of each stream of the test split, segment by segment.

    Args:
      run: the run. Texts give all rows that are evaluated together. Other data give at most
        config.probe.streams streams.
      task: the task of a model with Memoria.
      params: of the task, on the device.

    Yields:
      Records with fields [T, C]: T segments, C slots.

    Raises:
      Preempted: the process was asked to stop.
    """
    rows = run.config.train.eval_batch_size
    watch = jax.jit(partial(watched, task.model))
    carry, parts, resets = None, [], []
    if task.carries:
        data: Any = run.source.evaluation("test", rows)
    else:
        some = Subset(run.source, "test", run.config.probe.streams, run.config.seed)
        data = eval_batches(some, "test", **stages.data_settings(run), batch_size=rows)
    with contextlib.closing(data):
        for batch in data:
            if run.stopping():
                raise stages.Preempted("asked to stop while probing; " + AGAIN)
            if carry is None or not task.carries:
                carry = task.memory(params, len(batch.items))
            carry, records = watch(params, carry, batch)
            parts.append(jax.device_get(records))
            if task.carries:
                resets.append(batch.reset.T)
            else:
                lengths = batch.item_mask.any(-1).sum(1)
                valid = np.arange(batch.items.shape[1])[:, None] < lengths
                yield from split_streams(parts.pop(), valid, np.zeros_like(valid))
    if parts:
        records, reset = jax.tree.map(lambda *x: np.concatenate(x), *parts), np.concatenate(resets)
        yield from split_streams(records, np.ones_like(reset), reset)


def watched(
    model: SequenceModel, params: Params, state: Any, batch: Batch
) -> tuple[Any, memoria.Record]:
    """Runs a model with Memoria over the segments of a batch.

    Args:
      model: the model.
      params: of the model.
      state: of B streams, before the batch.
      batch: T segments of B streams.

    Returns:
      The state after the batch, and the records of the segments, [T, B, C].
    """
    reset = jnp.zeros(batch.items.shape[:2], bool) if batch.reset is None else batch.reset

    def read(state: Any, segment: tuple[Array, Array, Array]) -> tuple[Any, memoria.Record]:
        tokens, mask, reset = segment
        state = model.step(params, model.reset(state, reset), tokens, mask)[1]
        return state, state.record

    return jax.lax.scan(
        read, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (batch.items, batch.item_mask, reset))
    )


def split_streams(
    records: memoria.Record, valid: np.ndarray, reset: np.ndarray
) -> Iterator[memoria.Record]:
    """Splits the records of a batch into streams, which end at a row's end or at a reset.

    Args:
      records: [T, B, C].
      valid: bool [T, B], the segments that exist.
      reset: bool [T, B], whether a stream begins anew before a segment.

    Yields:
      The records [t, C] of one stream. Rows that only fill up a batch give none.
    """
    for row in range(valid.shape[1]):
        for moments in np.split(np.arange(len(valid)), np.flatnonzero(reset[:, row])):
            moments = moments[valid[moments, row]]
            if len(moments):
                yield jax.tree.map(lambda x: np.asarray(x[moments, row]), records)  # noqa: B023


def mean_over_streams(series: list[np.ndarray]) -> np.ndarray:
    """Averages series of different lengths.

    Args:
      series: arrays [T], T differing; NaN where a stream has no number.

    Returns:
      f64 [longest T], the means over the streams that have a number; NaN where none has.
    """
    longest = max(map(len, series))
    padded = np.stack([np.pad(x, (0, longest - len(x)), constant_values=np.nan) for x in series])
    finite = np.isfinite(padded)
    mean = np.where(finite, padded, 0).sum(0) / np.maximum(finite.sum(0), 1)
    return np.where(finite.any(0), mean, np.nan)


def nan_to_none(values: np.ndarray) -> list[float | None]:
    """Rounds values to 6 decimals for JSON; NaN becomes None."""
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def plot_engrams(result: Measures, workdir: Path) -> None:
    """Draws mean_age.png and autocorrelation.png; without matplotlib, logs that they are missing.

    Args:
      result: of `measure_engrams`.
      workdir: folder of the figures.
    """
    try:
        from rmjax.memoria import plots
    except ImportError:
        logging.info(
            "no figures in %s: matplotlib is not installed (pip install 'rmjax[plots]')", workdir
        )
        return
    numbers = {name: np.array(result[name], float) for name in ("mean_age", "long_term")}
    plots.mean_age(numbers["mean_age"], workdir / "mean_age.png")
    plots.autocorrelation(numbers["long_term"], workdir / "autocorrelation.png")


def train_part(task: Task, params: Params) -> Params:
    """Selects the parameters that `task` has from a tree that may have more."""
    return {name: params[name] for name in jax.eval_shape(task.init, jax.random.key(0))}


def train_probe(run: stages.Run, model: Reasoning, params: Params) -> tuple[Reasoning, Params]:
    """Trains a new decoder on memories that stay as they are.

    Both rehearsal losses are used, on uniformly drawn fragments. The decoder is not saved: after a
    stop, the training starts again.

    Args:
      run: the run; config.probe.steps and config.train hold the settings.
      model: the trained model.
      params: of the model.

    Returns:
      The model with the new decoder's settings, and the parameters with the new decoder.

    Raises:
      Preempted: the process was asked to stop.
    """
    r = dataclasses.replace(model.rehearsal, sampler="uniform", recollection=1.0, familiarity=1.0)
    model = dataclasses.replace(model, rehearsal=r)
    t, steps = run.config.train, run.config.probe.steps
    stage = stages.Stage("probe", Probe(model), steps, t.batch_size, t.learning_rate)
    mapped = stages.map_stage(run, stage)
    state, frozen = mapped.put(stages.fresh_state(run, stage)), mapped.put(params)
    settings = stages.data_settings(run)
    data = batches(run.source, **settings, batch_size=stage.batch_size, num_steps=steps)
    with contextlib.closing(data):
        for step, batch in enumerate(data, 1):
            if run.stopping(step):
                raise stages.Preempted("asked to stop while training a probe; " + AGAIN)
            state, _, values = mapped.train_step(state, (), frozen, batch)
            if step % t.log_every == 0 or step == steps:
                shown = {name: round(float(value), 4) for name, value in mapped.get(values).items()}
                logging.info("probe step %d/%d | %s", step, steps, shown)
    return model, params | mapped.get(state.params)


def recall_split(
    run: stages.Run, model: Reasoning, params: Params, split: str
) -> dict[str, np.ndarray]:
    """Recalls fragments of config.probe.streams streams, which are drawn from all of a split.

    Args:
      run: the run; config.probe holds the settings.
      model: a model with a trained decoder.
      params: of the model.
      split: name of the split.

    Returns:
      The arrays of `recall`, for all n streams and on every process.

    Raises:
      Preempted: the process was asked to stop.
    """
    p = run.config.probe
    r = dataclasses.replace(model.rehearsal, fragments=p.fragments, sampler="uniform")
    model = dataclasses.replace(model, rehearsal=r)
    recall_batch = jax.jit(partial(recall, model, jax.device_put(params)))
    parts = []
    for batch, other in evaluate.paired_batches(run, split, p.streams):
        if run.stopping():
            raise stages.Preempted("asked to stop while probing; " + AGAIN)
        parts.append(jax.device_get(recall_batch(batch, other, jax.random.key(run.config.seed))))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if jax.process_count() > 1:
        gather = partial(multihost_utils.process_allgather, tiled=True)
        arrays = {name: gather(value) for name, value in arrays.items()}
    return arrays


def recall(
    model: Reasoning, params: Params, batch: Batch, other: Batch, key: Key
) -> dict[str, Array]:
    """Recalls fragments of a batch from the last memories.

    Args:
      model: a model with a trained decoder.
      params: of the model.
      batch: B streams.
      other: in each row another stream, whose memory shows what the own memory adds.
      key: draws the fragments.

    Returns:
      For F fragments a stream with at most M masked items:
      age: [B, F] number of segments after the fragment;
      valid: [B, F] fragments that exist;
      right, asked: [B, F, M] masked items that are recalled, and that exist;
      positive, negative: [B, F] logits that a fragment and its negative are familiar;
      pair: [B, F] fragments that differ from their negative;
      for the trained losses, <loss>_gain: [B, F] how much lower the loss is with the own memory,
      and <loss>_counted: [B, F] where it counts.
    """
    r, machine = model.rehearsal, model.machine
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
    valid = batch.item_mask.any(-1)
    segments = rehearsing.choose_segments(r, keys[:, 0], None, None, batch, valid)
    cut = rehearsing.cut_fragments(r, keys[:, 1], batch, segments)
    memory = model.memorize(params, batch).memory
    positive, negative, recalled = rehearsing.recall(r, machine, params, cut, memory, None)
    target, others, same = rehearsing.alternatives(
        r, machine, params, cut, batch, (key, keys[:, 2])
    )
    truth = jnp.einsum("...d,...d->...", recalled, target)
    logits = recalled @ others.swapaxes(-1, -2)
    if same is None:  # the truth is one of `others`: an item is right if no logit is above
        right = (logits > truth[..., None] + 1e-4).sum(-1) == 0
    else:
        right = (jnp.where(same, -jnp.inf, logits) >= truth[..., None]).sum(-1) == 0
    rank = jnp.take_along_axis(jnp.cumsum(valid, 1), segments[0], 1)
    losses = partial(rehearsing.fragment_losses, r, machine, params, batch, cut)
    own = losses(memory, keys[:, 2], key)
    strange = losses(model.memorize(params, other).memory, keys[:, 2], key)
    paired = other.item_mask.any((1, 2))[:, None]
    gains: dict[str, Array] = {}
    for name, (loss, counted) in own.items():
        gains |= {f"{name}_gain": strange[name][0] - loss, f"{name}_counted": counted & paired}
    return gains | {
        "age": valid.sum(1, keepdims=True) - rank,
        "valid": cut.mask.any(-1),
        "right": right,
        "asked": cut.hidden_mask,
        "positive": positive,
        "negative": negative,
        "pair": cut.pair,
    }


def by_age(recalled: dict[str, np.ndarray], trained: dict[str, bool]) -> list[dict[str, Any]]:
    """Averages the recall over fragments of the same age, or range of ages.

    Args:
      recalled: the arrays of `recall_split`.
      trained: {'recollection', 'familiarity': whether the decoder was trained for it}.

    Returns:
      One line for each age (0: the latest segment), or for each of at most `BINS` ranges of ages:
      {from, to, fragments, recollection, familiarity}. Values that the decoder was not trained for
      are None. memory_gain_<loss> is the memory gain of a trained loss.
    """
    age, valid = recalled["age"], recalled["valid"]
    if not valid.any():
        return []
    oldest = int(age[valid].max())
    step = -(-(oldest + 1) // BINS)
    lines = []
    for low in range(0, oldest + 1, step):
        inside = valid & (age >= low) & (age < low + step)
        asked, pair = recalled["asked"] & inside[..., None], recalled["pair"] & inside
        scores = np.concatenate([recalled["positive"][pair], recalled["negative"][pair]])
        labels = np.repeat([1, 0], pair.sum())
        right = float(recalled["right"][asked].mean()) if asked.any() else None
        area = metrics.auc(scores, labels) if pair.any() else None
        gains = {}
        for name in (name for name in trained if trained[name]):
            counted = recalled[f"{name}_counted"] & inside
            gain = recalled[f"{name}_gain"][counted]
            gains[f"memory_gain_{name}"] = float(gain.mean()) if counted.any() else None
        line: dict[str, Any] = {"from": low, "to": low + step - 1, "fragments": int(inside.sum())}
        line["recollection"] = right if trained["recollection"] else None
        line["familiarity"] = area if trained["familiarity"] else None
        lines.append(line | gains)
    return lines


def plot(result: Measures, path: Path) -> None:
    """Draws both curves over age; without matplotlib, logs that the figure is missing.

    Args:
      result: of `measure`, for a machine.
      path: of the figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.info("no %s: matplotlib is not installed (pip install 'rmjax[plots]')", path)
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    ages = [(line["from"] + line["to"]) / 2 for line in result["by_age"]]
    for name, unit in (("recollection", "accuracy"), ("familiarity", "AUC")):
        values = [line[name] for line in result["by_age"]]
        if any(value is not None for value in values):
            numbers = [np.nan if value is None else value for value in values]
            axes.plot(ages, numbers, marker="o", label=f"{name}, {unit}")
    axes.set(
        xlabel="age of the fragment, in segments (0: the latest)",
        ylim=(0, 1.02),
        title=result["machine"],
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def show(result: Measures) -> str:
    """Formats the result of `measure` as text."""
    if "mean_age" in result:
        return show_engrams(result)
    measures = " ".join(f"{name} {value:.4f}" for name, value in result["measures"].items())
    title = f"{result['machine']}, decoder: {result['decoder']} | {measures}"
    return f"{title}\n{reporting.table(result['by_age'])}"


def show_engrams(result: Measures) -> str:
    """Formats the result of `measure_engrams` as text."""
    model, length = result["model"], len(result["mean_age"])
    ages = [(step, age) for step, age in enumerate(result["mean_age"]) if age is not None]
    if not ages:
        return f"{model}: no long-term engram was reminded in streams of {length} segments"
    some = ages[:: max(1, len(ages) // BINS)]
    both = zip(result["short_term"], result["long_term"], strict=True)
    age_rows = [{"segment": step, "mean age": round(age, 2)} for step, age in some]
    lag_rows = [
        {"lag": lag, "short-term": short, "long-term": long}
        for lag, (short, long) in enumerate(both, 1)
    ]
    title = "streams: mean age of reminded long-term engrams, in segments"
    return "\n".join(
        [
            f"{model}, {result['streams']} {title}",
            reporting.table(age_rows),
            "autocorrelation of being reminded",
            reporting.table(lag_rows),
        ]
    )
