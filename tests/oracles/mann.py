"""DNC, NUTM and DMSDNC in plain NumPy float64, for one stream: slots, heads and blocks in loops.

The equations are those of Graves et al. 2016 (Methods), Le et al. 2020 and Park et al. 2020. The
oracle takes the parameter trees of the machines, and nothing else.
"""

from __future__ import annotations

import itertools

import numpy as np

from tests.oracles.rehearsal import embed, sigmoid, softmax

EPSILON = 1e-6


def softplus(x):
    return np.log1p(np.exp(x))


def cosine(a, b):
    return a @ b / (np.sqrt(a @ a + EPSILON) * np.sqrt(b @ b + EPSILON))


def content(slots, key, strength):
    """C(M, k, beta)."""
    return softmax(np.array([strength * cosine(slot, key) for slot in slots]))


def allocation(usage):
    """The free list phi is sorted by usage; a[phi_j] = (1 - u[phi_j]) prod_(i<j) u[phi_i]."""
    usage = EPSILON + (1 - EPSILON) * usage
    a, product = np.zeros(len(usage)), 1.0
    for k in sorted(range(len(usage)), key=lambda k: usage[k]):
        a[k] = (1 - usage[k]) * product
        product *= usage[k]
    return a


def lstm(p, reads, h, c, x, r):
    i, f, g, o = np.split(x @ p["input"] + h @ p["hidden"] + r @ reads + p["bias"], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def program(p, h):
    """NUTM: the layers V_p h + b_p, weighted by how well the query fits their keys."""
    query, strength = np.tanh(h @ p["query"]), softplus(h @ p["strength"])[0]
    shares = softmax(np.array([strength * cosine(np.tanh(key), query) for key in p["keys"]]))
    layers = zip(shares, p["kernel"], p["bias"], strict=True)
    return sum(share * (h @ kernel + bias) for share, kernel, bias in layers)


def interface(p, h):
    if "read" in p:
        return np.concatenate([program(p["read"], h), program(p["write"], h)])
    return h @ p["kernel"] + p["bias"]


def take(x, *widths):
    """Cuts a vector into parts of these widths, and what is left."""
    return np.split(x, np.cumsum(widths))


def empty(blocks, size, heads, width, hidden):
    return {
        "slots": np.zeros((blocks, size, width)),
        "usage": np.zeros((blocks, size)),
        "write_weights": np.zeros((blocks, size)),
        "read_weights": np.zeros((blocks, heads, size)),
        "reads": np.zeros((heads, width)),
        "hidden": np.zeros(hidden),
        "cell": np.zeros(hidden),
        "precedence": np.zeros((1, size)),
        "links": np.zeros((1, size, size)),
    }


def step(p, s, x, kind):
    """One item: state s and item x -> new state."""
    (blocks, size, width), heads = s["slots"].shape, len(s["reads"])
    new = {name: np.zeros_like(value) for name, value in s.items()}
    h, c = lstm(p["controller"], p["reads"], s["hidden"], s["cell"], x, s["reads"].ravel())
    new["hidden"], new["cell"] = h, c
    xi = interface(p["interface"], (h - h.mean()) / np.sqrt(h.var() + 1e-5))
    extra = {"dnc": 3, "nutm": 0, "dmsdnc": 1}[kind]
    per_head = width + 2 + extra
    of_reads, of_writes = take(xi, blocks * heads * per_head)
    asked = of_reads.reshape(blocks, heads, per_head)
    gates = np.zeros((blocks, heads, extra))
    for g in range(blocks):
        write = of_writes.reshape(blocks, -1)[g]
        key, erase, value, strength, allocate, gate = take(write, width, width, width, 1, 1)
        usage = s["usage"][g].copy()
        for k in range(size):
            usage[k] += s["write_weights"][g, k] * (1 - usage[k])
            for r in range(heads):
                usage[k] *= 1 - sigmoid(asked[g, r, width + 1]) * s["read_weights"][g, r, k]
        alike = content(s["slots"][g], key, 1 + softplus(strength[0]))
        free, share = allocation(usage), sigmoid(allocate[0])
        w = sigmoid(gate[0]) * (share * free + (1 - share) * alike)
        for k in range(size):
            new["slots"][g, k] = s["slots"][g, k] * (1 - w[k] * sigmoid(erase)) + w[k] * value
        new["usage"][g], new["write_weights"][g] = usage, w
        for r in range(heads):
            key, strength, _, gates[g, r] = take(asked[g, r], width, 1, 1)
            beta = 1 + softplus(strength[0])
            new["read_weights"][g, r] = content(new["slots"][g], key, beta)
    if kind == "dnc":
        follow_links(s, new, gates[0])
    if kind == "dmsdnc":
        for r in range(heads):
            new["read_weights"][:, r] *= softmax(gates[:, r, 0])[:, None]
    for g, r in itertools.product(range(blocks), range(heads)):
        new["reads"][r] += new["read_weights"][g, r] @ new["slots"][g]
    return new


def follow_links(s, new, modes):
    """DNC: links, precedence, and the read weights along the links."""
    w, p, size = new["write_weights"][0], s["precedence"][0], len(s["precedence"][0])
    for i, j in itertools.permutations(range(size), 2):
        new["links"][0, i, j] = (1 - w[i] - w[j]) * s["links"][0, i, j] + w[i] * p[j]
    new["precedence"][0] = (1 - w.sum()) * p + w
    for r, mode in enumerate(modes):
        before, (back, alike, forward) = s["read_weights"][0, r], softmax(mode)
        along, against = new["links"][0] @ before, new["links"][0].T @ before
        new["read_weights"][0, r] *= alike
        new["read_weights"][0, r] += back * against + forward * along


def memorize(p, s, items, mask, kind):
    """Returns the state after a stream items [T, N] from state s, and h and r after each item."""
    outputs = []
    for x in embed(p, items[mask]):
        s = step(p, s, x, kind)
        outputs.append(np.concatenate([s["hidden"], s["reads"].ravel()]))
    return s, outputs


def similarity(keys):
    """NUTM: the mean cosine of two different keys."""
    return np.mean([cosine(a, b) for a, b in itertools.combinations(keys, 2)])


def refresh(p, outputs, items, mask, everything):
    """DMSDNC: the sum of -log p(item) over all items; `everything`: p is over the table."""
    outputs, total = iter(outputs), 0.0
    scale = p["embed"].shape[1] ** -0.5
    for segment, valid in zip(items, mask, strict=True):
        offered = range(len(p["embed"])) if everything else segment[valid]
        for item in segment[valid]:
            recalled = next(outputs) @ p["refresh"]
            others = [embed(p, other) for other in offered if other != item]
            table = scale * np.stack([embed(p, item), *others])
            total -= np.log(softmax(table @ recalled)[0])
    return total
