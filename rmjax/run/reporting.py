"""Log lines and loggers, the speed of a run, and tables."""

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
from ml_collections import ConfigDict

from rmjax.io import terminal
from rmjax.registry import LOGGERS, names_in
from rmjax.types import Logger, LoggerContext

Scalar = int | float | np.ndarray | np.generic | jax.Array  # with one element


class MetricWriter:
    """Writes metrics to the log and to loggers.

    Args:
      loggers: the writer closes them.
      silent: nothing is written, as on processes other than 0.
    """

    def __init__(self, loggers: Sequence[Logger] = (), silent: bool = False):
        self.loggers, self._silent = tuple(loggers), silent

    def write(
        self, kind: str, step: int, values: Mapping[str, Scalar], text: str | None = None
    ) -> None:
        """Writes the numbers of one step.

        Args:
          kind: "train", "valid" and so on.
          step: the step.
          values: scalars by name; they may be NaN or infinite.
          text: the log line; None: the values; empty: no line.

        Raises:
          OSError: a file cannot be written, for example on a full disk; names the file and the
            cure.
        """
        if self._silent:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        if text != "":
            logging.info("%s", text or step_line(kind, step, numbers))
        for logger in self.loggers:
            logger.write(kind, step, numbers)

    def close(self) -> None:
        """Closes all loggers, even if one of them fails."""
        with contextlib.ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)


def step_line(kind: str, step: int, values: Mapping[str, int | float]) -> str:
    """The log line of one step; arguments as for `MetricWriter.write`."""
    shown = " ".join(f"{name} {short(value)}" for name, value in values.items())
    return f"{kind} step {step} | {shown}"


def open_loggers(
    config: ConfigDict,
    workdir: str | Path,
    stage: str = "model",
    start_step: int = 0,
    evaluated: bool = True,
    more: Sequence[Logger] = (),
) -> MetricWriter:
    """Opens the loggers that `config.train.loggers` names, on process 0. Others write nothing.

    Args:
      config: of the run.
      workdir: of the run.
      stage: 'teacher' or 'model', whose steps are counted.
      start_step: the step that was restored; 0 at the start. Later steps are written again.
      evaluated: False: `start_step` is not evaluated yet, so an evaluation that was written for it
        is removed.
      more: the caller's loggers, which the caller closes. They see kinds such as 'model/train' and
        'teacher/valid'.

    Returns:
      A writer, which the caller closes.

    Raises:
      ImportError: the package of a logger is missing; says how to install it.
    """
    if jax.process_index():
        return MetricWriter(silent=True)
    values = json.loads(config.to_json())
    context = LoggerContext(Path(workdir), values, stage, start_step, evaluated)
    with contextlib.ExitStack() as stack:
        opened: list[Logger] = []
        for name in names_in(config.train.loggers):
            given = getattr(config, "logger", {})
            settings = LOGGERS.settings(name, given, "config.logger.", config)
            opened.append(LOGGERS[name].make(settings, context))
            stack.callback(opened[-1].close)
        stack.pop_all()  # all are open: the writer closes them
    return MetricWriter([*opened, *(_Lent(logger, stage) for logger in more)])


class _Lent(NamedTuple):
    """A caller's logger, which outlives a stage."""

    logger: Logger
    stage: str

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        self.logger.write(f"{self.stage}/{kind}", step, values)

    def close(self) -> None:
        """Does nothing: the caller closes the logger."""


