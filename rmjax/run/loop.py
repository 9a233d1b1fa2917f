"""The loop of a stage: steps, log lines, evaluations and checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rmjax.data.pipeline import batches
from rmjax.run import reporting
from rmjax.run.evaluate import validate
from rmjax.run.mapping import Mapped
from rmjax.run.stages import Preempted, Training, data_settings
from rmjax.run.step import TrainState
from rmjax.types import Batch, Params

# Steps dispatched ahead of the one whose loss is looked at. None on CPU: several devices share a few threads there,
# and threads that wait in one step's all-reduce can starve another step of them for ever.
IN_FLIGHT = {"cpu": 0}


def put_state(mapped: Mapped, state: TrainState) -> tuple[TrainState, Any]:
    """-> the state and, apart from it, what its streams carry, on the devices; a process has its own streams alone."""
    mine = lambda x: x.reshape(jax.process_count(), -1, *x.shape[1:])[jax.process_index()]
    return mapped.put(dataclasses.replace(state, carry=())), mapped.put_carry(
        jax.tree.map(mine, state.carry)
    )


def whole_state(mapped: Mapped, state: TrainState, carry: Any) -> TrainState:
    """The way back, on the host, with the streams of all processes."""
    carry = mapped.get_carry(carry)
    if jax.process_count() > 1:
        carry = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), carry)
    return dataclasses.replace(mapped.get(state), carry=carry)


def loop(training: Training, start: int, state: TrainState, frozen: Params) -> None:
    """Steps, log lines, evaluations and checkpoints; returns at the last step, evaluated and saved.

    Args:
      training: the stage.
      start: the step that `state` is of.
      state: on the host, with what the streams of all processes carry.
      frozen: the teacher's parameters, on the host.

    Raises:
      Preempted: the run was asked to stop, and is saved.
      FloatingPointError: a loss is not finite.
    """
    run, stage, mapped, checkpoints, _ = training
    t, frozen = run.config.train, mapped.put(frozen)
    state, carry = put_state(mapped, state)
    whole = lambda: whole_state(mapped, state, carry)
    progress = reporting.Progress(stage.steps, start)
    losses = Losses(training, progress)
    data = batches(
        run.source,
        **data_settings(run),
        batch_size=stage.batch_size,
        start_step=start,
        num_steps=stage.steps,
    )
    with contextlib.closing(data):
        for step in range(start, stage.steps + 1):
            if (
                step
                and (step % t.eval_every == 0 or step == stage.steps)
                and checkpoints.score(step) is None
            ):
                losses.flush()
                try:
                    with progress.pause():
                        score = validate(training, state.params, step)
                except Preempted:
                    leave(training, step, whole())
                checkpoints.save(step, whole(), score)
            elif step > start and step % t.save_every == 0:
                losses.flush()
                checkpoints.save(step, whole())
            if step == stage.steps:
                return
            if run.stopping(step):
                losses.flush()
                leave(training, step, whole())
            batch = next(data)
            state, carry, values = mapped.train_step(state, carry, frozen, batch)
            losses.add(step + 1, values, batch)


def leave(training: Training, step: int, state: TrainState) -> None:
    """Saves, unless this step is saved already, and raises Preempted."""
    if step not in training.checkpoints.steps():
        training.checkpoints.save(step, state)
    training.checkpoints.wait()
    raise Preempted(
        f"asked to stop in stage {training.stage.name!r} at step {step}; run the same line again to go on"
    )


class Losses:
    """Looks at every step's losses, a few steps late so that the devices never wait for the host."""

    def __init__(self, training: Training, progress: reporting.Progress):
        self._run, self._stage, self._mapped, _, self._writer = training
        self._progress = progress
        self._pending: collections.deque = collections.deque()

    def add(self, step: int, values: dict, batch: Batch) -> None:
        rows = batch.query_mask.any(-1).sum() * jax.process_count()
        self._pending.append(
            (step, values, int(rows), int(batch.query_mask.sum()) * jax.process_count())
        )
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
            rates = {
                name: rate for name, rate in self._progress.rates().items() if np.isfinite(rate)
            }
            line = self._progress.line(values["loss"], parts)
            self._writer.write("train", step, values | rates, f"{self._stage.name} {line}")
