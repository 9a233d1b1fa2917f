"""The optimizer: Adam (RM section 4.1) behind clipping by global norm."""

from __future__ import annotations

import optax

from rmjax.schedules import Schedule


def make_optimizer(
    learning_rate: float, clip: float, schedule: Schedule | None = None, warmup: int = 0
) -> optax.GradientTransformation:
    """Adam, whose rate rises from 0 over `warmup` steps and then follows a schedule.

    Args:
      learning_rate: the largest.
      clip: largest norm of the gradient; 0: any.
      schedule: factor of the rate, whose steps begin after the warm-up; None: it stays 1.
      warmup: steps.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if schedule is not None:
        rate = lambda step: learning_rate * schedule(step)
    if warmup:
        after = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules(
            [optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup]
        )
    clipped = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*clipped, optax.adam(rate))
