"""The self-attentive associative memory in plain NumPy float64, for one stream, entry by entry."""

from __future__ import annotations

import numpy as np

from tests.oracles.rehearsal import embed, sigmoid, softmax


def normalize(x, scale=1.0, bias=0.0):
    """The layer norm over all entries."""
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * scale + bias


def related(q, k, v):
    """R_0 [n, d, d]: R_0[i] = sum_j tanh(q_i * k_j) v_j^T, from q, k, v [n, d]."""
    n, d = q.shape
    out = np.zeros((n, d, d))
    for i, j, x, y in np.ndindex(n, n, d, d):
        out[i, x, y] += np.tanh(q[i, x] * k[j, x]) * v[j, y]
    return out


def write(p, items, relations, x):
    """M_i, M_r and R_0 after an item x [d]."""
    d, n = len(x), len(relations)
    a = x @ p["item"] + p["item_bias"]
    b = x @ p["key"] + p["key_bias"]
    c = softmax(x @ p["share"] + p["share_bias"])
    shared = a @ p["item_gates"] + p["gates_bias"]
    written = np.zeros((d, d))
    for row in range(d):
        take, keep = np.split(shared + np.tanh(items[row]) @ p["memory_gates"], 2)
        new = np.tanh(a[row] * a)
        written[row] = sigmoid(take) * new + sigmoid(keep + 1) * items[row]
    r = sum(c[i] * (b @ relations[i]) for i in range(n))
    z = (written + p["alpha"][1] * np.outer(r, b)) @ p["qkv"] + p["qkv_bias"]
    z = normalize(z, p["norm"]["scale"], p["norm"]["bias"])
    new = related(z[:, :n].T, z[:, n : 2 * n].T, z[:, 2 * n :].T)
    moved = np.zeros((d, d))
    for y in range(d):  # G_2 maps the n d entries R_0[:, :, y]
        moved[y] = new[:, :, y].reshape(-1) @ p["transfer"] + p["transfer_bias"]
    return written + p["alpha"][2] * moved, p["alpha"][0] * relations + new, new


def memorize(p, items, mask):
    """M_i, M_r, and the R_0 of every item, from items and mask [T, N]."""
    cell, every = p["cell"], []
    state = cell["items"], cell["relations"]
    for x in embed(p, items[mask]):
        *state, new = write(cell, *state, x)
        every.append(new)
    return *state, every


def slots(p, relations):
    rows = [row for matrix in relations for row in matrix]
    mixed = [sum(w * row for w, row in zip(ws, rows, strict=True)) for ws in p["slots"]]
    return np.stack([normalize(slot) for slot in mixed])


def read(p, query, relations):
    """Schlag & Schmidhuber 2018, section 3.3: inference from a tensor product, for one question."""

    def network(p):
        hidden = np.tanh(query @ p["hidden"] + p["hidden_bias"])
        return np.tanh(hidden @ p["out"] + p["out_bias"])

    entity, answer = network(p["entity"]), 0.0
    for role, norm in zip(p["roles"], p["norms"], strict=True):
        weights = network(role)
        inferred = sum(w * (entity @ m) for w, m in zip(weights, relations, strict=True))
        entity = normalize(inferred, norm["scale"], norm["bias"])
        answer = answer + entity
    return answer
