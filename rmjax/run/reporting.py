"""Where numbers are written, how fast the run is, and tables."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from rmjax.registry import LOGGERS, names_in
from rmjax.types import Logger, LoggerContext


class MetricWriter:
    """Writes metrics to the log and to loggers.

    Args:
      loggers: are closed with it.
      silent: writes nothing, as processes other than 0.
    """

    def __init__(self, loggers: Sequence[Logger] = (), silent: bool = False):
        self.loggers, self._silent = tuple(loggers), silent

    def write(
        self, kind: str, step: int, values: Mapping[str, Any], text: str | None = None
    ) -> None:
        """Writes numbers of one step.

        Args:
          kind: "train", "valid", ...: what they are of.
          step: the step.
          values: scalars; they may be NaN or infinite.
          text: what the log says, if not simply the values.

        Raises:
          OSError: the disk is full, or the like; names the file and what to do.
        """
        if self._silent:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        logging.info(
            "%s",
            text
            or f"{kind} step {step} | " + " ".join(f"{k} {_short(v)}" for k, v in numbers.items()),
        )
        for logger in self.loggers:
            logger.write(kind, step, numbers)

    def close(self) -> None:
        """Closes every logger, even where one fails."""
        with contextlib.ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)


def open_loggers(
    config: Any,
    workdir: str | Path,
    stage: str = "model",
    start_step: int = 0,
    evaluated: bool = True,
    more: Sequence[Logger] = (),
) -> MetricWriter:
    """Opens the loggers that `config.train.loggers` names, on process 0; others write nothing.

    Args:
      config: of the run.
      workdir: of the run.
      stage: what counts the steps, "teacher" or "model".
      start_step: the step restored from; 0 at the start. What was written after it is written again.
      evaluated: False if start_step is still to be evaluated, so that an evaluation of it written before goes too.
      more: the caller's own, who also closes them. They see kinds such as 'model/train' and 'teacher/valid'.

    Raises:
      ImportError: the package of a logger is missing; says how to install it.
    """
    if jax.process_index():
        return MetricWriter(silent=True)
    context = LoggerContext(
        Path(workdir), json.loads(config.to_json()), stage, start_step, evaluated
    )
    with contextlib.ExitStack() as stack:
        opened: list[Logger] = []
        for name in names_in(config.train.loggers):
            settings = LOGGERS.settings(
                name, getattr(config, "logger", {}), "config.logger.", config
            )
            opened.append(LOGGERS[name].make(settings, context))
            stack.callback(opened[-1].close)
        stack.pop_all()  # all are open: the writer closes them
    return MetricWriter([*opened, *(_Lent(logger, stage) for logger in more)])


class _Lent(NamedTuple):
    """A logger that outlives a stage."""

    logger: Logger
    stage: str

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        self.logger.write(f"{self.stage}/{kind}", step, values)

    def close(self) -> None:
        """Its owner does."""


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else np.asarray(value).astype(np.float64).item()


class Progress:
    """How far a run is and how fast, leaving out the first step (compilation) and what runs under `pause`.

    Args:
      total_steps: where the run ends.
      start_step: where it goes on from.
      clock: seconds.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self._total, self._step, self._clock = total_steps, start_step, clock
        self._last: float | None = None
        self._run = np.zeros(4)  # seconds, steps, streams, queries since the first step
        self._window = np.zeros(4)  # the same, at the line before

    def tick(self, streams: int, queries: int) -> None:
        """One more step is done; it answered so many queries of so many streams."""
        now = self._clock()
        if self._last is not None:
            self._run += now - self._last, 1, streams, queries
        self._last = now
        self._step += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves an evaluation, or a first step of another kind, out of the rates."""
        begin = self._clock()
        yield
        if self._last is not None:
            self._last += self._clock() - begin

    def rates(self) -> dict[str, float]:
        """Steps, streams and queries a second since the line before; NaN before the second step."""
        seconds, *done = self._run - self._window
        names = ("steps_per_second", "streams_per_second", "queries_per_second")
        return {
            name: float(n / seconds) if seconds > 0 else math.nan
            for name, n in zip(names, done, strict=True)
        }

    def line(self, loss: float, terms: Mapping[str, float]) -> str:
        """One line of where the run stands; the next one's rates begin here."""
        rates, (seconds, steps, *_) = self.rates(), self._run
        self._window = self._run.copy()
        eta = _duration((self._total - self._step) * seconds / steps) if steps else "?"
        parts = " ".join(f"{name} {_short(value)}" for name, value in terms.items())
        streams, queries = _short(rates["streams_per_second"]), _short(rates["queries_per_second"])
        return (
            f"step {self._step}/{self._total} {self._step / self._total:.1%} | {streams} streams/s {queries} queries/s"
            f" | loss {_short(loss)} ({parts}) | ETA {eta}"
        )


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def _short(value: Any) -> str:
    """Four digits, never an exponent above 1."""
    if isinstance(value, int | str) or value is None:
        return "-" if value is None else str(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text: a column for each name in order of appearance, numbers to the right, "-" for none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_short(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [any(isinstance(row.get(name), str) for row in rows) for name in names]

    def show(line: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if to_left else c.rjust(w)
            for c, w, to_left in zip(line, widths, left, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(show, [cells[0], ["-" * w for w in widths], *cells[1:]]))
