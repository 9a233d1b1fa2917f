"""Output on a terminal: plain log lines above one live line of progress.

In a file or a pipe no bar is drawn, and log lines stay as they are.
"""

from __future__ import annotations

import logging as std_logging
import sys

from absl import logging
from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt}{postfix}"
_COUNT = "{desc} {n_fmt}{unit}, {rate_fmt}"


def bar(doing: str, total: int, start: int = 0, unit: str = "steps", wanted: bool = True) -> tqdm:
    """A live line of progress on standard error.

    Args:
      doing: what is done, the start of the line.
      total: all steps; 0: unknown.
      start: steps that were done before.
      unit: of the steps.
      wanted: False: draw nothing, as on processes other than 0.

    Returns:
      A bar, which the caller closes. Its attribute `disable` is true where nothing is drawn.
    """
    return tqdm(
        desc=doing,
        total=total or None,
        initial=start,
        unit=f" {unit}",
        unit_scale=not total,
        file=sys.stderr,
        disable=None if wanted else True,  # None: draw on terminals alone
        dynamic_ncols=True,
        leave=False,
        bar_format=_BAR if total else _COUNT,
    )


class _AboveBars(std_logging.Handler):
    """Writes records without a prefix above the bars. Other packages' records need a warning."""

    def emit(self, record: std_logging.LogRecord) -> None:
        ours = record.name == logging.get_absl_logger().name
        if record.levelno < std_logging.WARNING and not ours:
            return
        name = record.levelname.capitalize()
        prefix = f"{name}: " if record.levelno >= std_logging.WARNING else ""
        try:
            with tqdm.external_write_mode(file=sys.stderr):
                sys.stderr.write(f"{prefix}{self.format(record)}\n")
        except Exception:  # the terminal may be gone, which must not end a training
            self.handleError(record)


def plain_logs() -> None:
    """Drops absl's prefix from log lines, if standard error is a terminal. Call it once."""
    if not sys.stderr.isatty():
        return
    root = std_logging.getLogger()
    root.removeHandler(logging.get_absl_handler())
    root.addHandler(_AboveBars())
