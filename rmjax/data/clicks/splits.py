"""Cuts in time that separate training from what is held out."""

from __future__ import annotations

from typing import Any

import numpy as np


def cuts(times: np.ndarray, valid_fraction: float, test_fraction: float) -> tuple[Any, Any]:
    """Finds the first times of 'valid' and 'test'. Equal times may shift the fractions a little.

    Args:
      times: [n], of all targets; any numbers.
      valid_fraction: share of the targets before 'test' that form 'valid'.
      test_fraction: share of the targets that form 'test'.

    Returns:
      Two of the times.
    """

    def cut(times: np.ndarray, fraction: float) -> Any:
        if not len(times):
            return 0
        return np.sort(times)[min(int((1 - fraction) * len(times)), len(times) - 1)]

    test_start = cut(times, test_fraction)
    return cut(times[times < test_start], valid_fraction), test_start
