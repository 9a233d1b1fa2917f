"""The multi-channel user interest memory in plain NumPy float64, for one stream."""

from __future__ import annotations

import numpy as np

from tests.oracles.hpmn import attend
from tests.oracles.rehearsal import embed, gru, sigmoid, softmax


def softplus(x):
    return np.log1p(np.exp(x))


def cosine(a, b):
    length = lambda x: np.sqrt(x @ x + 1e-6)
    return a @ b / (length(a) * length(b) + 1e-6)


def address(p, slots, key, strength):
    """Content addressing by the slots and by their learned keys."""
    key, beta = np.tanh(key), 2 * (1 + softplus(strength))
    of_keys = [cosine(key, np.tanh(k)) for k in p["keys"]]
    of_slots = [cosine(key, m) for m in slots]
    return softmax(beta * 0.5 * (np.array(of_keys) + np.array(of_slots)))


def rebalance(weights, shift, power):
    """Graves et al. 2014, Eqs. 8 and 9, on weights [K]; shift [3] and power [] are raw."""
    s, number = softmax(shift), len(weights)
    moved = [sum(s[j] * weights[(i - 1 + j) % number] for j in range(3)) for i in range(number)]
    powers = (np.array(moved) + 1e-12) ** (4 * (1 + softplus(power)))
    return powers / powers.sum()


def ntm(p, state, x):
    """One step of a neural Turing machine with content addressing alone."""
    d = len(x)
    hidden = gru(p["controller"], state["hidden"], np.concatenate([x, state["read"]]))
    o = np.clip(hidden @ p["controls"] + p["controls_bias"], -20, 20)
    erase, add = sigmoid(o[2 * d + 6 : 3 * d + 6]), np.tanh(o[3 * d + 6 :])
    read = address(p, state["slots"], o[:d], o[2 * d])
    write = address(p, state["slots"], o[d : 2 * d], o[2 * d + 1])
    slots = [m * (1 - w * erase) + w * add for m, w in zip(state["slots"], write, strict=True)]
    return {"slots": np.stack(slots), "read": read @ state["slots"], "hidden": hidden}


def mimn(p, state, x, capacity):
    """One step with utilisation and induction."""
    d, old = len(x), state["slots"]
    hidden = gru(p["controller"], state["hidden"], np.concatenate([x, state["read"]]))
    seen = np.concatenate([hidden, state["usage"] / capacity])
    o = np.clip(seen @ p["controls"] + p["controls_bias"], -20, 20)
    read_key, write_key, strengths, shift, power, erase, add = np.split(
        o, np.cumsum([d, d, 2, 3, 1, d])
    )
    read = address(p, old, read_key, strengths[0])
    write = rebalance(address(p, old, write_key, strengths[1]), shift, power[0])
    new = {name: value.copy() for name, value in state.items()}
    for k in range(len(old)):
        new["slots"][k] = old[k] - write[k] * sigmoid(erase) * old[k] + write[k] * np.tanh(add)
        new["added"][k] += write[k] * np.tanh(add)
    best = np.argmax(read)
    both = np.concatenate([x, old[best]])
    new["steps"][best] += 1
    new["channels"][best] = gru(p["channel"], state["channels"][best], both)
    new["usage"] += rebalance(write, shift, power[0])
    return new | {"read": read @ old, "hidden": hidden}


def first(p):
    cell = p["cell"]
    number, d = cell["slots"].shape
    sums = {name: np.zeros((number, d)) for name in ("added", "channels")}
    start = {"slots": cell["slots"], "read": np.tanh(cell["read"]), "hidden": np.zeros(d)}
    return sums | start | {"usage": np.zeros(number), "steps": np.zeros(number, int)}


def memorize(p, items, step):
    """The state after items [n]; step(cell, state, x)."""
    state = first(p)
    for x in embed(p, items):
        state = step(p["cell"], state, x)
    return state


def read(p, state, history, query, capacity):
    """The five parts of the released reader, for one question; `history` [n, d] is every item."""
    cell, reader = p["cell"], p["reader"]
    after = mimn(cell, state, query, capacity)
    out = np.concatenate([after["hidden"], after["read"]]) @ reader["out"] + reader["out_bias"]
    parts = [
        query,
        history.mean(0),
        np.clip(out, -20, 20),
        query * state["added"].mean(0) / len(history),
        attend(reader["unit"], query, state["channels"], sigmoid),
    ]
    return np.concatenate(parts) @ reader["merge"] + reader["merge_bias"]
