"""The optimizer: Adam at a constant rate (RM section 4.1) behind clipping by global norm."""

from __future__ import annotations

import optax


def make_optimizer(learning_rate: float, clip: float) -> optax.GradientTransformation:
    """clip = 0: no clipping."""
    steps = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*steps, optax.adam(learning_rate))
