"""Titans' neural memory, item by item, in NumPy float64 for one stream.

Gradients are finite differences.
"""

from __future__ import annotations

import numpy as np

from tests.oracles import keyvalue
from tests.oracles.rehearsal import sigmoid


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def network(weights, x):
    """Two layers: x [e] -> x + their normalized output [e]."""
    first, last = weights
    y = gelu(x @ first) * np.sqrt(2 / first.shape[1]) @ last
    return x + (y - y.mean()) / np.sqrt(y.var() + 1)


def gradient(weights, k, v, step=1e-5):
    """The gradient of |M(k) - v|^2 in each weight."""
    grads = [np.zeros_like(w) for w in weights]
    for w, grad in zip(weights, grads, strict=True):
        for index in np.ndindex(w.shape):
            old, losses = w[index], []
            for moved in (old + step, old - step):
                w[index] = moved
                losses.append(np.sum((network(weights, k) - v) ** 2))
            w[index] = old
            grad[index] = (losses[0] - losses[1]) / (2 * step)
    return grads


def memorize(p, items, mask, chunk, rate):
    """Returns W and S after a stream [T, N]; gradients are those at the beginning of a chunk."""
    x, rule = keyvalue.stream(p, items, mask), p["rule"]
    theta, eta, alpha = sigmoid(x @ rule["gates"] + rule["bias"]).T
    keys, values = keyvalue.keys_and_values(p, x)
    weights = [np.copy(w) for w in rule["weights"]]
    momentum = [np.zeros_like(w) for w in weights]
    starts = [n % chunk == 0 for row in mask for n in range(row.sum())]
    for t in range(len(x)):
        if starts[t]:
            at_start = [np.copy(w) for w in weights]
        grads = gradient(at_start, keyvalue.unit(keys[t]), values[t])
        for layer, grad in enumerate(grads):
            momentum[layer] = eta[t] * momentum[layer] - rate * theta[t] * grad
            weights[layer] = (1 - alpha[t]) * weights[layer] + momentum[layer]
    return weights, momentum


def read(p, weights, query):
    return keyvalue.read(p, query, lambda _, q: network(weights, q), 1)
