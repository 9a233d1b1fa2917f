"""The hierarchical periodic memory network in plain NumPy float64, for one stream."""

from __future__ import annotations

import numpy as np

from tests.oracles.rehearsal import embed, gru, softmax


def online(p, items, period):
    """The states [L, d] after items [n]: each item moves the GRUs whose period ends with it."""
    states = np.zeros((len(p["grus"]), p["embed"].shape[1]))
    for count, x in enumerate(embed(p, items), 1):
        for level, unit in enumerate(p["grus"]):
            if count % period**level == 0:
                states[level] = x = gru(unit, states[level], x)
    return states


def in_batches(p, items, period):
    """The same, level by level: every p-th state of a GRU is an input of the next."""
    states, inputs = [], embed(p, items)
    for unit in p["grus"]:
        outputs = [np.zeros(inputs.shape[1])]
        for x in inputs:
            outputs.append(gru(unit, outputs[-1], x))
        states.append(outputs[-1])
        inputs = np.stack(outputs)[period::period]
    return np.stack(states)


def covariance(states):
    """The Frobenius norm of the covariances of different slots."""
    total = 0.0
    for i, a in enumerate(states):
        for j, b in enumerate(states):
            if i != j:
                total += np.mean((a - a.mean()) * (b - b.mean())) ** 2
    return np.sqrt(total)


def attend(p, query, slots, activation):
    """DIN's activation unit, for one question."""
    scores = []
    for k in slots:
        x = np.concatenate([query, k, query - k, query * k])
        for kernel, bias in zip(p["kernels"], p["biases"], strict=True):
            x = activation(x @ kernel + bias)
        scores.append(x @ p["score"])
    return softmax(np.array(scores)) @ slots


def read(p, query, slots):
    """Three equations a hop: scores, r, and q <- q H + r."""
    query = query @ p["query"] + p["bias"]
    for hop in p["units"]:
        query = query @ p["map"] + attend(hop, query, slots, lambda x: np.maximum(x, 0))
    return query
