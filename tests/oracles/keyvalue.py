"""Keys, values and answers of memories that map keys to values, in NumPy float64 for one stream."""

from __future__ import annotations

import numpy as np

from tests.oracles.rehearsal import embed, sigmoid


def silu(x):
    return x * sigmoid(x)


def unit(x):
    return x / np.sqrt(np.sum(x * x) + 1e-6)


def keys_and_values(p, x):
    """x [L, d], the items of a stream -> lists of keys and of values [d], not yet scaled."""
    inputs, taps = x @ p["item"], len(p["filters"])
    keys, values = [], []
    for t in range(len(x)):
        y = sum(p["filters"][taps - 1 - j] * inputs[t - j] for j in range(min(taps, t + 1)))
        key, value = np.split(silu(y), 2)
        keys.append(key)
        values.append(value)
    return keys, values


def stream(p, items, mask):
    """items and mask [T, N] -> vectors [L, d] of the items that exist."""
    return embed(p, items[mask])


def read(p, query, look_up, heads):
    """query [d] -> answer [d]; look_up(head, key [e]) -> value [e]."""
    answer = []
    for head, q in enumerate(np.split(silu(query @ p["query"]), heads)):
        value = look_up(head, unit(q))
        answer.append(value / np.sqrt(np.mean(value * value) + 1e-6))
    gate = silu(query @ p["gate"]["kernel"] + p["gate"]["bias"])
    return (np.concatenate(answer) * gate) @ p["out"]
