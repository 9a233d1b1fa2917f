"""Fast and Forgetful Memory, item by item, in NumPy complex128 for one stream."""

from __future__ import annotations

import numpy as np

from tests.oracles.rehearsal import embed, sigmoid


def memorize(p, items, mask):
    """Returns z [m, c] after a stream [T, N]."""
    gamma = np.exp(-np.abs(p["decay"])[:, None] + 1j * p["angle"])
    z = np.zeros(gamma.shape, complex)
    for x in embed(p, items[mask]):
        added = sigmoid(x @ p["item_gate"]) * (x @ p["item"])
        z = gamma * z + added[:, None]
    return z


def read(p, z, query):
    y = np.concatenate([z.real.ravel(), z.imag.ravel()]) @ p["mix"]
    y = (y - y.mean()) / np.sqrt(y.var() + 1e-6)
    gate = sigmoid(query @ p["question_gate"])
    return y * gate + (query @ p["question"]) * (1 - gate)
