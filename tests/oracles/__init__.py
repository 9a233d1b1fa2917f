"""Oracles, and what tests need to compare code with them."""

from __future__ import annotations

import jax
import numpy as np


def f64(tree):
    """A tree of arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(got, expected, rtol=1e-5, atol=1e-5, **how):
    """Asserts that arrays agree."""
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, **how)