def read_metrics(path: Path) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Reads the metrics.jsonl of a run. The partial line of a killed process is left out.

    Args:
      path: of the file, which may be missing.

    Yields:
      (stage, kind, step, {name: value}) of each line.
    """
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            stage, kind, step = entry.pop("stage"), entry.pop("kind"), entry.pop("step")
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        yield stage, kind, step, entry


def _number(value: Scalar) -> int | float:
    return value if isinstance(value, int) else np.asarray(value).astype(np.float64).item()


class Progress:
    """The progress of a run and its speed.

    The speed leaves out the first step (compilation) and the time under `pause`.

    Args:
      total_steps: the last step.
      start_step: the step that the run continues from.
      clock: gives seconds.
      name: of the stage, for the live line.

    Attributes:
      bar: the live line on a terminal, see `terminal.bar`; `close` removes it.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        name: str = "model",
    ):
        self.bar = terminal.bar(name, total_steps, start_step, wanted=jax.process_index() == 0)
        self._total, self._step, self._clock = total_steps, start_step, clock
        self._last: float | None = None
        self._run = np.zeros(4)  # seconds, steps, streams, queries since the first step
        self._window = np.zeros(4)  # the same, at the last line

    def tick(self, streams: int, queries: int) -> None:
        """Counts a step.

        Args:
          streams: rows of the step's batch.
          queries: questions that were answered.
        """
        moment = self._clock()
        if self._last is not None:
            self._run += moment - self._last, 1, streams, queries
        self._last = moment
        self._step += 1
        self.bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside, such as an evaluation, out of the rates."""
        begin = self._clock()
        yield
        if self._last is not None:
            self._last += self._clock() - begin

    def rates(self) -> dict[str, float]:
        """Steps, streams and queries per second since the last line; NaN before the second step."""
        seconds, *done = self._run - self._window
        names = ("steps_per_second", "streams_per_second", "queries_per_second")
        rates = [float(n / seconds) if seconds > 0 else math.nan for n in done]
        return dict(zip(names, rates, strict=True))

    def line(self, loss: float, terms: Mapping[str, float]) -> str:
        """One line of progress. The rates of the next line begin at this one.

        Args:
          loss: of the last step.
          terms: the terms of the loss.

        Returns:
          The line, with the expected time to the end.
        """
        rates = {name: short(rate) for name, rate in self.rates().items()}
        self._window = self._run.copy()
        streams, queries = rates["streams_per_second"], rates["queries_per_second"]
        return (
            f"step {self._step}/{self._total} {self._step / self._total:.1%} | {streams} streams/s "
            f"{queries} queries/s | loss {self._losses(loss, terms, short)} | ETA {self._end()}"
        )

    def show(self, loss: float, terms: Mapping[str, float]) -> None:
        """Shows the losses of the last step in the bar, and its mean rate since the start."""
        if self.bar.disable:
            return
        seconds, steps, streams, _ = self._run
        rate = f"{streams / seconds:.3g} streams/s, " if steps else ""
        losses = self._losses(loss, terms, "{:.3g}".format)
        self.bar.set_postfix_str(f"ETA {self._end()}, {rate}loss {losses}", refresh=False)

    def _losses(
        self, loss: float, terms: Mapping[str, float], shown: Callable[[float], str]
    ) -> str:
        parts = " ".join(f"{name} {shown(value)}" for name, value in terms.items())
        return f"{shown(loss)} ({parts})"

    def _end(self) -> str:
        """The expected time to the end."""
        seconds, steps, *_ = self._run
        return _duration((self._total - self._step) * seconds / steps) if steps else "?"

    def close(self) -> None:
        """Removes the live line."""
        self.bar.close()


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def short(value: int | float | str | None) -> str:
    """Returns four digits of a number; numbers above 1 have no exponent. None becomes '-'."""
    if isinstance(value, int | str) or value is None:
        return "-" if value is None else str(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Any]], width: int = 100) -> str:
    """Shows rows as aligned text.

    Args:
      rows: values by name. Every name is a column, in order of appearance.
      width: longest line; columns that do not fit continue below, behind the first column again.

    Returns:
      Lines, with numbers aligned to the right and "-" for a missing value.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [_column(name, [row.get(name) for row in rows]) for name in names]
    blocks = [columns[:1]]
    for column in columns[1:]:
        if len("  ".join(cells[0] for cells in (*blocks[-1], column))) > width:
            blocks.append(columns[:1])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks
    )


def tables(rows: Sequence[Mapping[str, Any]], apart: Sequence[str]) -> str:
    """Shows rows as two tables below each other.

    Args:
      rows: values by name. Names of rows are in 'memory', 'setting' and 'row'.
      apart: columns of the second table, which has only those rows that have one of them.

    Returns:
      Both tables as text; the first alone if no row has such a column.
    """
    labels = ("memory", "setting", "row")
    first = [{k: v for k, v in row.items() if k not in apart} for row in rows]
    second = [
        {k: v for k, v in row.items() if k in labels or k in apart}
        for row in rows
        if any(name in row for name in apart)
    ]
    return "\n\n".join(table(part) for part in (first, second) if part)


def _column(name: str, values: Sequence[Any]) -> list[str]:
    """The cells of a column, padded to one width: its name, a rule, and its values."""
    cells = [name, *map(short, values)]
    width = max(map(len, cells))
    pad = str.ljust if any(isinstance(value, str) for value in values) else str.rjust
    name, *shown = [pad(cell, width) for cell in cells]
    return [name, "-" * width, *shown]
