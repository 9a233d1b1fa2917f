"""The loop of a stage: steps, log lines, evaluations and checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from rmjax.data.pipeline import batches
from rmjax.run import reporting
from rmjax.run.evaluate import validate
from rmjax.run.mapping import Mapped
from rmjax.run.stages import Preempted, Training, data_settings
from rmjax.run.step import TOTALS, Carry, Metrics, TrainState
from rmjax.types import Batch, Params

# How many steps are dispatched before the host looks at the loss of a step. On a CPU none: several
# devices share a few threads, and threads that wait in one step's all-reduce can starve another
# step for ever.
IN_FLIGHT = {"cpu": 0}


def put_state(mapped: Mapped, state: TrainState) -> tuple[TrainState, Carry]:
    """Puts a state on the devices.

    Args:
      mapped: the mapped steps.
      state: on the host, with the carry of the streams of all processes.

    Returns:
      The state without its carry, and the carry of the streams of this process.
    """
    mine = lambda x: x.reshape(jax.process_count(), -1, *x.shape[1:])[jax.process_index()]
    carry = mapped.put_carry(jax.tree.map(mine, state.carry))
    return mapped.put(dataclasses.replace(state, carry=())), carry


def whole_state(mapped: Mapped, state: TrainState, carry: Carry) -> TrainState:
    """The inverse of `put_state`.

    Args:
      mapped: the mapped steps.
      state: on the devices.
      carry: of the streams of this process, on the devices.

    Returns:
      The state on the host, with the carry of the streams of all processes.
    """
    carry = mapped.get_carry(carry)
    if jax.process_count() > 1:
        carry = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), carry)
    return dataclasses.replace(mapped.get(state), carry=carry)


def run_loop(training: Training, start: int, state: TrainState, frozen: Params) -> None:
    """Runs a stage to its last step, which is evaluated and saved.

    Args:
      training: the stage.
      start: the step of `state`.
      state: on the host, with the carry of the streams of all processes.
      frozen: the teacher's parameters, on the host.

    Raises:
      Preempted: the run was asked to stop, and is saved.
      FloatingPointError: a loss is not finite.
    """
    run, stage, mapped, checkpoints, _ = training
    t, frozen = run.config.train, mapped.put(frozen)
    state, carry = put_state(mapped, state)
    host_state = lambda: whole_state(mapped, state, carry)
    progress = reporting.Progress(stage.steps, start, name=stage.name)
    losses = Losses(training, progress)
    data = batches(
        run.source,
        **data_settings(run),
        batch_size=stage.batch_size,
        start_step=start,
        num_steps=stage.steps,
    )
    with contextlib.closing(data), contextlib.closing(progress):
        for step in range(start, stage.steps + 1):
            due = step and (step % t.eval_every == 0 or step == stage.steps)
            if due and checkpoints.score(step) is None:
                losses.flush()
                try:
                    with progress.pause():
                        score = validate(training, state.params, step)
                except Preempted:
                    leave(training, step, host_state())
                checkpoints.save(step, host_state(), score)
            elif step > start and step % t.save_every == 0:
                losses.flush()
                checkpoints.save(step, host_state())
            if step == stage.steps:
                return
            if run.stopping(step):
                losses.flush()
                leave(training, step, host_state())
            batch = next(data)
            state, carry, values = mapped.train_step(state, carry, frozen, batch)
            losses.add(step + 1, values, batch)


def leave(training: Training, step: int, state: TrainState) -> None:
    """Saves a state, unless its step is saved already, and ends the run.

    Args:
      training: the stage.
      step: the step of `state`.
      state: on the host.

    Raises:
      Preempted: always.
    """
    if step not in training.checkpoints.steps():
        training.checkpoints.save(step, state)
    training.checkpoints.wait()
    name = training.stage.name
    raise Preempted(
        f"asked to stop in stage {name!r} at step {step}; run the same line again to go on"
    )


class Losses:
    """Looks at the losses of every step, a few steps late, so the devices never wait for the host.

    Args:
      training: the stage.
      progress: counts the steps.
    """

    def __init__(self, training: Training, progress: reporting.Progress):
        self._run, self._stage, self._mapped, _, self._writer = training
        self._progress = progress
        self._pending: collections.deque[tuple[int, Metrics, int, int]] = collections.deque()

    def add(self, step: int, values: Metrics, batch: Batch) -> None:
        """Adds a step that was dispatched.

        Args:
          step: the steps taken after it.
          values: its metrics, on the devices.
          batch: what it was given.

        Raises:
          FloatingPointError: a loss of an earlier step is not finite.
        """
        rows = int(batch.query_mask.any(-1).sum() * jax.process_count())
        queries = int(batch.query_mask.sum()) * jax.process_count()
        self._pending.append((step, values, rows, queries))
        while len(self._pending) > IN_FLIGHT.get(jax.default_backend(), 2):
            self._look(*self._pending.popleft())

    def flush(self) -> None:
        """Waits for all steps and looks at their losses.

        Raises:
          FloatingPointError: a loss is not finite.
        """
        while self._pending:
            self._look(*self._pending.popleft())

    def _look(self, step: int, metrics: Metrics, streams: int, queries: int) -> None:
        jax.block_until_ready(metrics)  # on every device
        values = {name: float(value) for name, value in self._mapped.get(metrics).items()}
        parts = {name: value for name, value in values.items() if name not in TOTALS}
        if not all(map(np.isfinite, values.values())):
            shown = " ".join(f"{name} {value:.6g}" for name, value in values.items())
            raise FloatingPointError(
                f"stage {self._stage.name!r}, step {step}: a loss is not finite ({shown}); the "
                "last good checkpoint is kept. Lower "
                f"config.{self._stage.section}.learning_rate or config.train.clip and use another "
                "workdir"
            )
        self._progress.tick(streams, queries)
        self._count()
        self._progress.show(values["loss"], parts)
        if step % self._run.config.train.log_every == 0 or step == self._stage.steps:
            rates = self._progress.rates()
            line = f"{self._stage.name} {self._progress.line(values['loss'], parts)}"
            text = line if self._progress.bar.disable else ""  # else the live line shows them
            finite = {name: rate for name, rate in rates.items() if np.isfinite(rate)}
            self._writer.write("train", step, values | finite, text)

    def _count(self) -> None:
        """Counts a step; the first one of the process logs what it waited for."""
        clock = self._run.clock
        clock.steps += 1
        if clock.steps == 1:
            seconds = time.monotonic() - clock.begin
            text = "%s: first step after %.1f s (opening the data %.1f s, compilation %.1f s)."
            name = self._stage.name
            logging.info(text, name, seconds, clock.opening, clock.compiling)
