"""Forgetting, measured: what the rehearsal decoder recalls of a stream from its last memory, by age of the fragment;
of a model with Memoria, how old the engrams are that it is reminded of, and how steadily it is.
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

from rmjax import memoria, tasks
from rmjax.data.pipeline import Subset, batches, eval_batches
from rmjax.evaluation import metrics, scoring
from rmjax.run import evaluate, kept, parameters, reporting, stages, training
from rmjax.tasks import rehearsing
from rmjax.tasks.reasoning import Reasoning
from rmjax.types import Array, Batch, Key, Params, SequenceModel, Task, Terms, example_keys

BINS = 20  # most ages that are told apart
LAGS = 15  # of the autocorrelation, as in Memoria Table 7


@dataclasses.dataclass(frozen=True)
class Probe(Task):
    """A rehearsal decoder of its own on memories that are not trained: `frozen` are a model's parameters."""

    model: Reasoning

    def init(self, key: Key) -> Params:
        return {"rehearsal": self.model.init_rehearsal(key, self.model.init(key)["machine"])}

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        r, machine = self.model.rehearsal, self.model.machine
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
        memory = self.model.memorize(frozen, batch).memory  # as it is when asked: without dropout
        found = rehearsing.choose_segments(
            r, keys[:, 1], None, None, batch, batch.item_mask.any(-1)
        )
        both = {"machine": frozen["machine"]} | params
        return rehearsing.losses(r, machine, both, batch, memory, found, keys[:, 2], key), carry


def probe(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Recollection accuracy and familiarity AUC by age in segments, of the best checkpoint in `workdir`, and its
    measures by group; written to probe.json, and drawn in probe.png.

    The decoder is the model's own, or with config.probe.steps one trained here for so many steps on its memories.

    Of a model with Memoria: the mean age of the long-term engrams that it is reminded of, at each step, and the
    autocorrelation of being reminded (Memoria Figures 5 and 6, Table 7), means over the streams; mean_age.png and
    autocorrelation.png.

    Raises:
      FileNotFoundError: `workdir` has no checkpoint of the model.
      ValueError: the model was trained without rehearsal and config.probe.steps = 0; or it has no memory to probe.
    """
    if tasks.is_sequence(config):
        return probe_engrams(config, workdir)
    p, r = config.probe, config.rehearsal
    if not p.steps and not (r.recollection or r.familiarity):
        raise ValueError(
            "this model was trained without rehearsal, so it has no decoder to probe its memory with: "
            "--config.probe.steps=500 trains one, its memory being left as it is"
        )
    with training.opened(config, workdir, reading=True) as run:
        stage = stages.model_stage(run)
        mapped = stages.map_stage(run, stage)
        params = parameters.read_model(run.workdir, stage.task)
        model: Any = stage.task
        trained = {"recollection": bool(r.recollection), "familiarity": bool(r.familiarity)}
        if p.steps:
            model, params = train_probe(run, model, params)
            trained = dict.fromkeys(trained, True)
        recalled = recall_split(run, model, params, "test")
        scored = evaluate.score_split(
            run, mapped, mapped.put(train_part(stage.task, params)), "test"
        )
        found = {
            "machine": config.machine.kind,
            "decoder": f"trained for {p.steps} steps on the frozen memory"
            if p.steps
            else "the model's own",
            "measures": scoring.measures(run.source, "test", scored),
            "by_age": by_age(recalled, trained),
        }
        keep(found, run.workdir, lambda: plot(found, run.workdir / "probe.png"))
        return found


def probe_engrams(config: Any, workdir: str | Path) -> dict[str, Any]:
    """See `probe`."""
    if "memoria" not in config.model.kind:
        raise ValueError(
            f"config.model.kind = {config.model.kind!r} has no engrams to probe: those with memoria have"
        )
    with training.opened(config, workdir, reading=True) as run:
        stage = stages.model_stage(run)
        params = parameters.read_model(run.workdir, stage.task)
        histories = list(streams_of_engrams(run, stage.task, jax.device_put(params)))
        lags = max(1, min(LAGS, max(len(history.serial) for history in histories) - 1))
        mean = lambda series: nan_to_none(mean_over_streams(series))
        found = {
            "model": config.model.kind,
            "streams": len(histories),
            "mean_age": mean([memoria.mean_age(history) for history in histories]),
        } | {
            name: mean([memoria.autocorrelation(history, lags, kind) for history in histories])
            for name, kind in (("short_term", memoria.SHORT_TERM), ("long_term", memoria.LONG_TERM))
        }
        keep(found, run.workdir, lambda: plot_engrams(found, run.workdir))
        return found


def keep(found: dict[str, Any], workdir: Path, draw: Callable[[], None]) -> None:
    """Writes probe.json and its figures. Where that fails, a warning says so and the numbers remain."""
    try:
        kept.write_whole(workdir / "probe.json", json.dumps(found, indent=1))
        draw()
    except OSError as error:
        logging.warning("probe.json and its figures are not kept: %s", error)


def streams_of_engrams(run: stages.Run, task: Any, params: Params) -> Iterator[memoria.Record]:
    """Of each stream of the test split its history [T, C], segment by segment: of texts, of all rows that are evaluated
    together; else of config.probe.streams at most.
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
                raise stages.Preempted("asked to stop while probing; run the same line again")
            if carry is None or not task.carries:
                carry = task.memory(params, len(batch.items))
            carry, records = watch(params, carry, batch)
            parts.append(jax.device_get(records))
            if task.carries:
                resets.append(batch.reset.T)
            else:
                lengths = batch.item_mask.any(-1).sum(1)
                there = np.arange(batch.items.shape[1])[:, None] < lengths
                yield from each_stream(parts.pop(), there, np.zeros_like(there))
    if parts:
        whole, reset = jax.tree.map(lambda *x: np.concatenate(x), *parts), np.concatenate(resets)
        yield from each_stream(whole, np.ones_like(reset), reset)


def watched(
    model: SequenceModel, params: Params, state: Any, batch: Batch
) -> tuple[Any, memoria.Record]:
    """-> the state after the batch, and the records [T, B, C] of its segments."""
    reset = jnp.zeros(batch.items.shape[:2], bool) if batch.reset is None else batch.reset

    def read(state: Any, segment: tuple) -> tuple[Any, memoria.Record]:
        tokens, mask, reset = segment
        state = model.step(params, model.reset(state, reset), tokens, mask)[1]
        return state, state.record

    return jax.lax.scan(
        read, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (batch.items, batch.item_mask, reset))
    )


