"""One step of Memoria: remind, exploit, memorize and forget.

`jax.lax.scan` it over segments, and `jax.vmap` it over streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rmjax.memoria._history import Record, record
from rmjax.memoria._memorize import memorize_and_forget
from rmjax.memoria._remind import Reminded, remind
from rmjax.memoria._state import MemoriaConfig, State
from rmjax.types import Array, Key

T = TypeVar("T")


def step(
    config: MemoriaConfig,
    state: State,
    working: Array,
    exploit: Callable[[Reminded], tuple[T, Array]],
    key: Key | None = None,
    active: Array | bool = True,
) -> tuple[State, T, Record]:
    """Runs the three stages of Memoria for one segment of one stream.

    Args:
      config: sizes and rules.
      state: of one stream.
      working: f32 [N_wm, D], the new engrams of the segment, M_wm.
      exploit: reminded -> (result, weights f32 [k_short + k_long]). The weights are contributions,
        as `memoria.exploit` returns them; the result is the caller's own.
      key: as in `remind`.
      active: as in `remind`.

    Returns:
      The next state, the result of `exploit`, and the record of the step (see `memoria.record`).

    Raises:
      ValueError: as in `remind` and `memorize_and_forget`.
    """
    state, reminded = remind(config, state, working, key, active)  # section 3.2
    result, weights = exploit(reminded)  # section 3.3
    after = memorize_and_forget(config, state, reminded, weights, active)  # section 3.4
    return after, result, record(state, reminded)
