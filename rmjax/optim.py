"""The optimizer: Adam (RM section 4.1) behind clipping by global norm."""

from __future__ import annotations

import optax


def make_optimizer(learning_rate: float, clip: float, decay_steps: int = 0) -> optax.GradientTransformation:
    """clip = 0: no clipping. decay_steps: the rate falls to zero over so many steps, by half a cosine; 0: constant."""
    rate = optax.cosine_decay_schedule(learning_rate, decay_steps) if decay_steps else learning_rate
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*steps, optax.adam(rate))
