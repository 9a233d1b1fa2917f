"""One step of Memoria: remind, exploit, memorize & forget. `jax.lax.scan` it over segments, `jax.vmap` over streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmjax.memoria._history import Record, record
from rmjax.memoria._memorize import memorize_and_forget
from rmjax.memoria._remind import Reminded, remind
from rmjax.memoria._state import MemoriaConfig, State
from rmjax.types import Array, Key


def step(
    config: MemoriaConfig,
    state: State,
    working: Array,
    exploit: Callable[[Reminded], tuple[Any, Array]],
    key: Key | None = None,
    active: Array | bool = True,
) -> tuple[State, Any, Record]:
    """-> the next state, what `exploit` made of the reminded engrams, and the record of the step (`memoria.record`).

    Args:
      working: [N_wm, D], the segment's new engrams.
      exploit: reminded -> (result, weights [k_short + k_long]), as `memoria.exploit` gives them.
      key, active: as for `remind`.
    """
    state, reminded = remind(config, state, working, key, active)
    result, weights = exploit(reminded)
    return (
        memorize_and_forget(config, state, reminded, weights, active),
        result,
        record(state, reminded),
    )
