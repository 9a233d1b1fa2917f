"""The gated delta rule, item by item, in NumPy float64 for one stream."""

from __future__ import annotations

import numpy as np

from tests.oracles import keyvalue
from tests.oracles.rehearsal import sigmoid


def memorize(p, items, mask, heads):
    """Returns S [H, e, e] after a stream [T, N]."""
    x, rule = keyvalue.stream(p, items, mask), p["rule"]
    gates = x @ rule["gates"] + rule["bias"]
    keys, values = keyvalue.keys_and_values(p, x)
    width = x.shape[1] // heads
    states = np.zeros((heads, width, width))
    for t in range(len(x)):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            k, v = keyvalue.unit(keys[t][own]), values[t][own]
            a = np.exp(-np.exp(rule["rate"][head]) * np.log(1 + np.exp(gates[t, head])))
            b = sigmoid(gates[t, heads + head])
            states[head] = a * states[head] @ (np.eye(width) - b * np.outer(k, k))
            states[head] += b * np.outer(v, k)
    return states


def read(p, states, query):
    return keyvalue.read(p, query, lambda head, q: states[head] @ q, len(states))
