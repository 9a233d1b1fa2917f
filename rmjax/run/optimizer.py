"""The optimizer: Adam (RM section 4.1) behind clipping by global norm."""

from __future__ import annotations

import optax

from rmjax.schedules import Schedule


def make_optimizer(
    learning_rate: float, clip: float, schedule: Schedule | None = None, warmup: int = 0
) -> optax.GradientTransformation:
    """Builds Adam. The rate rises from 0 over the warm-up and then follows a schedule.

    Args:
      learning_rate: the largest rate.
      clip: largest norm of the gradient; 0: no limit.
      schedule: factor of the rate; its step 0 is the end of the warm-up. None: the factor is 1.
      warmup: steps over which the rate rises.

    Returns:
      The optimizer.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if schedule is not None:
        rate = lambda step: learning_rate * schedule(step)
    if warmup:
        after = rate if callable(rate) else optax.constant_schedule(rate)
        rise = optax.linear_schedule(0.0, learning_rate, warmup)
        rate = optax.join_schedules([rise, after], [warmup])
    clipped = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*clipped, optax.adam(rate))
