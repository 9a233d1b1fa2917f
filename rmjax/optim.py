"""The optimizer: Adam (RM section 4.1) behind clipping by global norm."""

from __future__ import annotations

import optax


def make_optimizer(
    learning_rate: float, clip: float, steps: int = 0, schedule: str = "constant", warmup: float = 0.0
) -> optax.GradientTransformation:
    """clip = 0: no clipping. schedule: 'constant', or over `steps` the rate falls to zero by half a 'cosine' or
    'linear'ly, after it has risen from zero over their share `warmup`."""
    steps_up = round(warmup * steps)
    down = max(1, steps - steps_up)
    rate: optax.ScalarOrSchedule = learning_rate
    if schedule == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, down)
    elif schedule == "linear":
        rate = optax.linear_schedule(learning_rate, 0.0, down)
    if steps_up:
        after = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, steps_up), after], [steps_up])
    clipped = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*clipped, optax.adam(rate))