def each_stream(
    records: memoria.Record, there: np.ndarray, reset: np.ndarray
) -> Iterator[memoria.Record]:
    """Records [T, B, C] by row, from one reset bool [T, B] to the next; without what is not `there`, bool [T, B]."""
    for row in range(there.shape[1]):
        for moments in np.split(np.arange(len(there)), np.flatnonzero(reset[:, row])):
            moments = moments[there[moments, row]]
            if len(moments):  # rows without fill up a batch
                yield jax.tree.map(lambda x: np.asarray(x[moments, row]), records)  # noqa: B023


def mean_over_streams(series: list[np.ndarray]) -> np.ndarray:
    """Mean of [T] each, NaN where no stream has a number."""
    longest = max(map(len, series))
    whole = np.stack([np.pad(x, (0, longest - len(x)), constant_values=np.nan) for x in series])
    there = np.isfinite(whole)
    return np.where(
        there.any(0), np.where(there, whole, 0).sum(0) / np.maximum(there.sum(0), 1), np.nan
    )


def nan_to_none(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def plot_engrams(found: dict[str, Any], workdir: Path) -> None:
    """Both figures; left out, with a word, where matplotlib is not installed."""
    try:
        from rmjax.memoria import plots
    except ImportError:
        logging.info(
            "no figures in %s: matplotlib is not installed (pip install 'rmjax[plots]')", workdir
        )
        return
    numbers = {name: np.array(found[name], float) for name in ("mean_age", "long_term")}
    plots.mean_age(numbers["mean_age"], workdir / "mean_age.png")
    plots.autocorrelation(numbers["long_term"], workdir / "autocorrelation.png")


def train_part(task: Any, params: Params) -> Params:
    """The parameters that `task` has, of more."""
    return {name: params[name] for name in jax.eval_shape(task.init, jax.random.key(0))}


def train_probe(run: stages.Run, model: Reasoning, params: Params) -> tuple[Reasoning, Params]:
    """A decoder for memories that stay what they are: both rehearsal losses, uniformly drawn fragments. It is not
    saved: stopped, it starts anew.
    """
    r = dataclasses.replace(model.rehearsal, sampler="uniform", recollection=1.0, familiarity=1.0)
    model = dataclasses.replace(model, rehearsal=r)
    t, steps = run.config.train, run.config.probe.steps
    stage = stages.Stage("probe", Probe(model), steps, t.batch_size, t.learning_rate)
    mapped = stages.map_stage(run, stage)
    state, frozen = mapped.put(stages.fresh_state(run, stage)), mapped.put(params)
    data = batches(
        run.source, **stages.data_settings(run), batch_size=stage.batch_size, num_steps=steps
    )
    with contextlib.closing(data):
        for step, batch in enumerate(data, 1):
            if run.stopping(step):
                raise stages.Preempted(
                    "asked to stop while training a probe; run the same line again"
                )
            state, _, values = mapped.train_step(state, (), frozen, batch)
            if step % t.log_every == 0 or step == steps:
                shown = {name: round(float(value), 4) for name, value in mapped.get(values).items()}
                logging.info("probe step %d/%d | %s", step, steps, shown)
    return model, params | mapped.get(state.params)


def recall_split(
    run: stages.Run, model: Reasoning, params: Params, split: str
) -> dict[str, np.ndarray]:
    """Of fragments of config.probe.streams streams, drawn from the whole split: their age [n, F] in segments, which
    there are; right and asked [n, F, M] of their masked items; logits [n, F] that they and their negatives are
    familiar, and which of these pairs differ.
    """
    r = dataclasses.replace(
        model.rehearsal, fragments=run.config.probe.fragments, sampler="uniform"
    )
    recall_batch = jax.jit(
        partial(recall, dataclasses.replace(model, rehearsal=r), jax.device_put(params))
    )
    parts = []
    for batch, other in evaluate.paired_batches(run, split, run.config.probe.streams):
        if run.stopping():
            raise stages.Preempted("asked to stop while probing; run the same line again")
        parts.append(jax.device_get(recall_batch(batch, other, jax.random.key(run.config.seed))))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if jax.process_count() > 1:
        whole = {
            name: multihost_utils.process_allgather(value, tiled=True)
            for name, value in whole.items()
        }
    return whole


def recall(
    model: Reasoning, params: Params, batch: Batch, other: Batch, key: Key
) -> dict[str, Array]:
    r, machine = model.rehearsal, model.machine
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
    valid = batch.item_mask.any(-1)
    found = rehearsing.choose_segments(r, keys[:, 0], None, None, batch, valid)
    cut = rehearsing.cut_fragments(r, keys[:, 1], batch, found)
    memory = model.memorize(params, batch).memory
    positive, negative, recalled = rehearsing.recall(r, machine, params, cut, memory, None)
    target, others, same = rehearsing.alternatives(
        r, machine, params, cut, batch, (key, keys[:, 2])
    )
    truth = jnp.einsum("...d,...d->...", recalled, target)
    logits = recalled @ others.swapaxes(-1, -2)
    if same is None:  # the truth is among them, and nothing is above it
        right = (logits > truth[..., None] + 1e-4).sum(-1) == 0
    else:
        right = (jnp.where(same, -jnp.inf, logits) >= truth[..., None]).sum(-1) == 0
    rank = jnp.take_along_axis(jnp.cumsum(valid, 1), found[0], 1)
    losses = partial(rehearsing.fragment_losses, r, machine, params, batch, cut)
    own = losses(memory, keys[:, 2], key)
    strange = losses(model.memorize(params, other).memory, keys[:, 2], key)
    paired = other.item_mask.any((1, 2))[:, None]
    gains: dict[str, Array] = {}
    for name, (loss, counted) in own.items():
        gains |= {f"{name}_gain": strange[name][0] - loss, f"{name}_counted": counted & paired}
    return gains | {
        "age": valid.sum(1, keepdims=True) - rank,
        "there": cut.mask.any(-1),
        "right": right,
        "asked": cut.hidden_mask,
        "positive": positive,
        "negative": negative,
        "pair": cut.pair,
    }


def by_age(recalled: dict[str, np.ndarray], trained: dict[str, bool]) -> list[dict[str, Any]]:
    """One line an age (0: the latest segment), or a range of ages: {from, to, fragments, recollection, familiarity},
    None for what the decoder was not trained for, and the memory gain of what it was.
    """
    age, there = recalled["age"], recalled["there"]
    if not there.any():
        return []
    step = -(-(int(age[there].max()) + 1) // BINS)
    lines = []
    for low in range(0, int(age[there].max()) + 1, step):
        inside = there & (age >= low) & (age < low + step)
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
        lines.append(
            {
                "from": low,
                "to": low + step - 1,
                "fragments": int(inside.sum()),
                "recollection": right if trained["recollection"] else None,
                "familiarity": area if trained["familiarity"] else None,
            }
            | gains
        )
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """Both curves over age; left out, with a word, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.info("no %s: matplotlib is not installed (pip install 'rmjax[plots]')", path)
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    ages = [(line["from"] + line["to"]) / 2 for line in found["by_age"]]
    for name, label in (
        ("recollection", "recollection, accuracy"),
        ("familiarity", "familiarity, AUC"),
    ):
        values = [line[name] for line in found["by_age"]]
        if any(value is not None for value in values):
            axes.plot(ages, [np.nan if v is None else v for v in values], marker="o", label=label)
    axes.set(
        xlabel="age of the fragment, in segments (0: the latest)",
        ylim=(0, 1.02),
        title=found["machine"],
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def show(found: dict[str, Any]) -> str:
    """The curves as text."""
    if "mean_age" in found:
        return show_engrams(found)
    measures = " ".join(f"{name} {value:.4f}" for name, value in found["measures"].items())
    return f"{found['machine']}, decoder: {found['decoder']} | {measures}\n{reporting.table(found['by_age'])}"


def show_engrams(found: dict[str, Any]) -> str:
    ages = [(step, age) for step, age in enumerate(found["mean_age"]) if age is not None]
    if not ages:
        return f"{found['model']}: in streams of {len(found['mean_age'])} segments no long-term engram was reminded"
    some = ages[:: max(1, len(ages) // BINS)]
    both = zip(found["short_term"], found["long_term"], strict=True)
    return "\n".join(
        [
            f"{found['model']}, {found['streams']} streams: mean age of reminded long-term engrams, in segments",
            reporting.table([{"segment": step, "mean age": round(age, 2)} for step, age in some]),
            "autocorrelation of being reminded",
            reporting.table(
                [
                    {"lag": lag, "short-term": short, "long-term": long}
                    for lag, (short, long) in enumerate(both, 1)
                ]
            ),
        ]
    )
